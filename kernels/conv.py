"""Adapters of convolutions: the base convolution stays cuDNN's, its output gets the low-rank term added.

The first half is here, an implicit GEMM; the second is `lowrank.expand` on the base output.

    s[m, p] = Σ_{i, j, c} x[image, stride·h + i − pad, stride·w + j − pad, c] · A[p, i, j, c],   m = (image, h, w)

An implicit GEMM over NHWC: the taps (i, j) and blocks of channels form one K loop and no patch is written to memory.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, import-untyped"
import torch
import triton
import triton.language as tl
from torch import Tensor

from stepforge.kernels.dispatch.tiles import Tile, shrink_tile
from stepforge.kernels.launch import check_bank, check_floats, check_packed, check_shape, options, require, upcast
from stepforge.kernels.lowrank import add_expanded, loaded, row_block


@triton.jit(do_not_specialize=["M", "blocks", "height", "width", "out_height", "out_width", "stride", "pad"])
def conv_shrink_kernel(
    x, a, ranks, table, s,
    M, C, blocks, height, width, out_height, out_width, stride, pad,
    R: tl.constexpr, SIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SUB: tl.constexpr,
    GROUPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x NHWC, a [L, R, SIDE, SIDE, C]; s fp32 [M, R], rows without an adapter untouched."""
    program = tl.program_id(0)
    first, count, adapter = row_block(table, program // SUB, M, BLOCK_M * SUB, GROUPED)
    lanes = (program % SUB) * BLOCK_M + tl.arange(0, BLOCK_M)
    if (adapter >= 0) & ((program % SUB) * BLOCK_M < count):
        row_ok = lanes < count
        rows = first + lanes
        area = out_height * out_width
        image = rows // area
        top = (rows % area) // out_width * stride - pad
        left = rows % out_width * stride - pad
        offs_r = tl.arange(0, R)
        rank_ok = offs_r < tl.load(ranks + adapter)
        a_cols = a + adapter.to(tl.int64) * R * SIDE * SIDE * C + offs_r[None, :] * (SIDE * SIDE * C)
        c_blocks = tl.cdiv(C, BLOCK_K)
        total = tl.zeros([BLOCK_M, R], dtype=tl.float32)
        for turn in range(SIDE * SIDE * c_blocks):
            tap = turn // c_blocks
            cs = (turn % c_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
            y = top + tap // SIDE
            z = left + tap % SIDE
            inside = row_ok & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            x_rows = x + ((image.to(tl.int64) * height + y) * width + z)[:, None] * C
            xs = loaded(x_rows + cs[None, :], inside[:, None] & (cs < C)[None, :], UPCAST)
            al = loaded(a_cols + (tap * C + cs)[:, None], (cs < C)[:, None] & rank_ok[None, :], UPCAST)
            total = tl.dot(xs, al, total, input_precision="ieee")
        place = first.to(tl.int64) * R + lanes[:, None] * R + offs_r[None, :]
        tl.store(s + place, total, mask=row_ok[:, None])


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
        conv_shrink_kernel[(blocks * (block_m // tile.block_m),)](
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
