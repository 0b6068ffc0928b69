"""Shrink over the LoRA banks that exported graphs take as inputs: Triton body and launcher.

    S[g, t, r] = strength[g] · Σ_k x[g, t, k] · A[adapter[g], k, r]

Row g of a call reads its slot of the bank in place: a graph of ONNX operators gathers a copy of A for every row first, rounds
the product, and multiplies by the strength in a pass of its own. Slot 0 holds zeros, so that rows without an adapter get zeros.

Arguments stand as TensorRT passes them to plugins compiled ahead of time (`export/engines/plugin.py`): input tensors, then
integers, then the output. Strengths are a tensor, since such plugins take no floating-point arguments.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, import-untyped"
import torch
import triton
import triton.language as tl
from torch import Tensor

from stepforge.kernels.dispatch.tiles import bank_tile
from stepforge.kernels.launch import check_floats, check_packed, check_shape, empty_out, options, require, upcast
from stepforge.kernels.lowrank import loaded


@triton.jit(do_not_specialize=["tokens"])
def bank_shrink_kernel(
    x, bank, adapter, strength, tokens, K, R, s,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program a block of tokens, a row of the call and a block of ranks."""
    row = tl.program_id(1)
    at_t = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    at_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    t_ok, r_ok = at_t < tokens, at_r < R
    slot = tl.load(adapter + row).to(tl.int64)
    lines = x + (row.to(tl.int64) * tokens + at_t)[:, None] * K
    columns = bank + slot * K * R + at_r[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        xs = loaded(lines + ks[None, :], t_ok[:, None] & (ks < K)[None, :], UPCAST)
        al = loaded(columns + ks[:, None] * R, (ks < K)[:, None] & r_ok[None, :], UPCAST)
        total = tl.dot(xs, al, total, input_precision="ieee")
    total *= tl.load(strength + row)
    place = (row.to(tl.int64) * tokens + at_t)[:, None] * R + at_r[None, :]
    tl.store(s + place, total.to(s.dtype.element_ty), mask=t_ok[:, None] & r_ok[None, :])


def bank_shrink(x: Tensor, bank: Tensor, adapter: Tensor, strength: Tensor) -> Tensor:
    """x [G, T, K], bank [L, K, R], adapter int32 [G], strength float32 [G]; returns [G, T, R] in x's type.

    Raises ValueError for shapes and types that it does not take.
    """
    require(x.ndim == 3 and bank.ndim == 3, "x must be [G, T, K] and bank [L, K, R]")
    rows, tokens, depth = x.shape
    width = bank.shape[2]
    check_floats(x=x, bank=bank)
    check_shape("bank", bank, (bank.shape[0], depth, width))
    check_shape("adapter", adapter, (rows,))
    check_shape("strength", strength, (rows,))
    require(adapter.dtype == torch.int32 and strength.dtype == torch.float32, "adapter is int32 and strength float32")
    check_packed(x=x, bank=bank, adapter=adapter, strength=strength)
    s = empty_out(x, (rows, tokens, width))
    tile = bank_tile(width)
    if s.numel():
        bank_shrink_kernel[(triton.cdiv(tokens, tile.block_m), rows, triton.cdiv(width, tile.block_n))](
            x, bank, adapter, strength, tokens, depth, width, s,
            BLOCK_M=tile.block_m, BLOCK_R=tile.block_n, BLOCK_K=tile.block_k, UPCAST=upcast(x.dtype), **options(tile),
        )  # fmt: skip
    return s.to(x.dtype)
