"""A ControlNet on disk to a network in memory: the layouts that are read, and every reason to refuse a file.

A ControlNet (Zhang et al., arXiv:2302.05543) is a copy of a UNet's encoder with a hint encoder before it and a 1×1
convolution after each block. diffusers folders bring a config. Single files bring only weights: their geometry is read from
shapes, and what shapes do not show (attention heads, activations) is the base model's, of which they are a copy.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from stepforge.export.models.files import read_json, reading, refuse_code
from stepforge.export.models.ldm_names import HINT, diffusers_names
from stepforge.export.models.networks import empty_network
from stepforge.export.models.stored import Stored
from stepforge.export.models.weights import Loader, Shapes, State, read_header, weight_files
from stepforge.runtime.bundle import sha256
from stepforge.runtime.errors import CheckpointError

PREFIX = "control_model."  # the original files keep a ControlNet beside, or without, its base model
CONTROL_LORA = "a Control-LoRA, low-rank changes of the base model's encoder; give a whole ControlNet for that hint"
T2I = "a T2I-Adapter, which has no residual network; give a ControlNet for that hint"
UNION = "a ControlNet-Union, which needs to be told the kind of its hint; give a ControlNet for one kind of hint"
LLLITE = "a ControlNet-LLLite, which changes attention layers; give a ControlNet for that hint"
XS = "a ControlNet-XS, which is interwoven with the base model; give a ControlNet for that hint"
LORA = "a LoRA adapter; give it to requests with --adapter, it needs no export"
DIFFERENCE = "the difference of a ControlNet and a base model; give the whole ControlNet"
BASE = "a base model; export it as MODEL, and give its ControlNets with --control NAME=PATH"
MULTI = "several ControlNets in one; give each of its folders with a --control of its own"
KINDS = (  # what a name of a weight gives away
    (r"lllite_", LLLITE),
    (r"lora_controlnet$|.*\.(up|down)$", CONTROL_LORA),
    (r"task_embedding$|control_add_embedding\.", UNION),
    (r".*(base_to_ctrl|ctrl_to_base|control_to_base|enc_zero_convs)", XS),
    (r"lora_|base_model\.model\.|.*\.(lora|hada|lokr)_", LORA),
    (r"(.*\.)?difference$", DIFFERENCE),
    (r"(adapter|body)\.", T2I),
    (r"(model\.diffusion_model|output_blocks|up_blocks|first_stage_model)\.", BASE),
)
CLASSES = {  # what the class in a config gives away
    "ControlNetUnionModel": UNION,
    "ControlNetXSAdapter": XS,
    "UNetControlNetXSModel": XS,
    "MultiControlNetModel": MULTI,
    "T2IAdapter": T2I,
    "MultiAdapter": T2I,
    "UNet2DConditionModel": BASE,
}
# Options of a ControlNet that would need further graph inputs or another conditioning.
PLAIN = ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type")
FIT = {  # option that a ControlNet shares with its base model -> what it is called in errors
    "cross_attention_dim": "cross_attention_dim",
    "in_channels": "latent channels",
    "block_out_channels": "residual channels",
    "layers_per_block": "layers per block",
    "addition_time_embed_dim": "addition_time_embed_dim",
    "projection_class_embeddings_input_dim": "width of pooled text and sizes",
}
FAMILIES = {"768": " (SD 1)", "1024": " (SD 2)", "2048": " (SDXL)"}  # by cross_attention_dim
FROM_BASE = (
    "in_channels", "flip_sin_to_cos", "freq_shift", "only_cross_attention", "downsample_padding", "mid_block_scale_factor",
    "act_fn", "norm_num_groups", "norm_eps", "attention_head_dim", "num_attention_heads", "upcast_attention",
    "resnet_time_scale_shift",
)  # fmt: skip
FROM_BASE_XL = ("addition_embed_type", "addition_time_embed_dim")
HINT_CHANNELS = (16, 32, 96, 256)  # diffusers' default
# No original file says that its residuals are pooled. As ComfyUI does: the shuffle ControlNet is known by its name.
SHUFFLE = re.compile(r"(^|.*[_-])shuffle([_-].*|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ControlSource:
    """A ControlNet that fits a model: its settings, and a loader of its network."""

    name: str
    network: Loader  # ControlNetModel
    provenance: Mapping[str, Any]  # kind, file, sha256 of each weight file
    config: Mapping[str, Any]  # all options of the ControlNetModel


def load_control(
    path: str | Path, base_unet_config: Mapping[str, Any], vae_scale: int, name: str | None = None
) -> ControlSource:
    """Examine a ControlNet against the model that it is to control; read no weights yet.

    path: a diffusers folder, or a .safetensors file in the original or the diffusers layout.
    base_unet_config: diffusers' config of the base model's UNet. vae_scale: pixels per latent of its VAE.
    Raises CheckpointError, here and from the loader.
    """
    path = Path(path)
    with reading(path):
        if not path.exists():
            raise CheckpointError(f"{path} does not exist; give a ControlNet's folder or .safetensors file")
        files, config = _folder(path) if path.is_dir() else ([path], _read_config(path, base_unet_config))
    _check_options(path, config)
    _check_fit(path, config, base_unet_config, vae_scale)
    stored = Stored(path.name, config, partial(_empty, config), files, rename=_renamed)
    options = {key: value for key, value in stored.check().config.items() if not key.startswith("_")}
    return ControlSource(
        name=name or path.resolve().name.removesuffix(".safetensors"),
        network=stored.load,
        provenance={
            "kind": "diffusers" if path.is_dir() else "single-file",
            "file": path.resolve().name,
            "sha256": {file.name: sha256(file) for file in files},
        },
        config=options,
    )


def _folder(path: Path) -> tuple[list[Path], dict[str, Any]]:
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise CheckpointError(f"{path} is {LORA}")
        parts = [folder.name for folder in sorted(path.iterdir()) if (folder / "config.json").is_file()]
        parts = [part for part in parts if read_class(path / part) == "ControlNetModel"]
        if len(parts) > 1:
            raise CheckpointError(f"{path} is {MULTI}: {', '.join(parts)}")
        if parts:
            raise CheckpointError(f"{path} is not a ControlNet's own folder; give {path / parts[0]}")
        if (path / "model_index.json").is_file():
            raise CheckpointError(f"{path} is {BASE}")
        raise CheckpointError(
            f"{path} has no config.json; give a diffusers ControlNet's folder, or a .safetensors file itself"
        )
    refuse_code(path)
    named = read_class(path)
    if named != "ControlNetModel":
        if isinstance(named, str) and named in CLASSES:
            raise CheckpointError(f"{path} is {CLASSES[named]}")
        raise CheckpointError(f"{path} is a {named!r:.80}; supported: ControlNetModel of SD 1, SD 2 and SDXL")
    files = weight_files(path)
    for file in files:
        refuse_other_kinds(file, read_shapes(file))
    return files, read_json(path / "config.json")


def read_class(folder: Path) -> Any:
    return read_json(folder / "config.json").get("_class_name")


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a ControlNet's weights, without its prefix; all weights if none has the prefix."""
    shapes = read_header(path).shapes
    own = {key.removeprefix(PREFIX): shape for key, shape in shapes.items() if key.startswith(PREFIX)}
    return own | {key: shapes[key] for key in shapes if key == "difference"} if own else dict(shapes)


