"""Models as single files in the original layout."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def to_original() -> Callable[..., Path]:
    return original


def original(
    model: Path,
    out: Path,
    metadata: dict[str, str] | None = None,
    *,
    spelling: str = "",
    unused: bool = True,
    **extra: torch.Tensor,
) -> Path:
    """A diffusers folder in the original layout: the inverse of diffusers' converters, written from the layout's rules.

    spelling: of SD 1's and SD 2's text encoder, "transformers" or "openclip", by default the family's own. unused: whether
    SD 2's has one more layer.
    """
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

    xl = (model / "text_encoder_2").is_dir()
    ATTENTION.clear()
    if xl:
        ATTENTION.add(("up", "0"))
    state = dict(extra)
    fixed = DIFFUSERS_TO_LDM_MAPPING["unet"]
    top = fixed["layers"] | (fixed["addition_embed_type"] if xl else {})
    for key, value in load_file(model / UNET).items():
        state["model.diffusion_model." + (top[key] if key in top else original_unet(key))] = value
    for key, value in load_file(model / "vae/diffusion_pytorch_model.safetensors").items():
        name, value = original_vae(key, value)
        state[f"first_stage_model.{name}"] = value
    linear = json.loads((model / "unet/config.json").read_text())["use_linear_projection"]
    clip = {
        key.removeprefix("text_model."): value
        for key, value in load_file(model / "text_encoder/model.safetensors").items()
    }
    if xl:
        state |= {f"conditioner.embedders.0.transformer.text_model.{key}": value for key, value in clip.items()}
        state |= open_clip(load_file(model / "text_encoder_2/model.safetensors"), "conditioner.embedders.1.model.")
    else:
        if linear and unused:  # the last layer, which SD 2 does not use
            last = max(int(found[1]) for key in clip if (found := re.match(r"encoder\.layers\.(\d+)", key)))
            one, more = f"encoder.layers.{last}.", f"encoder.layers.{last + 1}."
            clip |= {key.replace(one, more): -value for key, value in clip.items() if key.startswith(one)}
        if (spelling or ("openclip" if linear else "transformers")) == "openclip":
            state |= open_clip(clip, "cond_stage_model.model.")
        else:
            state |= {f"cond_stage_model.transformer.text_model.{key}": value for key, value in clip.items()}
    save_file({key: value.contiguous().clone() for key, value in state.items()}, out, metadata)
    return out


RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip


def original_unet(key: str) -> str:
    """For one layer per block: inputs are conv, [resnet, downsample], [resnet]; outputs are two resnets a level."""
    side, *rest = key.split(".")
    if side == "mid_block":
        kind, index, *tail = rest
        return f"middle_block.{'1' if kind == 'attentions' else int(index) * 2}.{inner(kind, tail)}"
    block, kind, index, *tail = rest
    if side == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{int(block) * 2 + 2}.0.op.{tail[-1]}"
        return f"input_blocks.{int(block) * 2 + 1}.{int(kind == 'attentions')}.{inner(kind, tail)}"
    if kind == "upsamplers":
        place = 2 if ("up", block) in ATTENTION else 1
        return f"output_blocks.{int(block) * 2 + 1}.{place}.conv.{tail[-1]}"
    if kind == "attentions":
        return f"output_blocks.{int(block) * 2 + int(index)}.1.{'.'.join(tail)}"
    return f"output_blocks.{int(block) * 2 + int(index)}.0.{inner(kind, tail)}"


ATTENTION: set[tuple[str, str]] = set()  # levels of the decoder with attention before their upsampler


def inner(kind: str, tail: list[str]) -> str:
    return ".".join([RESNET.get(tail[0], tail[0]) if kind == "resnets" else tail[0], *tail[1:]])


def original_vae(key: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
    key = key.replace("conv_norm_out", "norm_out").replace("mid_block.resnets.0", "mid.block_1")
    key = key.replace("mid_block.resnets.1", "mid.block_2").replace("mid_block.attentions.0", "mid.attn_1")
    key = key.replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{1 - int(m[1])}.block.{m[2]}", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{1 - int(m[1])}.upsample", key)
    if "attn_1" in key:
        for new, old in {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}.items():
            key = key.replace(new, old)
        if value.ndim == 2:
            value = value[:, :, None, None]
    return key, value


def open_clip(clip: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    state = {}
    clip = {key.removeprefix("text_model."): value for key, value in clip.items()}
    names = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    layer = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
    for key, value in clip.items():
        if key in names:
            state[prefix + names[key]] = value
        elif key == "text_projection.weight":
            state[f"{prefix}text_projection"] = value.T
        elif ".q_proj." in key:
            parts = [clip[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            index, leaf = key.split(".")[2], key.split(".")[-1]
            state[f"{prefix}transformer.resblocks.{index}.attn.in_proj_{leaf}"] = torch.cat(parts)
        elif ".k_proj." not in key and ".v_proj." not in key:
            name = key.replace("encoder.layers.", "transformer.resblocks.")
            for new, old in layer.items():
                name = name.replace(new, old)
            state[prefix + name] = value
    return state
