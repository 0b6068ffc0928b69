"""Weights of an original ControlNet by diffusers' names: the inverse of the table that LoRA files are read with."""

from __future__ import annotations

import re
from collections.abc import Iterable

from stepforge.runtime.lora.ldm_names import OUTER, RESNET, ldm_names

HINT = "controlnet_cond_embedding"  # diffusers' name of the hint encoder
INNER = {original: name for name, original in RESNET.items()}
INPUT = re.compile(r"input_blocks\.(\d{1,2})\.")
DOWNSAMPLER = re.compile(r"input_blocks\.([1-9]\d?)\.0\.op\.")
HINT_LAYER = re.compile(r"input_hint_block\.(\d+)\.")


def diffusers_names(names: Iterable[str]) -> dict[str, str]:
    """Original name -> diffusers' name, for the weights of a ControlNet; other names stay as they are.

    diffusers' own converter leaves out SDXL's label_emb, and every hint encoder that is not of eight convolutions.
    """
    names = set(names)
    blocks = _blocks(names)
    last_hint = max(_numbers(HINT_LAYER, names), default=0)

    def renamed(name: str) -> str:
        module, _, leaf = name.rpartition(".")
        head, _, rest = module.partition(".")
        if head == "zero_convs":
            return f"controlnet_down_blocks.{rest.removesuffix('.0')}.{leaf}"
        if module == "middle_block_out.0":
            return f"controlnet_mid_block.{leaf}"
        if head == "input_hint_block" and rest.isdecimal():
            number = int(rest)  # a convolution, then SiLU, and so on
            part = "conv_in" if not number else "conv_out" if number == last_hint else f"blocks.{number // 2 - 1}"
            return f"{HINT}.{part}.{leaf}"
        parts = module.split(".")
        for length in range(len(parts), 0, -1):
            if (block := blocks.get(".".join(parts[:length]))) is not None:
                inner = ".".join(parts[length:])
                return ".".join(filter(None, (block, INNER.get(inner, inner), leaf)))
        return name

    return {name: renamed(name) for name in names}


def _blocks(names: Iterable[str]) -> dict[str, str]:
    """Blocks and outer layers of an encoder, original path -> diffusers path, for as many levels as there can be."""
    inputs = max(_numbers(INPUT, names), default=0)
    layers = min(_numbers(DOWNSAMPLER, names), default=inputs + 1) - 1  # a level, before its downsampler
    levels = range(inputs // (layers + 1) + 1)
    parts = [f"{kind}.{layer}" for kind in ("resnets", "attentions") for layer in range(layers)]
    inside = [*(f"down_blocks.{level}.{part}" for level in levels for part in parts)]
    inside += ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
    whole = [*OUTER, *(f"down_blocks.{level}.downsamplers.0.conv" for level in levels)]
    paths = ldm_names([*whole, *(f"{block}.*" for block in inside)])
    return {original.removesuffix(".*"): path.removesuffix(".*") for path, original in paths.items()}


def _numbers(pattern: re.Pattern[str], names: Iterable[str]) -> list[int]:
    return [int(match[1]) for name in names if (match := pattern.match(name))]
