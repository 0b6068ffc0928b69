"""Launchers of the low-rank linear layers: tensors and a tile in, one or two launches. `ops` chooses between them.

Shapes as in `reference.lowrank_linear`. `table` int32 [T, 3] of row blocks for `tile.block_m` (see `packing.block_table`).
Every launcher raises ValueError for shapes and types it does not take.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped]

from stepforge.kernels import lowrank_body
from stepforge.kernels.launch import (
    Tensor,
    check_floats,
    check_packed,
    check_rows,
    check_shape,
    empty_out,
    options,
    require,
    upcast,
)
from stepforge.kernels.reference import ACTS
from stepforge.kernels.tiles import Tile, shrink_tile


def onepass(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, *,
    tile: Tile, nt: int = 1, table: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None,
    act: str = "none", low_rank: bool = True,
) -> Tensor:  # fmt: skip
    """The layer in one launch; a program computes S once for `nt` tiles of columns. low_rank=False: without adapters."""
    rank = check_linear(x, w, a, b, scale, ranks, table, bias, residual, act)
    rows, width, slices = x.shape[0], w.shape[0], a.shape[1]
    out = empty_out(x, (rows, width))
    blocks = len(table) if table is not None else triton.cdiv(rows, tile.block_m)
    chunks = triton.cdiv(triton.cdiv(width // slices, tile.block_n), nt) * slices
    if rows and blocks and width:
        lowrank_body.onepass[(blocks * chunks,)](
            x, w, a, b, scale, ranks, table if table is not None else ranks,
            bias if bias is not None else w, residual if residual is not None else x, out,
            rows, width, x.shape[1], blocks, slices, nt, x.stride(0), width,
            residual.stride(0) if residual is not None else 0,
            R=rank, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
            GROUPED=table is not None, LOWRANK=low_rank, HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None, ACT=ACTS.index(act), UPCAST=upcast(x.dtype), **options(tile),
        )  # fmt: skip
    return out.to(x.dtype)


def shrink(
    x: Tensor, a: Tensor, ranks: Tensor, *, block_m: int, table: Tensor | None = None, split: int = 1,
    tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """x Aᵀ in fp32 as [split, M, P, R]: sums over `split` parts of K, which `expand` adds in order.

    block_m: rows of a block of the table. Rows without an adapter are left uninitialised.
    """
    tile = tile or shrink_tile(block_m, a.shape[2])
    check_floats(x=x, a=a)
    check_rows("x", x)
    check_packed(a=a, ranks=ranks, table=table)
    require(block_m % tile.block_m == 0, f"blocks of {block_m} rows do not divide into tiles of {tile.block_m}")
    rows, depth = x.shape
    slices, rank = a.shape[1:3]
    s = torch.empty(split, rows, slices, rank, device=x.device, dtype=torch.float32)
    blocks = len(table) if table is not None else triton.cdiv(rows, block_m)
    if rows and blocks:
        lowrank_body.shrink[(blocks * (block_m // tile.block_m), slices, split)](
            x, a, ranks, table if table is not None else ranks, s,
            rows, depth, blocks, slices, x.stride(0),
            R=rank, BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, SUB=block_m // tile.block_m, SPLIT=split,
            GROUPED=table is not None, UPCAST=upcast(x.dtype), **options(tile),
        )  # fmt: skip
    return s


def expand(
    x: Tensor, w: Tensor, s: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, *,
    tile: Tile, table: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None,
    act: str = "none",
) -> Tensor:  # fmt: skip
    """The layer from `s`, the output of `shrink`: the accumulator starts from the low-rank term."""
    check_linear(x, w, a, b, scale, ranks, table, bias, residual, act)
    check_shape("s", s, (s.shape[0], x.shape[0], *a.shape[1:3]))
    return _expand(x, w, s, b, scale, ranks, tile=tile, table=table, bias=bias, residual=residual, act=act)


def add_expanded(
    y: Tensor, s: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, *, tile: Tile, table: Tensor | None = None
) -> Tensor:
    """y + (scale ⊙ s) Bᵀ for y [M, N] with rows that may lie apart: the second half of a convolution's adapter."""
    check_floats(y=y, b=b)
    check_rows("y", y)
    check_shape("s", s, (s.shape[0], y.shape[0], 1, b.shape[2]))
    return _expand(y, b, s, b, scale, ranks, tile=tile, table=table, bias=None, residual=y, act="none", base=False)