def refuse_other_kinds(path: Path, names: Iterable[str]) -> None:
    """Raises CheckpointError if the weights are known as something else than a ControlNet."""
    for pattern, kind in KINDS:
        if any(re.match(pattern, name) for name in names):
            raise CheckpointError(f"{path} is {kind}")


def _read_config(path: Path, base: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a single file's ControlNet."""
    given = read_shapes(path)
    refuse_other_kinds(path, given)
    if not any(name.startswith(("input_hint_block.", f"{HINT}.")) for name in given):
        raise CheckpointError(f"{path} has no ControlNet weights; expected input_hint_block.* or {HINT}.*")
    try:
        names = diffusers_names(given)
        config = geometry({names[name]: shape for name, shape in given.items()}, base)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or of an unknown layout: weight {error} is missing or odd") from error
    return config | {"global_pool_conditions": bool(SHUFFLE.match(path.stem))}


def geometry(shapes: Shapes, base: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a ControlNetModel, from the shapes of its weights by diffusers' names and the base UNet's config.

    Raises KeyError, IndexError or ValueError where a weight is missing or has another rank.
    """

    def count(prefix: str) -> int:
        """Number of modules that are numbered after the prefix."""
        return len({key.removeprefix(prefix).split(".")[0] for key in shapes if key.startswith(prefix)})

    def depth(block: str) -> int:
        """Transformer blocks of an attention; 0: there is none."""
        return count(f"{block}.attentions.0.transformer_blocks.")

    levels = count("down_blocks.")
    if not levels:
        raise KeyError("down_blocks.0.resnets.0.conv1.weight")
    depths = [depth(f"down_blocks.{level}") for level in range(levels)]
    middle = depth("mid_block")
    cross = [key for key in shapes if key.endswith(".attn2.to_k.weight")]
    projection = [key for key in shapes if key.endswith(".proj_in.weight")]
    convolutions = [f"{HINT}.conv_in.weight"]  # those of the hint encoder that set its channels
    while f"{HINT}.blocks.{2 * len(convolutions) - 1}.weight" in shapes:
        convolutions.append(f"{HINT}.blocks.{2 * len(convolutions) - 1}.weight")
    config = {key: base[key] for key in FROM_BASE if key in base} | {
        "in_channels": shapes["conv_in.weight"][1],
        "conditioning_channels": shapes[convolutions[0]][1],
        "conditioning_embedding_out_channels": [shapes[key][0] for key in convolutions],
        "block_out_channels": [shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(levels)],
        "layers_per_block": count("down_blocks.0.resnets."),
        "down_block_types": ["CrossAttnDownBlock2D" if each else "DownBlock2D" for each in depths],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D",
        # the middle block takes the last level's depth
        "transformer_layers_per_block": [max(each, 1) for each in (*depths[:-1], depths[-1] or middle)],
        "cross_attention_dim": shapes[cross[0]][1] if cross else _option("UNet2DConditionModel", base, "cross_attention_dim"),
        "use_linear_projection": len(shapes[projection[0]]) == 2 if projection else False,
    }  # fmt: skip
    if "add_embedding.linear_1.weight" in shapes:
        config |= {key: base.get(key) for key in FROM_BASE_XL}
        config |= {
            "addition_embed_type": "text_time",
            "projection_class_embeddings_input_dim": shapes["add_embedding.linear_1.weight"][1],
        }
    return config


def _renamed(state: State, network: nn.Module) -> State:
    """Weights by diffusers' names; an original file may hold a base model beside its ControlNet."""
    own = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)} or state
    names = diffusers_names(own)
    return {names[key]: value for key, value in own.items()}


