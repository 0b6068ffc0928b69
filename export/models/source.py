"""A model on disk to networks in memory: what stepforge reads, and every reason to refuse a model.

Nothing that a model says is ever run or imported: class names are looked up in the tables below, configs are filtered,
weights are safetensors only. Networks are loaded one at a time, when their loader is called.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open

from stepforge.export.models.scheduler import scheduler_card
from stepforge.runtime.bundle import NAME, UNET, ComponentId, sha256
from stepforge.runtime.errors import BundleError, CheckpointError

Loader = Callable[[torch.dtype], Any]  # dtype of the weights -> network on the CPU, in eval mode
State = dict[str, torch.Tensor]

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
# The classes that each component of a pipeline may have.
COMPONENTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")  # never opened
STORED_AS = {torch.float32: "F32", torch.float16: "F16"}  # safetensors' names
FLOATS = ("F64", "F32", "F16", "BF16")  # F8 is refused: it would need its scales
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
ONLY_SAFETENSORS = "only .safetensors weights are read, because pickle files can run code"
# Options of a UNet that would need further graph inputs or another layout of the conditioning.
PLAIN_UNET = (
    "class_embed_type",
    "num_class_embeds",
    "time_cond_proj_dim",
    "encoder_hid_dim_type",
    "class_embeddings_concat",
)
CLIP_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.17


@dataclass(frozen=True, slots=True)
class Source:
    """A text-to-image model: its settings, and one loader for each network so that they need not be resident together."""

    name: str
    family: str  # "sd1", "sd2", "sdxl"
    unet: Loader  # UNet2DConditionModel
    vae: Loader  # AutoencoderKL
    text_encoders: tuple[Loader, ...]  # CLIPTextModel, or for SDXL CLIPTextModel and CLIPTextModelWithProjection
    tokenizers: tuple[Path, ...]  # folders, one for each text encoder
    scheduler: Mapping[str, Any]  # scheduler_config.json, with _class_name
    provenance: Mapping[str, Any]  # kind, file, sha256 of each weight file
    empty: Mapping[ComponentId, Callable[[], Any]]  # networks that a LoRA may change, without weights
    vae_scale: int  # pixels per latent
    force_zeros_for_empty_prompt: bool = False

    @property
    def adaptable(self) -> dict[ComponentId, Loader]:
        """The loaders of the networks in `empty`."""
        return dict(zip(self.empty, (self.unet, *self.text_encoders), strict=True))


def load(path: str | Path, *, tokenizer: str | Path | None = None, prediction_type: str | None = None) -> Source:
    """Examine a diffusers folder or an original single-file checkpoint; read no weights yet.

    tokenizer: folder with vocab.json and merges.txt, for single files, which do not carry it.
    prediction_type: overrides what the model says, for single files that do not say it (SD 2: epsilon, v_prediction).
    Raises CheckpointError, here and from the loaders.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a diffusers folder or a .safetensors checkpoint")
    if path.is_dir():
        source = _folder(path, prediction_type)
    else:
        from stepforge.export.models.single_file import read_single_file

        source = read_single_file(path, None if tokenizer is None else Path(tokenizer), prediction_type)
    try:
        scheduler_card(source.scheduler)
    except BundleError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return source


