"""Low-rank linear layers: Triton bodies and their launchers, one or two launches; `ops` chooses between them.

    y = x Wᵀ + (scale ⊙ x Aᵀ) Bᵀ + bias + residual

`onepass` computes both products of its first tile of columns in one loop over K, keeps S = scale ⊙ x Aᵀ in registers and
uses it for `nt` tiles. `shrink` writes x Aᵀ in fp32 and `expand` starts its accumulator from the low-rank term. Neither
uses atomics: every sum has one fixed order. The strengths are data, one for each 16 ranks, multiplied on the fp32 sum.

A table of row blocks, int32 [T, 3] = (first row, rows, adapter), lets rows of one batch use different adapters. Adapter
−1 skips the low-rank term, so the result has the bits of a layer without it; a block of 0 rows does nothing.

Shapes as in `reference.lowrank_linear`; tables for `tile.block_m` rows (`packing.block_table`). Every launcher raises
ValueError for shapes and types that it does not take.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, import-untyped"
import torch
import triton
import triton.language as tl
from torch import Tensor

from stepforge.kernels.dispatch.tiles import Tile, shrink_tile
from stepforge.kernels.launch import (
    check_floats,
    check_linear,
    check_packed,
    check_rows,
    check_shape,
    empty_out,
    options,
    require,
    upcast,
)


@triton.jit
def rounded(s, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """S in the precision of the second product. UPCAST: bf16 values held in fp32, for the interpreter, whose own
    conversion truncates; round to nearest even by hand."""
    if UPCAST:
        bits = s.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    else:
        return s.to(dtype)


@triton.jit
def loaded(pointers, mask, UPCAST: tl.constexpr):
    """Load with zeros where the mask is off; UPCAST: as fp32."""
    value = tl.load(pointers, mask=mask, other=0.0)
    if UPCAST:
        value = value.to(tl.float32)
    return value


@triton.jit
def row_block(table, m_block, M, BLOCK_M: tl.constexpr, GROUPED: tl.constexpr):
    """First row, number of rows and adapter of a row block."""
    if GROUPED:
        first = tl.load(table + 3 * m_block)
        rows = tl.load(table + 3 * m_block + 1)
        adapter = tl.load(table + 3 * m_block + 2)
    else:
        first = m_block * BLOCK_M
        rows = tl.minimum(M - first, BLOCK_M)
        adapter = m_block * 0
    return first, rows, adapter


@triton.jit
def swizzled(program, blocks, chunks, GROUP_M: tl.constexpr):
    """Row block and column chunk of a program: GROUP_M row blocks share the columns that L2 holds."""
    group = program // (GROUP_M * chunks)
    inside = program % (GROUP_M * chunks)
    height = tl.minimum(blocks - group * GROUP_M, GROUP_M)
    return group * GROUP_M + inside % height, inside // height


@triton.jit
def afresh(never, skew):
    """skew, which is 0, as a value that the compiler cannot know: addresses built on it are computed again where they
    are used instead of living in registers through a K loop. Without it every 128x128 tile spilled (968 bytes on sm_80)."""
    return tl.multiple_of(tl.where(never, 16, skew), 16)


@triton.jit
def base_product(acc, x_rows, w_cols, row_ok, col_ok, K, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr):
    """acc + x Wᵀ; x_rows [BM, 1] and w_cols [1, BN] point to the starts of rows."""
    for k in range(0, K, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        x = loaded(x_rows + ks[None, :], row_ok[:, None] & (ks < K)[None, :], UPCAST)
        w = loaded(w_cols + ks[:, None], (ks < K)[:, None] & col_ok[None, :], UPCAST)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


@triton.jit
def start_tile(
    residual, first, lanes, cols, row_ok, col_ok, stride_residual,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """The accumulator before the first product: the residual, or zeros. Added at the end it would cost registers while
    the last products still hold theirs: 128x128 tiles spilled on sm_89, 90, 100 and 120."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if HAS_RESIDUAL:
        near = residual + first.to(tl.int64) * stride_residual + (lanes[:, None] * stride_residual + cols[None, :])
        acc += tl.load(near, mask=row_ok[:, None] & col_ok[None, :], other=0.0).to(tl.float32)
    return acc


@triton.jit
def write_tile(acc, out, bias, first, lanes, cols, row_ok, col_ok, stride_out, HAS_BIAS: tl.constexpr):
    """acc + bias, rounded once."""
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    there = out + first.to(tl.int64) * stride_out + (lanes[:, None] * stride_out + cols[None, :])
    tl.store(there, acc.to(out.dtype.element_ty), mask=row_ok[:, None] & col_ok[None, :])