def split(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, *,
    tile: Tile, parts: int = 1, table: Tensor | None = None, bias: Tensor | None = None,
    residual: Tensor | None = None, act: str = "none",
) -> Tensor:  # fmt: skip
    """The layer in two launches. parts: of K, in the first."""
    s = shrink(x, a, ranks, block_m=tile.block_m, table=table, split=parts)
    return expand(x, w, s, a, b, scale, ranks, tile=tile, table=table, bias=bias, residual=residual, act=act)


def _expand(
    x: Tensor, w: Tensor, s: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, *,
    tile: Tile, table: Tensor | None, bias: Tensor | None, residual: Tensor | None, act: str, base: bool = True,
) -> Tensor:  # fmt: skip
    parts, rows, slices, rank = s.shape
    width = b.shape[1]
    check_packed(s=s, b=b, scale=scale, ranks=ranks, table=table)
    out = empty_out(x, (rows, width))
    blocks = len(table) if table is not None else triton.cdiv(rows, tile.block_m)
    tiles = triton.cdiv(width // slices, tile.block_n) * slices
    if rows and blocks and width:
        lowrank_body.expand[(blocks * tiles,)](
            x, w, s, b, scale, ranks, table if table is not None else ranks,
            bias if bias is not None else w, residual if residual is not None else x, out,
            rows, width, x.shape[1], blocks, slices, x.stride(0), width,
            residual.stride(0) if residual is not None else 0,
            R=rank, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
            SPLIT=parts, GROUPED=table is not None, BASE=base, HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None, ACT=ACTS.index(act), UPCAST=upcast(x.dtype), **options(tile),
        )  # fmt: skip
    return out.to(x.dtype)


def check_linear(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor,
    table: Tensor | None, bias: Tensor | None, residual: Tensor | None, act: str,
) -> int:  # fmt: skip
    """Refuse what no path computes; returns R."""
    require(x.ndim == 2, f"x has shape {tuple(x.shape)}; flatten it to [M, K]")
    require(a.ndim == 4 and b.ndim == 3, "a must be [L, P, R, K] and b [L, N, R]")
    rows, depth = x.shape
    adapters, slices, rank, _ = a.shape
    width = w.shape[0]
    check_floats(x=x, w=w, a=a, b=b, bias=bias, residual=residual)
    check_rows("x", x)
    check_shape("w", w, (width, depth))
    check_shape("a", a, (adapters, slices, rank, depth))
    check_shape("b", b, (adapters, width, rank))
    check_bank(scale, ranks, table, adapters, slices, rank)
    require(width % slices == 0, f"{width} columns do not divide into {slices} slices")
    require(act in ACTS, f"act is {act!r}; choose one of {', '.join(ACTS)}")
    require(residual is None or act == "none", "residual is added before the activation; use one of them")
    if bias is not None:
        check_shape("bias", bias, (width,))
    if residual is not None:
        check_rows("residual", residual)
        check_shape("residual", residual, (rows, width))
    check_packed(w=w, a=a, b=b, bias=bias)
    return int(rank)


def check_bank(scale: Tensor, ranks: Tensor, table: Any, adapters: int, slices: int, rank: int) -> None:
    require(rank >= 16 and rank & (rank - 1) == 0, f"R is {rank}; pack adapters to a power of two from 16")
    check_shape("scale", scale, (adapters, slices, rank // 16))
    check_shape("ranks", ranks, (adapters,))
    require(scale.dtype == torch.float32 and ranks.dtype == torch.int32, "scale must be float32 and ranks int32")
    check_packed(scale=scale, ranks=ranks, table=table)
    if table is not None:
        require(table.dtype == torch.int32 and table.shape[1:] == (3,), "table must be int32 [T, 3]")
