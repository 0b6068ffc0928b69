"""Triton body of GEGLU on the output of its low-rank up-projection; see `stepforge.kernels.reference.lowrank_geglu`.

    y = v · gelu(g),   [v | g] = x Wᵀ + (scale ⊙ x Aᵀ) Bᵀ + bias

One program holds the values and the gates of the same columns, so that neither is written to memory: y is rounded once,
and no row of 2N columns exists. The rows of w, b and bias stay as the model has them, values first.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, import-untyped"
import triton
import triton.language as tl

from stepforge.kernels.lowrank_body import activate, loaded, rounded, row_block, swizzled, write_tile


@triton.jit(do_not_specialize=["M", "blocks"])
def expand_geglu(
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
        y = value * activate(gate, 2)
        write_tile(y, out, bias, first, lanes, cols, row_ok, col_ok, stride_out, False, 0)
