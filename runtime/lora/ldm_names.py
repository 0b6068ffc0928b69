"""Modules of a UNet under the names of its original code: LDM for SD 1 and 2, Stability's generative-models for SDXL."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

RESNET = {  # inside a resnet
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTER = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def ldm_names(paths: Sequence[str]) -> dict[str, str]:
    """diffusers path -> original path. Blocks of the original stand in one flat list: numbers follow from layers a level."""
    return dict(_pairs(paths))


def _pairs(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    layers = 1 + max(
        (int(m[4]) for path in paths if (m := BLOCK.match(path)) and m[1] + m[3] == "downresnets"), default=0
    )
    attended = {int(m[2]) for path in paths if (m := BLOCK.match(path)) and m[1] + m[3] == "upattentions"}
    for path in paths:
        if (m := MIDDLE.match(path)) is not None:
            kind, index, rest = m[1], int(m[2]), m[3]
            yield path, f"middle_block.{2 * index if kind == 'resnets' else 1}.{_inner(kind, rest)}"
        elif (m := BLOCK.match(path)) is not None:
            side, block, kind, index, rest = m[1], int(m[2]), m[3], int(m[4]), m[5]
            if kind == "downsamplers":
                yield path, f"input_blocks.{(block + 1) * (layers + 1)}.0.op"
            elif kind == "upsamplers":
                inner = 2 if block in attended else 1
                yield path, f"output_blocks.{block * (layers + 1) + layers}.{inner}.conv"
            else:
                at = (1 + block * (layers + 1) + index) if side == "down" else block * (layers + 1) + index
                inner = 0 if kind == "resnets" else 1
                yield path, f"{'input' if side == 'down' else 'output'}_blocks.{at}.{inner}.{_inner(kind, rest)}"
        elif path in OUTER:
            yield path, OUTER[path]


def _inner(kind: str, rest: str) -> str:
    return RESNET.get(rest, rest) if kind == "resnets" else rest
