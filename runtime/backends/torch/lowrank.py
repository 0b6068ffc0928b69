"""LoRA layers of which each row of the batch has its own slot and strength, on the kernels' operators.

A row's slot is gathered from the bank, some 100 KB a layer where the layer's values are megabytes, so every row is an
"adapter" of the kernel: rows of one slot may then differ in strength, and the table of row blocks depends on shapes alone.
Banks come in the kernels' layout, see `banks`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepforge.kernels import ops as kernels
from stepforge.kernels import packing
from stepforge.kernels.dispatch.choose import dispatch
from stepforge.kernels.dispatch.layers import Layer
from stepforge.kernels.dispatch.tiles import padded_rank

SPAN = 16  # ranks that share one scale in the kernels' layout


def linear(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, adapter: Tensor, strength: Tensor,
           residual: Tensor = None, *, rank: int, slices: int = 1) -> Tensor:  # fmt: skip
    """x Wᵀ + bias + strength·((x·A[slot])·B[slot]) + residual.

    x [rows, tokens, in], w [P·out, in], a [slots, P·R, in], b [slots, P·out, R]: P = `slices` layers of one x. The residual
    is added in the kernel if it has the result's shape [rows, tokens, P·out], else afterwards.
    """
    if x.ndim == 2:
        return linear(x[:, None], w, bias, a, b, adapter, strength, rank=rank, slices=slices)[:, 0]
    rows, tokens, depth = x.shape
    width = w.shape[0]
    a, b = a.index_select(0, adapter), b.index_select(0, adapter)
    block, path = _choice(Layer("", rows * tokens, depth, width, slices=slices), rank, x.device)
    if path == "addmm":  # the kernels' own addmm runs every adapter on all rows
        down = (torch.bmm(x, a.transpose(1, 2)).float() * strength).to(x.dtype)
        y = F.linear(x, w, bias)
        for columns, low, up in zip(y.chunk(slices, -1), down.chunk(slices, -1), b.chunk(slices, 1), strict=True):
            columns.baddbmm_(low, up.transpose(1, 2))
        return y if residual is None else y + residual
    block = block or tokens
    scale, ranks = _scales(strength, slices, b.shape[2], rank)
    table = _table(rows, tokens, block, x.device)
    fused = residual is not None and residual.shape == (rows, tokens, width)
    y = kernels.lowrank_linear(x, w, a.unflatten(1, (slices, -1)), b, scale, ranks, table=table, bias=bias,
                               residual=residual if fused else None, block_m=block)  # fmt: skip
    return y if fused or residual is None else y + residual


def geglu(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, adapter: Tensor, strength: Tensor, *,
          rank: int) -> Tensor:  # fmt: skip
    """value · gelu(gate) of `linear`'s two halves, w [2·out, in], values first. Returns [rows, tokens, out]."""
    rows, tokens, depth = x.shape
    block, path = _choice(Layer("", rows * tokens, depth, w.shape[0], gated=True), rank, x.device)
    if path == "addmm":
        return kernels.geglu(linear(x, w, bias, a, b, adapter, strength, rank=rank))
    a, b = a.index_select(0, adapter), b.index_select(0, adapter)
    block = block or tokens
    scale, ranks = _scales(strength, 1, b.shape[2], rank)
    table = _table(rows, tokens, block, x.device)
    return kernels.lowrank_geglu(x, w, a[:, None], b, scale, ranks, table=table, bias=bias, block_m=block)


def conv(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, adapter: Tensor, strength: Tensor, *, rank: int,
         stride: int, pad: int) -> Tensor:  # fmt: skip
    """conv(x, W) + bias + strength·conv(x, A[slot])·B[slot]; x [rows, C, h, w], a [slots, R, k, k, C], b [slots, out, R]."""
    a, b = a.index_select(0, adapter), b.index_select(0, adapter)
    y = F.conv2d(x, w, bias, stride, pad)
    rows, _, height, width = y.shape
    scale, ranks = _scales(strength, 1, a.shape[1], rank)
    block = _conv_block(height * width, x.device)
    table = _table(rows, height * width, block, x.device)
    return kernels.lowrank_conv(y, x, a, b, scale, ranks, table=table, stride=stride, pad=pad, block_m=block)


def _conv_block(pixels: int, device: Any) -> int:
    """Rows of a block: 64 has a tile on every architecture; on the CPU an image."""
    return pixels if device.type == "cpu" else 64


def _choice(layer: Layer, rank: int, device: Any) -> tuple[int, str]:
    """Rows of a block, and the path. On the CPU there is one path, and a block is an image."""
    if device.type == "cpu":
        return 0, "reference"
    choice = dispatch(layer, padded_rank(rank), kernels.arch_of(device), grouped=True)
    return choice.block_m, choice.path


def _scales(strength: Tensor, slices: int, padded: int, rank: int) -> tuple[Tensor, Tensor]:
    rows, spans = strength.shape[0], -(-padded // SPAN)
    scale = strength.float().reshape(rows, 1, 1).expand(rows, slices, spans).contiguous()
    return scale, _ranks(rows, rank, strength.device)


# Kept for ever, a few KB a shape: recorded CUDA graphs hold their addresses.
@functools.cache
def _table(rows: int, tokens: int, block: int, device: Any) -> Tensor:
    return packing.block_table(range(rows), tokens, block).to(device)


@functools.cache
def _ranks(rows: int, rank: int, device: Any) -> Tensor:
    return torch.full((rows,), rank, dtype=torch.int32, device=device)
