"""Geometry of an original checkpoint, from the shapes of its weights: diffusers' configs of its networks.

What shapes do not show (attention heads, activations) is fixed by the family, which the UNet tells.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stepforge.export.models.weights import Shapes, first_line
from stepforge.runtime.errors import CheckpointError
from stepforge.runtime.files import printable

UNET = "model.diffusion_model."
VAE = "first_stage_model."
# Where the text encoders of a family may stand: the spelling of the keys says only whose layout it is. diffusers' order.
TEXTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sd1": (("cond_stage_model.transformer.", "cond_stage_model.model."),),
    "sd2": (("cond_stage_model.transformer.", "cond_stage_model.model.", "conditioner.embedders.0.model."),),
    "sdxl": (("conditioner.embedders.0.transformer.",), ("conditioner.embedders.1.model.",)),
}
OPENAI, OPENCLIP = "OpenAI's CLIP", "OpenCLIP"
KINDS = {"sd1": (OPENAI,), "sd2": (OPENCLIP,), "sdxl": (OPENAI, OPENCLIP)}  # what each text encoder was trained as
ACTIVATION = {OPENAI: "quick_gelu", OPENCLIP: "gelu"}
WIDTHS = {768: "sd1", 1024: "sd2", 1280: "the SDXL refiner", 2048: "sdxl"}  # numbers a token, by which a UNet is known

HEAD = 64  # channels of one attention head: SD 2 and SDXL UNets, and every CLIP text encoder
SD1_HEADS = 8
SD2_LAYERS = 23  # layers of SD 2's text encoder; OpenCLIP's has one more, which is not read
SCALING = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
RESNET = re.compile(r"input_blocks\.(\d{1,3})\.0\.out_layers\.3\.weight")
DOWNSAMPLER = re.compile(r"input_blocks\.(\d{1,3})\.0\.op\.weight")
DEPTH = re.compile(r"(input_blocks\.\d{1,3}|middle_block)\.1\.transformer_blocks\.(\d{1,3})\.norm1\.weight")
DECODER = re.compile(r"decoder\.up\.(\d{1,2})\.block\.(\d{1,2})\.conv1\.weight")
TEXT_LAYER = re.compile(r"(?:.*\.layers|transformer\.resblocks)\.(\d{1,3})\..*")


@contextmanager
def deriving(path: Path) -> Iterator[None]:
    """Whatever odd shapes run into inside the block becomes a CheckpointError of one line."""
    try:
        yield
    except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
        reason = printable(first_line(error), 120)
        raise CheckpointError(
            f"{path} is damaged or of an unknown layout: weight {reason} is missing or odd"
        ) from error


def family_of(path: Path, shapes: Shapes) -> str:
    """The family of the checkpoint's UNet. Raises CheckpointError if none is supported, or marks contradict each other.

    Width of the text that it reads decides. A UNet of another width is small, and made by someone who knows its structure:
    SDXL's is told of image sizes, SD 2's and SDXL's project linearly.
    """
    own = under(shapes, UNET)
    width = _ending(own, ".attn2.to_k.weight")[1]
    linear = len(_ending(own, ".1.proj_in.weight")) == 2
    sizes = "label_emb.0.0.weight" in own
    structure = "sdxl" if sizes else "sd2" if linear else "sd1"
    family = WIDTHS.get(width, structure)
    if family not in TEXTS:
        raise CheckpointError(f"{path} is {family}; supported: SD 1, SD 2 and SDXL base models")
    if sizes and family != "sdxl":
        raise CheckpointError(f"{path}: its UNet has label_emb, an unCLIP or upscaler model; it is not supported")
    if family != structure:
        raise CheckpointError(
            f"{path}: its UNet reads text of width {width}, as {family} models, but is built as {structure}'s; not supported"
        )
    return family


def text_prefixes(path: Path, shapes: Shapes, family: str) -> tuple[str, ...]:
    """Where the text encoders of the checkpoint stand. Raises CheckpointError if the UNet's are not there."""
    found = []
    for places in TEXTS[family]:
        here = [place for place in places if any(name.startswith(place) for name in shapes)]
        if not here:
            raise CheckpointError(
                f"{path} has no text encoder of {family} ({' or '.join(places)}*), which its UNet is of"
            )
        found.append(here[0])
    return tuple(found)


