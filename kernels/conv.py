"""Launcher of a convolution's adapter: the base convolution stays cuDNN's, its output gets the low-rank term added."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]

from stepforge.kernels import conv_body
from stepforge.kernels.launch import Tensor, check_floats, check_packed, check_shape, options, require, upcast
from stepforge.kernels.lowrank import add_expanded, check_bank
from stepforge.kernels.tiles import Tile, shrink_tile


def conv_shrink(
    x: Tensor, a: Tensor, ranks: Tensor, *, out_height: int, out_width: int, stride: int = 1, pad: int = 1,
    block_m: int, table: Tensor | None = None, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """conv(x, A) in fp32 as [1, M, 1, R], M = B·out_height·out_width; x [B, H, W, C], a [L, R, k, k, C]."""
    tile = tile or shrink_tile(block_m, a.shape[1])
    check_floats(x=x, a=a)
    check_packed(x=x, a=a, ranks=ranks, table=table)
    require(x.ndim == 4 and a.ndim == 5, "x must be [B, H, W, C] and a [L, R, k, k, C]")
    batch, height, width, channels = x.shape
    adapters, rank, side = a.shape[:3]
    check_shape("a", a, (adapters, rank, side, side, channels))
    fits = all(out == (size + 2 * pad - side) // stride + 1 for out, size in ((out_height, height), (out_width, width)))
    require(fits, f"{side}x{side}, stride {stride}, pad {pad} on {height}x{width} is not {out_height}x{out_width}")
    rows = batch * out_height * out_width
    s = torch.empty(1, rows, 1, rank, device=x.device, dtype=torch.float32)
    blocks = len(table) if table is not None else triton.cdiv(rows, block_m)
    if rows and blocks:
        conv_body.conv_shrink[(blocks * (block_m // tile.block_m),)](
            x, a, ranks, table if table is not None else ranks, s,
            rows, channels, blocks, height, width, out_height, out_width, stride, pad,
            R=rank, SIDE=side, BLOCK_M=tile.block_m, BLOCK_K=min(tile.block_k, 64), SUB=block_m // tile.block_m,
            GROUPED=table is not None, UPCAST=upcast(x.dtype), **options(tile),
        )  # fmt: skip
    return s


def lowrank_conv(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, *,
    tile: Tile, table: Tensor | None = None, stride: int = 1, pad: int = 1,
) -> Tensor:  # fmt: skip
    """y + (scale ⊙ conv(x, A)) Bᵀ in two launches; shapes as in `reference.lowrank_conv`, y and x contiguous."""
    check_floats(y=y, x=x, a=a, b=b)
    check_packed(y=y, b=b)
    check_bank(scale, ranks, table, a.shape[0], 1, a.shape[1])
    check_shape("b", b, (a.shape[0], y.shape[3], a.shape[1]))
    s = conv_shrink(
        x, a, ranks, out_height=y.shape[1], out_width=y.shape[2], stride=stride, pad=pad, block_m=tile.block_m,
        table=table,
    )  # fmt: skip
    return add_expanded(y.reshape(-1, y.shape[3]), s, b, scale, ranks, tile=tile, table=table).reshape(y.shape)
