"""Single-file checkpoints in the original layout (LDM for SD 1 and 2, sgm for SDXL).

The files carry no config, so geometry is read from the shapes of the weights. What shapes do not show (attention heads,
activations, the noise schedule) is fixed by the family. diffusers' own converters rename the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stepforge.export.models.networks import empty_clip, empty_unet, empty_vae
from stepforge.export.models.source import Source
from stepforge.export.models.weights import Loader, Shapes, fill, opened, read_weights, shapes_of
from stepforge.runtime import bundle
from stepforge.runtime.bundle import TEXT_ENCODERS, sha256
from stepforge.runtime.errors import CheckpointError

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CONTROL = ("control_model.", "input_hint_block.", "controlnet_cond_embedding.")
SD1_TEXT = "cond_stage_model.transformer."
SD2_TEXT = "cond_stage_model.model."
XL_TEXT = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")

HEAD = 64  # channels of one attention head: SD 2 and SDXL UNets, and every CLIP text encoder
SD1_HEADS = 8
SIZE = {"sd1": 512, "sd2": 512, "sdxl": 1024}  # pixels, trained
SIZE_V = 768  # SD 2 with v-prediction
SCALING = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
SD2_BASE_STEP = 875000  # global_step of the epsilon checkpoints of SD 2.0, the only mark they carry
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SCHEDULERS: dict[str, dict[str, Any]] = {  # what the model cards of the three families name
    "sd1": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False},
    "sd2": {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False},
    "sdxl": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
}


def read_single_file(path: Path, tokenizer: Path | None, prediction_type: str | None) -> Source:
    """Examine the file's names and shapes; weights are read by the loaders. Raises CheckpointError."""
    with opened(path) as file:
        metadata = file.metadata() or {}
        shapes = shapes_of(file)
        step = int(file.get_tensor("global_step")) if "global_step" in shapes else None
    family = detect(path, shapes)
    if tokenizer is None:
        raise CheckpointError(
            f"{path} carries no tokenizer, as all single files; pass --tokenizer DIR, a folder with vocab.json and "
            "merges.txt (the tokenizer folder of any diffusers model of the same family)"
        )
    if not tokenizer.is_dir():
        raise CheckpointError(f"tokenizer {tokenizer} is not a folder; it must hold vocab.json and merges.txt")
    prediction = prediction_type or _prediction(family, shapes, metadata, step)
    vae = vae_config(shapes, family)
    pixels = SIZE_V if family == "sd2" and prediction == "v_prediction" else SIZE[family]
    texts = [_text(shapes, prefix) for prefix in _text_prefixes(family)]
    pooled = texts[-1]["projection_dim"]
    unet = unet_config(shapes, family, pooled) | {"sample_size": pixels // 2 ** (len(vae["block_out_channels"]) - 1)}
    return Source(
        name=path.name.removesuffix(".safetensors"),
        family=family,
        unet=_unet_loader(path, unet),
        vae=_vae_loader(path, vae),
        text_encoders=tuple(
            _text_loader(path, prefix, config, index)
            for index, (prefix, config) in enumerate(zip(_text_prefixes(family), texts, strict=True))
        ),
        tokenizers=(tokenizer,) * len(texts),
        scheduler=SCHEDULERS[family]
        | BETAS
        | {"prediction_type": prediction}
        | ({"rescale_betas_zero_snr": True} if "ztsnr" in shapes and family == "sdxl" else {}),
        provenance={"kind": "single-file", "file": path.name, "sha256": {path.name: sha256(path)}},
        empty={
            bundle.UNET: lambda: empty_unet(unet),
            **{
                key: partial(empty_clip, config, projection=index == 1)
                for index, (key, config) in enumerate(zip(TEXT_ENCODERS, texts, strict=False))
            },
        },
        vae_scale=2 ** (len(vae["block_out_channels"]) - 1),
        force_zeros_for_empty_prompt=family == "sdxl",
    )


def detect(path: Path, shapes: Shapes) -> str:
    """The family of a checkpoint. Raises CheckpointError for anything that is not SD 1, SD 2 or SDXL text-to-image."""
    if any(".lora_" in key or key.startswith(("lora_", "base_model.model.")) or ".hada_" in key for key in shapes):
        raise CheckpointError(
            f"{path} is a LoRA adapter, not a model; export its base model and add the adapter to that"
        )
    if any(key.startswith(CONTROL) for key in shapes):
        raise CheckpointError(
            f"{path} is a ControlNet; export its base model and give this file with --control NAME=FILE"
        )
    if not any(key.startswith(UNET) for key in shapes):
        raise CheckpointError(f"{path} has no {UNET}* weights; expected an SD 1, SD 2 or SDXL checkpoint, or a folder")
    if "edm_mean" in shapes:
        raise CheckpointError(f"{path} is a Playground checkpoint; supported: SD 1, SD 2 and SDXL models")
    for family in ("sdxl", "sd2", "sd1"):
        if all(any(key.startswith(prefix) for key in shapes) for prefix in _text_prefixes(family)):
            break
    else:
        raise CheckpointError(f"{path} has no text encoder of SD 1, SD 2 or SDXL (the SDXL refiner is not supported)")
    if not any(key.startswith(VAE) for key in shapes):
        raise CheckpointError(f"{path} has no {VAE}* weights: it lacks the component vae")
    return family


def _text_prefixes(family: str) -> tuple[str, ...]:
    return {"sd1": (SD1_TEXT,), "sd2": (SD2_TEXT,), "sdxl": XL_TEXT}[family]


def _prediction(family: str, shapes: Shapes, metadata: Mapping[str, str], step: int | None) -> str:
    said = metadata.get("modelspec.prediction_type", "")
    if "v_pred" in shapes or said.startswith("v"):
        return "v_prediction"
    if family == "sd2" and not said and step != SD2_BASE_STEP:
        return "v_prediction"  # diffusers' rule; SD 2 base without a mark needs prediction_type="epsilon"
    return "epsilon"


def unet_config(shapes: Shapes, family: str, pooled: int) -> dict[str, Any]:
    """The diffusers config of an original UNet, from its shapes. pooled: width of SDXL's pooled text."""
    own = {key.removeprefix(UNET): shape for key, shape in shapes.items() if key.startswith(UNET)}
    depth = re.compile(r"(input_blocks\.\d+|middle_block)\.1\.transformer_blocks\.(\d+)\.norm1\.weight")
    depths: dict[str, int] = {}
    for key in own:
        if found := depth.fullmatch(key):
            depths[found[1]] = max(depths.get(found[1], 0), int(found[2]) + 1)
    channels: list[int] = []
    layers: list[int] = []  # transformer blocks of each level's attentions; 0: none
    resnets, new_level = [], True
    for block in range(1, 1 + max(int(key.split(".")[1]) for key in own if key.startswith("input_blocks."))):
        name = f"input_blocks.{block}"
        if f"{name}.0.op.weight" in own:
            new_level = True
            continue
        if f"{name}.0.out_layers.3.weight" not in own:
            raise CheckpointError(f"the checkpoint lacks {UNET}{name}.0.out_layers.3.weight")
        if new_level:
            channels.append(own[f"{name}.0.out_layers.3.weight"][0])
            layers.append(depths.get(name, 0))
            resnets.append(0)
        new_level = False
        resnets[-1] += 1
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in layers]
    # the middle block takes the last level's depth
    layers[-1] = layers[-1] or depths.get("middle_block", 1)
    cross = _shape(own, ".attn2.to_k.weight")
    config: dict[str, Any] = {
        "in_channels": own["input_blocks.0.0.weight"][1],
        "out_channels": own["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": resnets[0],
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "transformer_layers_per_block": [max(depth, 1) for depth in layers],
        "cross_attention_dim": cross[1],
        "attention_head_dim": SD1_HEADS if family == "sd1" else [max(1, width // HEAD) for width in channels],
        "use_linear_projection": len(_shape(own, ".1.proj_in.weight")) == 2,
    }
    if family == "sdxl":
        embedded = _shape(own, "label_emb.0.0.weight")[1]
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (embedded - pooled) // 6,  # six numbers: original size, crop, target size
            "projection_class_embeddings_input_dim": embedded,
        }
    elif "label_emb.0.0.weight" in own:
        raise CheckpointError("the checkpoint's UNet has label_emb, an unCLIP or upscaler model; it is not supported")
    return config


def vae_config(shapes: Shapes, family: str) -> dict[str, Any]:
    own = {key.removeprefix(VAE): shape for key, shape in shapes.items() if key.startswith(VAE)}
    levels = 1 + max(int(key.split(".")[2]) for key in own if key.startswith("encoder.down."))
    return {
        "block_out_channels": [_shape(own, f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)],
        "layers_per_block": len({key.split(".")[4] for key in own if key.startswith("encoder.down.0.block.")}),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": _shape(own, "decoder.conv_in.weight")[1],
        "scaling_factor": SCALING[family],
    }


def _text(shapes: Shapes, prefix: str) -> dict[str, Any]:
    """The config of one text encoder: OpenAI's CLIP under `transformer.`, OpenCLIP under `model.`"""
    own = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    clip = prefix.endswith("transformer.")
    vocabulary, width = _shape(own, "token_embedding.weight")
    layer = re.compile(r".*(?:layers|resblocks)\.(\d+)\..*")
    layers = 1 + max((int(found[1]) for key in own if (found := layer.match(key))), default=-1)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _shape(own, "mlp.fc1.weight" if clip else "mlp.c_fc.weight")[0],
        # SD 2 reads the last layer but one, through the final norm: its last layer is left out
        "num_hidden_layers": layers - (prefix == SD2_TEXT),
        "num_attention_heads": max(1, width // HEAD),
        "max_position_embeddings": _shape(own, "position_embedding.weight" if clip else "positional_embedding")[0],
        "hidden_act": "quick_gelu" if clip else "gelu",
        "projection_dim": own.get("text_projection", (width, width))[1],
        "eos_token_id": 2,  # transformers' sign for: the end token is the one with the highest id
    }


def _shape(shapes: Shapes, ending: str) -> tuple[int, ...]:
    for key, shape in shapes.items():
        if key.endswith(ending):
            return shape
    raise CheckpointError(f"the checkpoint has no weight named *{ending}; it is damaged or of another layout")


def _unet_loader(path: Path, config: Mapping[str, Any]) -> Loader:
    def load(dtype: torch.dtype) -> Any:
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

        state = convert_ldm_unet_checkpoint(read_weights([path], dtype, UNET), config)
        return fill(empty_unet(config), state, dtype, f"{path.name}: unet")

    return load


def _vae_loader(path: Path, config: Mapping[str, Any]) -> Loader:
    def load(dtype: torch.dtype) -> Any:
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        own = read_weights([path], dtype, VAE)
        own = {key: value for key, value in own.items() if not key.startswith(f"{VAE}loss.")}
        state = convert_ldm_vae_checkpoint(own, config)
        return fill(empty_vae(config), state, dtype, f"{path.name}: vae")

    return load


def _text_loader(path: Path, prefix: str, config: Mapping[str, Any], index: int) -> Loader:
    def load(dtype: torch.dtype) -> Any:
        from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

        state = read_weights([path], dtype, prefix)
        model = empty_clip(config, projection=index == 1)
        if prefix.endswith("transformer."):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
        else:
            # the converter ignores the unused last layer of SD 2 by its number, 23; ours may have another
            unused = f"{prefix}transformer.resblocks.{config['num_hidden_layers']}."
            state = {key: value for key, value in state.items() if not key.startswith(unused)}
            state = convert_open_clip_checkpoint(model, state, prefix=prefix)
        return fill(model, state, dtype, f"{path.name}: text_encoder{'_2' * index}")

    return load