def unet_config(shapes: Shapes, family: str, pooled: int) -> dict[str, Any]:
    """The diffusers config of an original UNet. pooled: width of SDXL's pooled text."""
    own = under(shapes, UNET)
    depths: dict[str, int] = {}
    for key in own:
        if found := DEPTH.fullmatch(key):
            depths[found[1]] = max(depths.get(found[1], 0), int(found[2]) + 1)
    resnets = {int(found[1]) for key in own if (found := RESNET.fullmatch(key))}
    downsamplers = {int(found[1]) for key in own if (found := DOWNSAMPLER.fullmatch(key))}
    channels: list[int] = []
    layers: list[int] = []  # transformer blocks of each level's attentions; 0: none
    counts, new_level = [], True
    for block in range(1, 1 + max(resnets)):
        name = f"input_blocks.{block}"
        if block in downsamplers:
            new_level = True
            continue
        if block not in resnets:
            raise CheckpointError(f"the checkpoint lacks {UNET}{name}.0.out_layers.3.weight")
        if new_level:
            channels.append(own[f"{name}.0.out_layers.3.weight"][0])
            layers.append(depths.get(name, 0))
            counts.append(0)
        new_level = False
        counts[-1] += 1
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in layers]
    # the middle block takes the last level's depth
    layers[-1] = layers[-1] or depths.get("middle_block", 1)
    config: dict[str, Any] = {
        "in_channels": own["input_blocks.0.0.weight"][1],
        "out_channels": own["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": counts[0],
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "transformer_layers_per_block": [max(depth, 1) for depth in layers],
        "cross_attention_dim": _ending(own, ".attn2.to_k.weight")[1],
        "attention_head_dim": SD1_HEADS if family == "sd1" else [max(1, width // HEAD) for width in channels],
        "use_linear_projection": family != "sd1",
    }
    if family == "sdxl":
        embedded = own["label_emb.0.0.weight"][1]
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (embedded - pooled) // 6,  # six numbers: original size, crop, target size
            "projection_class_embeddings_input_dim": embedded,
        }
    return config


def vae_config(shapes: Shapes, family: str) -> dict[str, Any]:
    """The diffusers config of an original VAE, from its decoder: some files have no encoder."""
    own = under(shapes, VAE)
    blocks = [(int(found[1]), int(found[2])) for key in own if (found := DECODER.fullmatch(key))]
    if not blocks:
        raise CheckpointError(f"the checkpoint has no {VAE}decoder.*: it lacks the VAE's decoder")
    levels = 1 + max(level for level, _ in blocks)
    return {
        "block_out_channels": [own[f"decoder.up.{level}.block.0.conv1.weight"][0] for level in range(levels)],
        "layers_per_block": max(block for level, block in blocks if level == 0),  # the decoder has one more
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": own["decoder.conv_in.weight"][1],
        "scaling_factor": SCALING[family],
    }


def text_config(shapes: Shapes, prefix: str, kind: str) -> dict[str, Any]:
    """The config of one text encoder. kind: OPENAI or OPENCLIP, which the prefix does not tell."""
    own = under(shapes, prefix)
    transformers = prefix.endswith(".transformer.")
    vocabulary, width = _ending(own, "token_embedding.weight")
    layers = 1 + max((int(found[1]) for key in own if (found := TEXT_LAYER.fullmatch(key))), default=-1)
    projection = _ending(own, "text_projection", "text_projection.weight", default=(width, width))
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _ending(own, "mlp.fc1.weight", "mlp.c_fc.weight")[0],
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // HEAD),
        "max_position_embeddings": _ending(own, "position_embedding.weight", "positional_embedding")[0],
        "hidden_act": ACTIVATION[kind],
        "projection_dim": projection[0 if transformers else 1],
        "eos_token_id": 2,  # transformers' sign for: the end token is the one with the highest id
    }


def sd2_layers(layers: int, prefix: str) -> int:
    """Layers of SD 2's text encoder that are read: its last one is left out, if the file has it at all.

    Files have 24 layers, or 23 if they were once in diffusers' layout. Smaller encoders have the unused layer if and only
    if they are in OpenCLIP's layout.
    """
    if layers > SD2_LAYERS:
        return SD2_LAYERS
    return layers if layers == SD2_LAYERS or prefix.endswith(".transformer.") else layers - 1


def text_layer(name: str, prefix: str) -> int:
    """Number of the layer that a text encoder's weight belongs to; -1: none."""
    found = TEXT_LAYER.fullmatch(name.removeprefix(prefix))
    return int(found[1]) if found else -1


def under(shapes: Shapes, prefix: str) -> Mapping[str, tuple[int, ...]]:
    """The shapes under a prefix, without it."""
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def _ending(shapes: Shapes, *endings: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
    for key, shape in shapes.items():
        if key.endswith(endings):
            return shape
    if default is None:
        raise CheckpointError(f"the checkpoint has no weight named *{endings[0]}; it is damaged or of another layout")
    return default
