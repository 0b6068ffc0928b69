"""Launcher of a low-rank layer with GEGLU in its epilogue: `lowrank.shrink`, then one kernel for all the rest."""

from __future__ import annotations

import triton  # type: ignore[import-untyped]

from stepforge.kernels import gated_body, lowrank
from stepforge.kernels.launch import Tensor, check_halves, check_shape, empty_out, options, upcast
from stepforge.kernels.tiles import Tile


def expand_geglu(
    x: Tensor, w: Tensor, s: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, *,
    tile: Tile, table: Tensor | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The layer from `s`, the output of `lowrank.shrink`. A tile's columns are half values, half gates."""
    rank = check_geglu(x, w, a, b, scale, ranks, table, bias)
    check_shape("s", s, (s.shape[0], x.shape[0], 1, rank))
    rows, width = x.shape[0], w.shape[0] // 2
    out = empty_out(x, (rows, width))
    blocks = len(table) if table is not None else triton.cdiv(rows, tile.block_m)
    if rows and blocks and width:
        gated_body.expand_geglu[(blocks * triton.cdiv(width, tile.block_n // 2),)](
            x, w, s, b, scale, ranks, table if table is not None else ranks, bias if bias is not None else w, out,
            rows, width, x.shape[1], blocks, x.stride(0), width,
            R=rank, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
            SPLIT=s.shape[0], GROUPED=table is not None, HAS_BIAS=bias is not None, UPCAST=upcast(x.dtype),
            **options(tile),
        )  # fmt: skip
    return out.to(x.dtype)


def lowrank_geglu(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, *,
    tile: Tile, parts: int = 1, table: Tensor | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The layer in two launches; shapes as in `reference.lowrank_geglu`. parts: of K, in the first."""
    check_geglu(x, w, a, b, scale, ranks, table, bias)
    s = lowrank.shrink(x, a, ranks, block_m=tile.block_m, table=table, split=parts)
    return expand_geglu(x, w, s, a, b, scale, ranks, tile=tile, table=table, bias=bias)


def check_geglu(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, table: Tensor | None, bias: Tensor | None
) -> int:
    """Refuse what the kernel does not compute; returns R."""
    rank = lowrank.check_linear(x, w, a, b, scale, ranks, table, bias, None, "none")
    check_halves(w, a)
    return rank
