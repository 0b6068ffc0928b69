"""Single-file checkpoints in the original layout (LDM for SD 1 and 2, sgm for SDXL).

The files carry no config: geometry is read from shapes (`ldm_config`), the noise schedule from marks (`marks`), and what
neither shows is assumed, which the source says. diffusers' own converters rename the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from stepforge.export.models.files import reading
from stepforge.export.models.ldm_config import (
    KINDS,
    OPENAI,
    SD1_HEADS,
    UNET,
    VAE,
    deriving,
    family_of,
    sd2_layers,
    text_config,
    text_layer,
    text_prefixes,
    unet_config,
    vae_config,
)
from stepforge.export.models.marks import V, read_marks
from stepforge.export.models.networks import empty_clip, empty_unet, empty_vae
from stepforge.export.models.source import Source
from stepforge.export.models.stored import Stored, check_model
from stepforge.export.models.tokenizer import Pad
from stepforge.export.models.weights import Header, Shapes, State, first_few, opened, read_header
from stepforge.runtime import bundle
from stepforge.runtime.bundle import TEXT_ENCODERS, sha256
from stepforge.runtime.errors import CheckpointError
from stepforge.runtime.files import printable

CONTROL = ("control_model.", "input_hint_block.", "controlnet_cond_embedding.")
EMA = "model_ema."
SIZE = {"sd1": 512, "sd2": 512, "sdxl": 1024}  # pixels, trained
SIZE_V = 768  # SD 2 with v-prediction
PADS: dict[str, Pad] = {kind: "end" if kind == OPENAI else "zero" for kinds in KINDS.values() for kind in kinds}
ENCODER_LAYER = "modelspec.encoder_layer"  # "clip skip" of the training, in metadata


def read_single_file(path: Path, tokenizer: Path | None, prediction_type: str | None) -> Source:
    """Examine the file's names, types and shapes; weights are read by the loaders. Raises CheckpointError."""
    header = read_header(path)
    shapes = header.shapes
    check_kind(path, shapes)
    with deriving(path):
        family = family_of(path, shapes)
        prefixes = text_prefixes(path, shapes, family)
    if tokenizer is None:
        raise CheckpointError(
            f"{path} carries no tokenizer, as all single files; pass --tokenizer DIR, a folder with vocab.json and "
            "merges.txt (the tokenizer folder of any diffusers model of the same family)"
        )
    with reading(tokenizer):
        if not tokenizer.is_dir():
            raise CheckpointError(f"tokenizer {tokenizer} is not a folder; it must hold vocab.json and merges.txt")
    scheduler, assumed = read_marks(path, header, family, prediction_type, partial(_scalar, path, header))
    with deriving(path):
        vae = vae_config(shapes, family)
        texts = [text_config(shapes, prefix, kind) for prefix, kind in zip(prefixes, KINDS[family], strict=True)]
        if family == "sd2":
            texts[0]["num_hidden_layers"] = sd2_layers(texts[0]["num_hidden_layers"], prefixes[0])
        unet = unet_config(shapes, family, texts[-1]["projection_dim"])
    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    pixels = SIZE_V if family == "sd2" and scheduler["prediction_type"] == V else SIZE[family]
    unet["sample_size"] = max(1, pixels // scale)
    encoder = any(name.startswith(f"{VAE}encoder.") for name in shapes)
    assumed += _assumed(header, family, texts, unet, vae, pixels, encoder=encoder)

    stored_unet = Stored(
        f"{path.name}: unet", unet, partial(empty_unet, unet), [path], UNET, partial(_rename_unet, unet)
    )
    stored_vae = Stored(
        f"{path.name}: vae",
        vae,
        partial(empty_vae, vae, encoder=encoder),
        [path],
        VAE,
        partial(_rename_vae, vae, encoder),
    )
    stored_texts = [
        Stored(
            f"{path.name}: {key.name}",
            config,
            partial(empty_clip, config, projection=index == 1),
            [path],
            prefix,
            partial(_rename_text, prefix, config),
        )
        for index, (key, prefix, config) in enumerate(zip(TEXT_ENCODERS, prefixes, texts, strict=False))
    ]
    pads = tuple(PADS[kind] for kind in KINDS[family])
    tokenizers = (tokenizer,) * len(texts)
    corrected = check_model(stored_unet, stored_vae, stored_texts, tokenizers, pads)
    return Source(
        name=path.name.removesuffix(".safetensors"),
        family=family,
        unet=stored_unet.load,
        vae=stored_vae.load,
        text_encoders=tuple(stored.load for stored in stored_texts),
        tokenizers=tokenizers,
        pads=pads,
        scheduler=scheduler,
        provenance={"kind": "single-file", "file": path.name, "sha256": {path.name: sha256(path)}},
        empty={
            bundle.UNET: stored_unet.build,
            **{key: stored.build for key, stored in zip(TEXT_ENCODERS, stored_texts, strict=False)},
        },
        vae_scale=scale,
        force_zeros_for_empty_prompt=family == "sdxl",
        assumed=tuple(assumed),
        corrected=tuple(corrected),
    )


def check_kind(path: Path, shapes: Shapes) -> None:
    """Raises CheckpointError for what is known as something else than a checkpoint of a text-to-image model."""
    if any(".lora_" in key or key.startswith(("lora_", "base_model.model.")) or ".hada_" in key for key in shapes):
        raise CheckpointError(
            f"{path} is a LoRA adapter, not a model; export its base model and add the adapter to that"
        )
    if any(key.startswith(CONTROL) for key in shapes):
        raise CheckpointError(
            f"{path} is a ControlNet; export its base model and give this file with --control NAME=FILE"
        )
    if not any(key.startswith(UNET) for key in shapes):
        if any(key.startswith(EMA) for key in shapes):
            raise CheckpointError(
                f"{path} has a UNet only as averaged weights ({EMA}*), whose names cannot be read back; save them as {UNET}*"
            )
        raise CheckpointError(f"{path} has no {UNET}* weights; expected an SD 1, SD 2 or SDXL checkpoint, or a folder")
    if "edm_mean" in shapes:
        raise CheckpointError(f"{path} is a Playground checkpoint; supported: SD 1, SD 2 and SDXL models")
    if not any(key.startswith(VAE) for key in shapes):
        raise CheckpointError(f"{path} has no {VAE}* weights: it lacks the component vae")


def _scalar(path: Path, header: Header, name: str) -> float | None:
    """A weight that is one finite number."""
    if header.shapes.get(name) not in ((), (1,)):
        return None
    with opened(path) as file:
        value = float(file.get_tensor(name))
    return value if math.isfinite(value) else None


def _assumed(
    header: Header,
    family: str,
    texts: list[dict[str, Any]],
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    pixels: int,
    *,
    encoder: bool,
) -> list[str]:
    """What a single file does not carry and its networks need, a line each."""
    heads = f"{SD1_HEADS} at every level" if family == "sd1" else f"{unet['attention_head_dim']} by level"
    lines = [f"unet attention heads: {heads}, as {family}'s; shapes do not show them"]
    for key, kind, config in zip(TEXT_ENCODERS, KINDS[family], texts, strict=False):
        lines.append(
            f"{key.name}: activation {config['hidden_act']}, {config['num_attention_heads']} attention heads, "
            f"{config['num_hidden_layers']} layers, as {kind} in {family}; shapes do not show them"
        )
    lines += [
        f"vae scaling_factor: {vae['scaling_factor']}, as {family}'s; shapes do not show it",
        f"size: {pixels}x{pixels} pixels, as {family} was trained with",
        f"clip skip: none, as diffusers{_skip(header)}",
    ]
    if family == "sdxl":
        lines.append("force_zeros_for_empty_prompt: true, as SDXL's base model")
    if any(key.startswith(EMA) for key in header.shapes):
        lines.append(f"unet weights: {UNET}*, as diffusers, not the averaged ones in {EMA}*")
    if not encoder:
        lines.append("vae: only its decoder, because the file has no encoder")
    return lines


def _skip(header: Header) -> str:
    layer = header.metadata.get(ENCODER_LAYER)
    return f"; the file's {ENCODER_LAYER}={printable(layer, 20)} is not followed" if layer else ""


def _rename_unet(config: Mapping[str, Any], state: State, network: nn.Module) -> State:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    renamed: State = convert_ldm_unet_checkpoint(state, config)
    taken = {id(value) for value in renamed.values()}
    if unknown := sorted(name for name, value in state.items() if id(value) not in taken):
        raise CheckpointError(f"unexpected weights in the UNet: {first_few([printable(name, 80) for name in unknown])}")
    return renamed


def _rename_vae(config: Mapping[str, Any], encoder: bool, state: State, network: nn.Module) -> State:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    unread = (f"{VAE}loss.",) if encoder else (f"{VAE}loss.", f"{VAE}quant_conv.")
    own = {key: value for key, value in state.items() if not key.startswith(unread)}
    renamed: State = convert_ldm_vae_checkpoint(own, config)
    return renamed


def _rename_text(prefix: str, config: Mapping[str, Any], state: State, network: nn.Module) -> State:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    state = {key: value for key, value in state.items() if text_layer(key, prefix) < config["num_hidden_layers"]}
    if prefix.endswith(".transformer."):
        return {key.removeprefix(prefix): value for key, value in state.items()}
    renamed: State = convert_open_clip_checkpoint(network, state, prefix=prefix)
    return renamed