@triton.jit(do_not_specialize=["M", "blocks", "slices", "nt"])
def onepass_kernel(
    x, w, a, b, scale, ranks, table, bias, residual, out,
    M, N, K, blocks, slices, nt, stride_x, stride_out, stride_residual,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    GROUPED: tl.constexpr, LOWRANK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """The whole layer in one launch. LOWRANK 0: the same tiles without an adapter, the measure of the off switch."""
    width = N // slices
    tiles = tl.cdiv(width, BLOCK_N)
    chunks = tl.cdiv(tiles, nt)
    m_block, chunk = swizzled(tl.program_id(0), blocks, chunks * slices, GROUP_M)
    part = chunk // chunks
    tile = (chunk % chunks) * nt
    first, count, adapter = row_block(table, m_block, M, BLOCK_M, GROUPED)
    if count > 0:
        lanes = tl.arange(0, BLOCK_M)
        row_ok = lanes < count
        x_rows = x + first.to(tl.int64) * stride_x + lanes[:, None] * stride_x
        end = tl.minimum(tile + nt, tiles)
        offs_n = tl.arange(0, BLOCK_N)
        offs_r = tl.arange(0, R)
        kind: tl.constexpr = tl.float32 if UPCAST else x.dtype.element_ty
        s = tl.zeros([BLOCK_M, R], dtype=kind)
        rank = tl.load(ranks + tl.maximum(adapter, 0))
        late = afresh(rank < 0, 0)
        rank_ok = offs_r < 0
        b_rows = b + offs_r[:, None]
        if LOWRANK:  # noqa: SIM102, decided by the compiler, and the next by the GPU
            if adapter >= 0:
                at = (adapter * slices + part).to(tl.int64)
                rank_ok = offs_r < rank
                b_rows = b + adapter.to(tl.int64) * N * R + offs_r[:, None]
                a_cols = a + at * R * K + offs_r[None, :] * K
                inside = tile * BLOCK_N + offs_n
                col_ok = inside < width
                cols = part * width + inside
                w_cols = w + cols[None, :] * K
                acc = start_tile(
                    residual, first, lanes, cols, row_ok, col_ok, stride_residual, BLOCK_M, BLOCK_N, HAS_RESIDUAL
                )
                total = tl.zeros([BLOCK_M, R], dtype=tl.float32)
                for k in range(0, K, BLOCK_K):
                    ks = k + tl.arange(0, BLOCK_K)
                    k_ok = ks < K
                    xs = loaded(x_rows + ks[None, :], row_ok[:, None] & k_ok[None, :], UPCAST)
                    ws = loaded(w_cols + ks[:, None], k_ok[:, None] & col_ok[None, :], UPCAST)
                    al = loaded(a_cols + ks[:, None], k_ok[:, None] & rank_ok[None, :], UPCAST)
                    acc = tl.dot(xs, ws, acc, input_precision="ieee")
                    total = tl.dot(xs, al, total, input_precision="ieee")
                strength = tl.load(scale + at * (R // 16) + offs_r // 16)
                s = rounded(total * strength[None, :], kind, UPCAST)
                bs = loaded(b_rows + cols[None, :] * R, rank_ok[:, None] & col_ok[None, :], UPCAST)
                acc = tl.dot(s, bs, acc, input_precision="ieee")
                there = lanes + late
                write_tile(acc, out, bias, first, there, cols, there < count, col_ok, stride_out, HAS_BIAS)
                tile += 1
        skew = 0
        for n_tile in range(tile, end):
            skew = afresh(n_tile < 0, skew)
            here = lanes + skew
            inside = n_tile * BLOCK_N + offs_n
            col_ok = inside < width
            cols = part * width + inside
            w_cols = w + cols[None, :] * K
            acc = start_tile(
                residual, first, here, cols, here < count, col_ok, stride_residual, BLOCK_M, BLOCK_N, HAS_RESIDUAL
            )
            acc = base_product(acc, x_rows + skew, w_cols, here < count, col_ok, K, BLOCK_K, UPCAST)
            if LOWRANK:
                # without an adapter s and b are zeros, and adding them leaves every bit of acc
                bs = loaded(b_rows + skew + cols[None, :] * R, rank_ok[:, None] & col_ok[None, :], UPCAST)
                acc = tl.dot(s, bs, acc, input_precision="ieee")
            there = here + late
            write_tile(acc, out, bias, first, there, cols, there < count, col_ok, stride_out, HAS_BIAS)


@triton.jit(do_not_specialize=["M", "blocks", "slices"])
def shrink_kernel(
    x, a, ranks, table, s,
    M, K, blocks, slices, stride_x,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SUB: tl.constexpr, SPLIT: tl.constexpr,
    GROUPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """s[i, m, p] = x Aᵀ over the i-th of SPLIT parts of K, fp32. A row block is SUB programs of BLOCK_M rows.

    Lanes beyond the adapter's rank are 0. Rows without an adapter are left as they were: `expand` does not read them.
    """
    program = tl.program_id(0)
    part = tl.program_id(1)
    split = tl.program_id(2)
    first, count, adapter = row_block(table, program // SUB, M, BLOCK_M * SUB, GROUPED)
    lanes = (program % SUB) * BLOCK_M + tl.arange(0, BLOCK_M)
    if (adapter >= 0) & ((program % SUB) * BLOCK_M < count):
        row_ok = lanes < count
        offs_r = tl.arange(0, R)
        rank_ok = offs_r < tl.load(ranks + adapter)
        at = (adapter * slices + part).to(tl.int64)
        a_cols = a + at * R * K + offs_r[None, :] * K
        x_rows = x + first.to(tl.int64) * stride_x + lanes[:, None] * stride_x
        span = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT) * BLOCK_K
        total = tl.zeros([BLOCK_M, R], dtype=tl.float32)
        for k in range(split * span, tl.minimum(K, split * span + span), BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            xs = loaded(x_rows + ks[None, :], row_ok[:, None] & (ks < K)[None, :], UPCAST)
            al = loaded(a_cols + ks[:, None], (ks < K)[:, None] & rank_ok[None, :], UPCAST)
            total = tl.dot(xs, al, total, input_precision="ieee")
        place = ((split * M + first).to(tl.int64) * slices + part) * R + (lanes * slices * R)[:, None] + offs_r[None, :]
        tl.store(s + place, total, mask=row_ok[:, None])


@triton.jit(do_not_specialize=["M", "blocks", "slices"])
def expand_kernel(
    x, w, s, b, scale, ranks, table, bias, residual, out,
    M, N, K, blocks, slices, stride_x, stride_out, stride_residual,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr, GROUPED: tl.constexpr, BASE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The layer from the output of `shrink`. BASE 0: only the low-rank term, to be added to `residual` (convolutions)."""
    width = N // slices
    tiles = tl.cdiv(width, BLOCK_N)
    m_block, chunk = swizzled(tl.program_id(0), blocks, tiles * slices, GROUP_M)
    part = chunk // tiles
    first, count, adapter = row_block(table, m_block, M, BLOCK_M, GROUPED)
    if count > 0:
        lanes = tl.arange(0, BLOCK_M)
        row_ok = lanes < count
        inside = (chunk % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        col_ok = inside < width
        cols = part * width + inside
        acc = start_tile(residual, first, lanes, cols, row_ok, col_ok, stride_residual, BLOCK_M, BLOCK_N, HAS_RESIDUAL)
        rank = tl.load(ranks + tl.maximum(adapter, 0))
        if adapter >= 0:
            kind: tl.constexpr = tl.float32 if UPCAST else b.dtype.element_ty
            at = (adapter * slices + part).to(tl.int64)
            s_rows = s + (first.to(tl.int64) * slices + part) * R + lanes[:, None] * slices * R
            b_cols = b + adapter.to(tl.int64) * N * R + cols[None, :] * R
            # 16 ranks at once: all of S in fp32 at R = 128 spilled 976 bytes on sm_89, 32 ranks at once still 72;
            # 8 to 16 at R = 32 (triton 3.7.1)
            STEP: tl.constexpr = 16
            for start in tl.range(0, R, STEP, num_stages=1):
                offs_r = start + tl.arange(0, STEP)
                rank_ok = offs_r < rank
                mask = row_ok[:, None] & rank_ok[None, :]
                total = tl.load(s_rows + offs_r[None, :], mask=mask, other=0.0)
                for i in tl.static_range(1, SPLIT):
                    more = s_rows + i * M.to(tl.int64) * slices * R
                    total += tl.load(more + offs_r[None, :], mask=mask, other=0.0)
                strength = tl.load(scale + at * (R // 16) + offs_r // 16)
                low = rounded(total * strength[None, :], kind, UPCAST)
                bs = loaded(b_cols + offs_r[:, None], rank_ok[:, None] & col_ok[None, :], UPCAST)
                acc = tl.dot(low, bs, acc, input_precision="ieee")
        if BASE:
            x_rows = x + first.to(tl.int64) * stride_x + lanes[:, None] * stride_x
            w_cols = w + cols[None, :] * K
            acc = base_product(acc, x_rows, w_cols, row_ok, col_ok, K, BLOCK_K, UPCAST)
        there = lanes + afresh(rank < 0, 0)
        write_tile(acc, out, bias, first, there, cols, there < count, col_ok, stride_out, HAS_BIAS)


def onepass(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, *,
    tile: Tile, nt: int = 1, table: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None,
    low_rank: bool = True,
) -> Tensor:  # fmt: skip
    """The layer in one launch; a program computes S once for `nt` tiles of columns. low_rank=False: without adapters."""
    rank = check_linear(x, w, a, b, scale, ranks, table, bias, residual)
    rows, width, slices = x.shape[0], w.shape[0], a.shape[1]
    out = empty_out(x, (rows, width))
    blocks = len(table) if table is not None else triton.cdiv(rows, tile.block_m)
    chunks = triton.cdiv(triton.cdiv(width // slices, tile.block_n), nt) * slices
    if rows and blocks and width:
        onepass_kernel[(blocks * chunks,)](
            x, w, a, b, scale, ranks, table if table is not None else ranks,
            bias if bias is not None else w, residual if residual is not None else x, out,
            rows, width, x.shape[1], blocks, slices, nt, x.stride(0), width,
            residual.stride(0) if residual is not None else 0,
            R=rank, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
            GROUPED=table is not None, LOWRANK=low_rank, HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None, UPCAST=upcast(x.dtype), **options(tile),
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
        shrink_kernel[(blocks * (block_m // tile.block_m), slices, split)](
            x, a, ranks, table if table is not None else ranks, s,
            rows, depth, blocks, slices, x.stride(0),
            R=rank, BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, SUB=block_m // tile.block_m, SPLIT=split,
            GROUPED=table is not None, UPCAST=upcast(x.dtype), **options(tile),
        )  # fmt: skip
    return s


def expand(
    x: Tensor, w: Tensor, s: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, *,
    tile: Tile, table: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The layer from `s`, the output of `shrink`: the accumulator starts from the low-rank term."""
    check_linear(x, w, a, b, scale, ranks, table, bias, residual)
    check_shape("s", s, (s.shape[0], x.shape[0], *a.shape[1:3]))
    return _expand(x, w, s, b, scale, ranks, tile=tile, table=table, bias=bias, residual=residual)


def add_expanded(
    y: Tensor, s: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, *, tile: Tile, table: Tensor | None = None
) -> Tensor:
    """y + (scale ⊙ s) Bᵀ for y [M, N] with rows that may lie apart: the second half of a convolution's adapter."""
    check_floats(y=y, b=b)
    check_rows("y", y)
    check_shape("s", s, (s.shape[0], y.shape[0], 1, b.shape[2]))
    return _expand(y, b, s, b, scale, ranks, tile=tile, table=table, bias=None, residual=y, base=False)


def split(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, *,
    tile: Tile, parts: int = 1, table: Tensor | None = None, bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The layer in two launches. parts: of K, in the first."""
    s = shrink(x, a, ranks, block_m=tile.block_m, table=table, split=parts)
    return expand(x, w, s, a, b, scale, ranks, tile=tile, table=table, bias=bias, residual=residual)


def _expand(
    x: Tensor, w: Tensor, s: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, *,
    tile: Tile, table: Tensor | None, bias: Tensor | None, residual: Tensor | None, base: bool = True,
) -> Tensor:  # fmt: skip
    parts, rows, slices, rank = s.shape
    width = b.shape[1]
    check_packed(s=s, b=b, scale=scale, ranks=ranks, table=table)
    out = empty_out(x, (rows, width))
    blocks = len(table) if table is not None else triton.cdiv(rows, tile.block_m)
    tiles = triton.cdiv(width // slices, tile.block_n) * slices
    if rows and blocks and width:
        expand_kernel[(blocks * tiles,)](
            x, w, s, b, scale, ranks, table if table is not None else ranks,
            bias if bias is not None else w, residual if residual is not None else x, out,
            rows, width, x.shape[1], blocks, slices, x.stride(0), width,
            residual.stride(0) if residual is not None else 0,
            R=rank, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
            SPLIT=parts, GROUPED=table is not None, BASE=base, HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None, UPCAST=upcast(x.dtype), **options(tile),
        )  # fmt: skip
    return out.to(x.dtype)