def _empty(config: Mapping[str, Any]) -> Any:
    from diffusers import ControlNetModel

    return empty_network(ControlNetModel, config)


def _option(cls: str, config: Mapping[str, Any], key: str) -> Any:
    """An option as a class of diffusers understands it: its default where the config is silent, tuples for lists."""
    import diffusers

    value = config.get(key, inspect.signature(getattr(diffusers, cls)).parameters[key].default)
    if isinstance(value, list | tuple):
        value = tuple(value)
        if key != "block_out_channels" and len({repr(each) for each in value}) == 1:
            value = value[0]  # one value for all levels
    return value


def _check_options(path: Path, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for options that stepforge does not support."""
    for option in PLAIN:
        if config.get(option):
            raise CheckpointError(f"{path} has {option}={config[option]!r:.80}, which stepforge does not support")
    if (kind := config.get("addition_embed_type")) not in (None, "text_time"):
        raise CheckpointError(f"{path} has addition_embed_type={kind!r:.80}; supported: none (SD), 'text_time' (SDXL)")
    if (order := config.get("controlnet_conditioning_channel_order", "rgb")) not in ("rgb", "bgr"):
        raise CheckpointError(
            f"{path} has controlnet_conditioning_channel_order={order!r:.80}; supported: 'rgb', 'bgr'"
        )
    if not isinstance(pool := config.get("global_pool_conditions", False), bool):
        raise CheckpointError(f"{path} has global_pool_conditions={pool!r:.80}; supported: true, false")
    if (channels := config.get("conditioning_channels", 3)) != 3:
        raise CheckpointError(
            f"{path} takes hints of {channels!r:.80} channels; only RGB hints of 3 channels are supported "
            "(no ControlNets that take a mask or latents besides)"
        )


def _check_fit(path: Path, config: Mapping[str, Any], base: Mapping[str, Any], vae_scale: int) -> None:
    """Raises CheckpointError unless the residuals and inputs of the ControlNet are those of the base model."""
    xl = config.get("addition_embed_type") is not None
    if xl != (base.get("addition_embed_type") is not None):
        kinds = ("for SDXL", "for SD 1 or 2")
        raise CheckpointError(f"{path} is a ControlNet {kinds[not xl]}; the model is not: give one {kinds[xl]}")
    for key, what in FIT.items():
        if key.startswith(("addition", "projection")) and not xl:
            continue
        own, models = _option("ControlNetModel", config, key), _option("UNet2DConditionModel", base, key)
        if own != models:
            of, to = (FAMILIES.get(str(value), "") if key == "cross_attention_dim" else "" for value in (own, models))
            raise CheckpointError(
                f"{path} has {what} {_shown(own)}{of}, the model {_shown(models)}{to}; give a ControlNet for this model"
            )
    channels = config.get("conditioning_embedding_out_channels", HINT_CHANNELS)
    scale = 2 ** (len(channels) - 1) if isinstance(channels, list | tuple) and channels else 0
    if scale != vae_scale:
        raise CheckpointError(
            f"{path} makes one value of {scale}×{scale} pixels of the hint, the model's VAE has {vae_scale}×{vae_scale} "
            "pixels a latent; give a ControlNet for this model"
        )


def _shown(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
