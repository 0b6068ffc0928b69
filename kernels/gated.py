"""GEGLU: on a tensor, and in the epilogue of its low-rank up-projection (`lowrank.shrink`, then one kernel for all the rest).

    y = v · gelu(g),   [v | g] = x Wᵀ + (scale ⊙ x Aᵀ) Bᵀ + bias

One program holds the values and the gates of the same columns, so that neither is written to memory: y is rounded once,
and no row of 2N columns exists. The rows of w, b and bias stay as the model has them, values first.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, import-untyped"
import triton
import triton.language as tl
from torch import Tensor

from stepforge.kernels import lowrank
from stepforge.kernels.dispatch.tiles import Tile
from stepforge.kernels.launch import (
    check_floats,
    check_halves,
    check_linear,
    check_rows,
    check_shape,
    empty_out,
    options,
    require,
    upcast,
)
from stepforge.kernels.lowrank import loaded, rounded, row_block, swizzled, write_tile


@triton.jit
def gelu(y):
    """With the exact erf; fp32 in, fp32 out."""
    return 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))


@triton.jit(do_not_specialize=["rows"])
def geglu_kernel(h, out, rows, width, stride, stride_out, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """h [rows, 2·width] with `stride` elements a row: values, then gates. One rounding, at the end."""
    first = tl.program_id(0) * BLOCK_M
    lanes = tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (first + lanes < rows)[:, None] & (cols < width)[None, :]
    near = h + first.to(tl.int64) * stride + lanes[:, None] * stride + cols[None, :]
    value = tl.load(near, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(near + width, mask=mask, other=0.0).to(tl.float32)
    there = out + first.to(tl.int64) * stride_out + lanes[:, None] * stride_out + cols[None, :]
    tl.store(there, (value * gelu(gate)).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "blocks"])
def expand_geglu_kernel(
    x, w, s, b, scale, ranks, table, bias, out,
    M, N, K, blocks, stride_x, stride_out,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr, GROUPED: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """From the output of `shrink`. w [2N, K], b [L, 2N, R], bias [2N], out [M, N]; a tile is BLOCK_N // 2 columns of out."""
    HALF: tl.constexpr = BLOCK_N // 2
    m_block, tile = swizzled(tl.program_id(0), blocks, tl.cdiv(N, HALF), GROUP_M)
    first, count, adapter = row_block(table, m_block, M, BLOCK_M, GROUPED)
    if count > 0:
        lanes = tl.arange(0, BLOCK_M)
        row_ok = lanes < count
        cols = tile * HALF + tl.arange(0, HALF)
        col_ok = cols < N
        value = tl.zeros([BLOCK_M, HALF], dtype=tl.float32)
        gate = tl.zeros([BLOCK_M, HALF], dtype=tl.float32)
        rank = tl.load(ranks + tl.maximum(adapter, 0))
        if adapter >= 0:
            kind: tl.constexpr = tl.float32 if UPCAST else b.dtype.element_ty
            s_rows = s + first.to(tl.int64) * R + lanes[:, None] * R
            b_cols = b + adapter.to(tl.int64) * 2 * N * R + cols[None, :] * R
            # 16 ranks at once, as in `expand`
            STEP: tl.constexpr = 16
            for start in tl.range(0, R, STEP, num_stages=1):
                offs_r = start + tl.arange(0, STEP)
                rank_ok = offs_r < rank
                mask = row_ok[:, None] & rank_ok[None, :]
                total = tl.load(s_rows + offs_r[None, :], mask=mask, other=0.0)
                for i in tl.static_range(1, SPLIT):
                    total += tl.load(s_rows + i * M.to(tl.int64) * R + offs_r[None, :], mask=mask, other=0.0)
                strength = tl.load(scale + adapter * (R // 16) + offs_r // 16)
                low = rounded(total * strength[None, :], kind, UPCAST)
                ups = b_cols + offs_r[:, None]
                up_ok = rank_ok[:, None] & col_ok[None, :]
                value = tl.dot(low, loaded(ups, up_ok, UPCAST), value, input_precision="ieee")
                gate = tl.dot(low, loaded(ups + N * R, up_ok, UPCAST), gate, input_precision="ieee")
        x_rows = x + first.to(tl.int64) * stride_x + lanes[:, None] * stride_x
        w_cols = w + cols[None, :] * K
        for k in range(0, K, BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            w_ok = (ks < K)[:, None] & col_ok[None, :]
            xs = loaded(x_rows + ks[None, :], row_ok[:, None] & (ks < K)[None, :], UPCAST)
            value = tl.dot(xs, loaded(w_cols + ks[:, None], w_ok, UPCAST), value, input_precision="ieee")
            gate = tl.dot(xs, loaded(w_cols + N * K + ks[:, None], w_ok, UPCAST), gate, input_precision="ieee")
        if HAS_BIAS:
            value += tl.load(bias + cols, mask=col_ok, other=0.0).to(tl.float32)[None, :]
            gate += tl.load(bias + N + cols, mask=col_ok, other=0.0).to(tl.float32)[None, :]
        y = value * gelu(gate)
        write_tile(y, out, bias, first, lanes, cols, row_ok, col_ok, stride_out, False)


def geglu(h: Tensor, *, out: Tensor | None = None, block_m: int = 8, block_n: int = 256) -> Tensor:
    """value · gelu(gate) of h [M, 2C] whose rows may lie apart. Returns [M, C]: `out`, whose rows may too, if it is given."""
    check_floats(h=h)
    check_rows("h", h)
    require(h.shape[1] % 2 == 0, f"h has {h.shape[1]} columns; values and gates need an even number")
    rows, width = h.shape[0], h.shape[1] // 2
    if out is not None:
        check_shape("out", out, (rows, width))
        check_rows("out", out)
    into = out if out is not None and empty_out(h, ()).dtype == out.dtype else empty_out(h, (rows, width))
    if into.numel():
        grid = (triton.cdiv(rows, block_m), triton.cdiv(width, block_n))
        geglu_kernel[grid](
            h, into, rows, width, h.stride(0), into.stride(0), BLOCK_M=block_m, BLOCK_N=block_n, enable_fp_fusion=True
        )
    if out is None:
        return into.to(h.dtype)
    return out if into is out else out.copy_(into)


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
        expand_geglu_kernel[(blocks * triton.cdiv(width, tile.block_n // 2),)](
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
    rank = check_linear(x, w, a, b, scale, ranks, table, bias, None)
    check_halves(w, a)
    return rank
