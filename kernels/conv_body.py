"""Triton body of the low-rank convolution's first half; its second half is `lowrank_body.expand` on the base output.

    s[m, p] = Σ_{i, j, c} x[image, stride·h + i − pad, stride·w + j − pad, c] · A[p, i, j, c],   m = (image, h, w)

An implicit GEMM over NHWC: the taps (i, j) and blocks of channels form one K loop and no patch is written to memory.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, import-untyped"
import triton
import triton.language as tl

from stepforge.kernels.lowrank_body import loaded, row_block


@triton.jit(do_not_specialize=["M", "blocks", "height", "width", "out_height", "out_width", "stride", "pad"])
def conv_shrink(
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