def _folder(path: Path, prediction_type: str | None) -> Source:
    if not (path / "model_index.json").is_file():
        hint = " (a LoRA adapter, not a model)" if (path / "adapter_config.json").is_file() else ""
        raise CheckpointError(f"{path} is not a diffusers pipeline{hint}: it has no model_index.json")
    if code := sorted(file.relative_to(path).as_posix() for file in path.rglob("*.py")):
        raise CheckpointError(f"{path} contains code ({code[0]}); models with code of their own are refused")
    index = read_json(path / "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise CheckpointError(f"{path} is a {pipeline!r}; supported pipelines: {', '.join(PIPELINES)}")
    xl = pipeline == "StableDiffusionXLPipeline"
    _check_index(path, index)
    texts = ("text_encoder", "text_encoder_2") if xl else ("text_encoder",)
    tokenizers = tuple(path / name.replace("text_encoder", "tokenizer") for name in texts)
    for folder in (path / "unet", path / "vae", path / "scheduler", *(path / name for name in texts), *tokenizers):
        if not folder.is_dir():
            raise CheckpointError(f"{path} lacks the component {folder.name}")
    files = {name: weight_files(path / name) for name in ("unet", "vae", *texts)}
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    if prediction_type is not None:
        scheduler["prediction_type"] = prediction_type
    unet_config = read_json(path / "unet" / "config.json")

    def loader(name: str, build: Callable[[], Any]) -> Loader:
        return lambda dtype: fill(build(), read_weights(files[name], dtype), dtype, f"{path.name}/{name}")

    encoders = {name: partial(_empty_text, read_json(path / name / "config.json"), name) for name in texts}
    vae_config = read_json(path / "vae" / "config.json")
    return Source(
        name=path.resolve().name,
        family="sdxl" if xl else "sd2" if unet_config.get("use_linear_projection") else "sd1",
        unet=loader("unet", lambda: empty_unet(unet_config)),
        vae=loader("vae", lambda: empty_vae(vae_config)),
        text_encoders=tuple(loader(name, build) for name, build in encoders.items()),
        tokenizers=tokenizers,
        scheduler=scheduler,
        provenance={
            "kind": "diffusers",
            "file": path.resolve().name,
            "sha256": {f.relative_to(path).as_posix(): sha256(f) for name in sorted(files) for f in files[name]},
        },
        empty={
            UNET: lambda: empty_unet(unet_config),
            **{ComponentId("text_encoder", name): build for name, build in encoders.items()},
        },
        vae_scale=2 ** (len(vae_config.get("block_out_channels", (64,))) - 1),
        # the pipeline class's default, where an SDXL model does not say
        force_zeros_for_empty_prompt=xl and bool(index.get("force_zeros_for_empty_prompt", True)),
    )


def _empty_text(config: Mapping[str, Any], name: str) -> Any:
    return empty_clip(config, projection=name == "text_encoder_2")


def _check_index(path: Path, index: Mapping[str, Any]) -> None:
    """Every entry of model_index.json is a component we know, of a class that we know."""
    for name, entry in index.items():
        if not isinstance(entry, list) or name in NOT_NEEDED or entry == [None, None]:
            continue
        if name == "scheduler":
            continue  # its class is judged with its options, by SchedulerCard
        if name not in COMPONENTS:
            raise CheckpointError(f"{path} has the unknown component {name!r}; known: {', '.join(COMPONENTS)}")
        if entry[-1] not in COMPONENTS[name]:
            raise CheckpointError(f"{path}: {name} is a {entry[-1]!r}; supported: {', '.join(COMPONENTS[name])}")


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} lacks {path.name}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return data


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one component: whole, fp16 variant, or the shards that an index names."""
    stems = ("diffusion_pytorch_model", "model")
    for stem in stems:
        for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
            if (folder / name).is_file():
                return [folder / name]
        for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors.index.fp16.json"):
            if (folder / name).is_file():
                shards = sorted(set(read_json(folder / name).get("weight_map", {}).values()))
                for shard in shards:
                    if not NAME.fullmatch(shard) or not (folder / shard).is_file():
                        raise CheckpointError(f"{folder / name} names the shard {shard!r}, which is not in its folder")
                return [folder / shard for shard in shards]
    if pickled := [file.name for file in sorted(folder.iterdir()) if file.suffix in PICKLES]:
        raise CheckpointError(f"{folder} has {pickled[0]} but no safetensors file; {ONLY_SAFETENSORS}")
    raise CheckpointError(f"{folder} has no weights; expected {stems[0]}.safetensors or {stems[1]}.safetensors")


def check_safetensors(path: Path) -> None:
    """Refuse pickle by its first bytes, whatever the file is called."""
    with path.open("rb") as file:
        magic = file.read(9)
    # safetensors begins with the length of its header in eight bytes, then {: any first byte is possible, 0x80 and PK as well
    header = magic[8:] == b"{" and int.from_bytes(magic[:8], "little") < path.stat().st_size
    pickled = not header and (magic[:2] == b"PK" or magic[:1] == b"\x80")
    if pickled or path.suffix in PICKLES:
        raise CheckpointError(f"{path} is a pickle file; {ONLY_SAFETENSORS}")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is not a .safetensors file; {ONLY_SAFETENSORS}")


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file; its tensors are views of the mapped file until they are changed."""
    check_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a valid safetensors file: {error}") from error


def read_weights(files: list[Path], dtype: torch.dtype, prefix: str = "") -> State:
    """The weights under a prefix, in `dtype`; those that are so in the file stay views of it.

    The file is mapped anew for each weight to convert: what was read through a mapping stays resident until it ends, and
    would hold the whole file beside its copy.
    """
    state: State = {}
    for path in files:
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if not name.startswith(prefix):
                    continue
                kind = file.get_slice(name).get_dtype()
                if kind == STORED_AS[dtype] or kind not in FLOATS:
                    state[name] = file.get_tensor(name)
                else:
                    with opened(path) as again:
                        state[name] = again.get_tensor(name).to(dtype)
    return state


def known_options(cls: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the class's constructor names; private ones, which can select code, are never among them."""
    return {key: config[key] for key in inspect.signature(cls).parameters if key in config and not key.startswith("_")}


def empty_network(cls: type, config: Mapping[str, Any]) -> Any:
    """A network without memory for its weights; its buffers are real."""
    named = config.get("_class_name", cls.__name__)
    if named != cls.__name__:
        raise CheckpointError(f"the config is of class {named!r}; expected {cls.__name__}")
    try:
        with init_empty_weights(include_buffers=False):
            return cls(**known_options(cls, config))
    except Exception as error:  # diffusers raises whatever a bad value runs into
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{cls.__name__} cannot be built from its config: {reason}") from error


def empty_unet(config: Mapping[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    for option in PLAIN_UNET:
        if config.get(option):
            raise CheckpointError(f"the UNet has {option}={config[option]!r}, which stepforge does not support")
    if (kind := config.get("addition_embed_type")) not in (None, "text_time"):
        raise CheckpointError(f"the UNet has addition_embed_type={kind!r}; supported: none (SD), 'text_time' (SDXL)")
    if config.get("in_channels", 4) != config.get("out_channels", 4):
        raise CheckpointError(
            f"the UNet has {config['in_channels']} input channels; only text-to-image models, whose input and output "
            "have equal channels, are supported (not inpainting)"
        )
    return empty_network(UNet2DConditionModel, config)


def empty_vae(config: Mapping[str, Any]) -> Any:
    from diffusers import AutoencoderKL

    for option in ("latents_mean", "latents_std", "shift_factor"):
        if config.get(option):
            raise CheckpointError(f"the VAE has {option}, which stepforge does not support")
    return empty_network(AutoencoderKL, config)


def empty_clip(config: Mapping[str, Any], *, projection: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if (kind := config.get("model_type", "clip_text_model")) != "clip_text_model":
        raise CheckpointError(f"the text encoder is a {kind!r}; supported: clip_text_model")
    if config.get("use_attention_mask"):
        raise CheckpointError("the text encoder has use_attention_mask, which stepforge does not support")
    values = {key: config[key] for key in CLIP_KEYS if config.get(key) is not None}
    cls = CLIPTextModelWithProjection if projection else CLIPTextModel
    try:
        with init_empty_weights(include_buffers=False):
            return cls(CLIPTextConfig(**values, attn_implementation="sdpa"))
    except Exception as error:
        raise CheckpointError(f"{cls.__name__} cannot be built from its config: {error}") from error


def fill(model: Any, state: State, dtype: torch.dtype, what: str) -> Any:
    """Give an empty network its weights. Raises CheckpointError unless names and shapes are exactly the network's."""
    wanted = {_plain(key): (key, value.shape) for key, value in model.state_dict().items()}
    given = {_plain(key): value for key, value in state.items() if not key.endswith("position_ids")}
    if missing := sorted(wanted.keys() - given.keys()):
        raise CheckpointError(f"{what} lacks {_few(missing)}")
    # a text encoder without projection may have been saved with one
    if unknown := sorted(given.keys() - wanted.keys() - {"text_projection.weight", "logit_scale"}):
        raise CheckpointError(f"{what} has unexpected weights: {_few(unknown)}")
    if wrong := [
        f"{k} {list(given[k].shape)} instead of {list(s)}" for k, (_, s) in wanted.items() if given[k].shape != s
    ]:
        raise CheckpointError(f"{what} has weights of the wrong shape: {_few(wrong)}")
    cast = {}
    for name, (key, _) in wanted.items():
        cast[key] = given.pop(name).to(dtype)
        if not torch.isfinite(cast[key]).all():
            raise CheckpointError(f"{what}: {name} holds NaN or infinity{' in fp16' * (dtype == torch.float16)}")
    model.load_state_dict(cast, assign=True)
    return model.eval().requires_grad_(False)


def _plain(key: str) -> str:
    """One name for the layouts that libraries have written over the years."""
    key = key.removeprefix("text_model.")  # transformers 5.6 dropped the prefix from CLIPTextModel
    module, _, leaf = key.rpartition(".")
    head, _, last = module.rpartition(".")
    if "mid_block.attentions" in head and last in OLD_VAE_ATTENTION:
        return f"{head}.{OLD_VAE_ATTENTION[last]}.{leaf}"
    return key


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
