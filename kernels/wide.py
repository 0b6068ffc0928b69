"""Operands of wide layers, y = [x | S]·[W | B]ᵀ: whoever writes x writes S = strength ⊙ x Aᵀ behind it.

`widen` makes x in one of three ways, writes it and shrinks it in the same pass: a copy (attention's output), LayerNorm, or
GEGLU. `layer_norm` is LayerNorm alone. The strengths are data, fp32 [images, L]: 0 where a column is not of the image's
adapter. No atomics: where K is divided over programs, `merge` adds the parts in order.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, import-untyped"
import torch
import triton
import triton.language as tl

from stepforge.kernels.launch import Tensor, check_floats, check_rows, check_shape, empty_out, require, upcast
from stepforge.kernels.lowrank import loaded, rounded

COPY, NORM, GATED = 0, 1, 2
PROGRAMS = 132  # programs below which K is divided
ROWS, DEPTH = 16, 128  # rows and columns of a tile of `widen`


@triton.jit(do_not_specialize=["M", "eps"])
def layer_norm_kernel(
    x, pre, weight, bias, out, M, C, stride_x, stride_out, eps,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, PRE: tl.constexpr,
):  # fmt: skip
    """y = (v − mean) · rstd · weight + bias of v = x + pre, a row at a time; BLOCK_C is at least C."""
    first = tl.program_id(0) * BLOCK_M
    lanes = tl.arange(0, BLOCK_M)
    cs = tl.arange(0, BLOCK_C)
    ok = (first + lanes < M)[:, None] & (cs < C)[None, :]
    near = x + first.to(tl.int64) * stride_x + lanes[:, None] * stride_x + cs[None, :]
    v = tl.load(near, mask=ok, other=0.0).to(tl.float32)
    if PRE:
        v += tl.load(pre + cs, mask=cs < C, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(tl.where(ok, v, 0.0), axis=1) / C
    apart = tl.where(ok, v - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(apart * apart, axis=1) / C + eps)
    w = tl.load(weight + cs, mask=cs < C, other=0.0).to(tl.float32)
    y = apart * rstd[:, None] * w[None, :] + tl.load(bias + cs, mask=cs < C, other=0.0).to(tl.float32)[None, :]
    there = out + first.to(tl.int64) * stride_out + lanes[:, None] * stride_out + cs[None, :]
    tl.store(there, y.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["M", "tokens", "span", "eps"])
def widen_kernel(
    x, pre, weight, bias, a, strength, out, parts, M, K, L, tokens, span, stride_x, stride_out, eps,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, MODE: tl.constexpr, PRE: tl.constexpr,
    SPLIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out [M, K + L] = [value | strength ⊙ value Aᵀ], a [L, K]. A program takes `span` columns of K; SPLIT: its sums go to
    parts [splits, M, L]. MODE 1 reads its rows twice, the first time for their mean and variance."""
    first = tl.program_id(0) * BLOCK_M
    part = tl.program_id(1)
    lanes = tl.arange(0, BLOCK_M)
    row_ok = first + lanes < M
    kind: tl.constexpr = tl.float32 if UPCAST else x.dtype.element_ty
    near = x + first.to(tl.int64) * stride_x + lanes[:, None] * stride_x
    there = out + first.to(tl.int64) * stride_out + lanes[:, None] * stride_out
    mean = tl.zeros([BLOCK_M], dtype=tl.float32)
    rstd = tl.zeros([BLOCK_M], dtype=tl.float32)
    if MODE == 1:
        n = 0.0
        for k in range(0, K, BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            ok = row_ok[:, None] & (ks < K)[None, :]
            v = tl.load(near + ks[None, :], mask=ok, other=0.0).to(tl.float32)
            if PRE:
                v += tl.load(pre + ks, mask=ks < K, other=0.0).to(tl.float32)[None, :]
            count = tl.minimum(K - k, BLOCK_K).to(tl.float32)
            middle = tl.sum(tl.where(ok, v, 0.0), axis=1) / count
            apart = tl.where(ok, v - middle[:, None], 0.0)
            delta = middle - mean
            share = count / (n + count)
            mean += delta * share
            rstd += tl.sum(apart * apart, axis=1) + delta * delta * n * share
            n += count
        rstd = 1.0 / tl.sqrt_rn(rstd / K + eps)
    ls = tl.arange(0, BLOCK_L)
    total = tl.zeros([BLOCK_M, BLOCK_L], dtype=tl.float32)
    for k in range(part * span, tl.minimum(K, part * span + span), BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        k_ok = ks < K
        ok = row_ok[:, None] & k_ok[None, :]
        v = tl.load(near + ks[None, :], mask=ok, other=0.0).to(tl.float32)
        if MODE == 1:
            if PRE:
                v += tl.load(pre + ks, mask=k_ok, other=0.0).to(tl.float32)[None, :]
            w = tl.load(weight + ks, mask=k_ok, other=0.0).to(tl.float32)
            v = (v - mean[:, None]) * rstd[:, None] * w[None, :]
            v += tl.load(bias + ks, mask=k_ok, other=0.0).to(tl.float32)[None, :]
        if MODE == 2:
            gate = tl.load(near + K + ks[None, :], mask=ok, other=0.0).to(tl.float32)
            v = v * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
        value = rounded(tl.where(ok, v, 0.0), kind, UPCAST)
        tl.store(there + ks[None, :], value.to(out.dtype.element_ty), mask=ok)
        down = loaded(a + ls[None, :] * K + ks[:, None], k_ok[:, None] & (ls < L)[None, :], UPCAST)
        total = tl.dot(value, down, total, input_precision="ieee")
    s_ok = row_ok[:, None] & (ls < L)[None, :]
    if SPLIT:
        place = parts + (part.to(tl.int64) * M + first) * L + lanes[:, None] * L + ls[None, :]
        tl.store(place, total, mask=s_ok)
    else:
        image = (first + lanes) // tokens
        s = total * tl.load(strength + image[:, None] * L + ls[None, :], mask=s_ok, other=0.0)
        tl.store(there + K + ls[None, :], s.to(out.dtype.element_ty), mask=s_ok)


@triton.jit(do_not_specialize=["M", "tokens", "splits"])
def merge_kernel(
    parts, strength, out, M, K, L, tokens, splits, stride_out, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr
):
    """The columns behind x from the sums of parts of K."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ls = tl.arange(0, BLOCK_L)
    ok = (rows < M)[:, None] & (ls < L)[None, :]
    place = parts + rows[:, None].to(tl.int64) * L + ls[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_L], dtype=tl.float32)
    for i in range(splits):
        total += tl.load(place + i * M.to(tl.int64) * L, mask=ok, other=0.0)
    s = total * tl.load(strength + (rows // tokens)[:, None] * L + ls[None, :], mask=ok, other=0.0)
    tl.store(out + rows[:, None].to(tl.int64) * stride_out + K + ls[None, :], s.to(out.dtype.element_ty), mask=ok)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, pre: Tensor | None = None) -> Tensor:
    """LayerNorm of x + pre, x [M, C] with rows that may lie apart, pre [C]. Returns [M, C]."""
    check_floats(x=x, weight=weight, bias=bias, pre=pre)
    check_rows("x", x)
    rows, width = x.shape
    for name, vector in (("weight", weight), ("bias", bias), ("pre", pre)):
        if vector is not None:
            check_shape(name, vector, (width,))
    out = empty_out(x, (rows, width))
    if out.numel():
        block_c = triton.next_power_of_2(width)
        block_m = max(1, 2048 // block_c)
        layer_norm_kernel[(triton.cdiv(rows, block_m),)](
            x, pre if pre is not None else weight, weight, bias, out, rows, width, x.stride(0), width, eps,
            BLOCK_M=block_m, BLOCK_C=block_c, PRE=pre is not None, enable_fp_fusion=True,
        )  # fmt: skip
    return out.to(x.dtype)


def widen(
    x: Tensor, a: Tensor, strength: Tensor, *, norm: tuple[Tensor, Tensor, float] | None = None, gated: bool = False,
    pre: Tensor | None = None, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """[value | strength ⊙ value Aᵀ] [M, K + L], as in `reference.widen`. norm: weight, bias and eps of LayerNorm of x + pre."""
    require(norm is None or not gated, "LayerNorm and GEGLU exclude each other")
    require(pre is None or norm is not None, "pre is added before LayerNorm")
    check_rows("x", x)
    rows, depth = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
    width = a.shape[0]
    check_floats(x=x, a=a, pre=pre)
    check_shape("a", a, (width, depth))
    require(a.is_contiguous() and strength.is_contiguous(), "a and strength must be contiguous")
    require(strength.dtype == torch.float32, f"strength must be float32, not {strength.dtype}")
    check_shape("strength", strength, (strength.shape[0], width))
    require(rows % strength.shape[0] == 0, f"{rows} rows do not divide into {strength.shape[0]} images")
    out = empty_out(x, (rows, depth + width))
    if not rows:
        return out.to(x.dtype)
    tokens = rows // strength.shape[0]
    blocks, chunks = triton.cdiv(rows, ROWS), triton.cdiv(depth, DEPTH)
    count = splits or max(1, min(PROGRAMS // blocks, chunks, 16))
    span = triton.cdiv(chunks, count) * DEPTH
    count = triton.cdiv(depth, span)
    weight, bias, eps = norm or (a, a, 0.0)
    parts = torch.empty(count if count > 1 else 0, rows, width, device=x.device, dtype=torch.float32)
    block_l = max(16, triton.next_power_of_2(width))
    widen_kernel[(blocks, count)](
        x, pre if pre is not None else weight, weight, bias, a, strength, out, parts, rows, depth, width, tokens, span,
        x.stride(0), depth + width, eps, BLOCK_M=ROWS, BLOCK_K=DEPTH, BLOCK_L=block_l,
        MODE=NORM if norm else GATED if gated else COPY, PRE=pre is not None, SPLIT=count > 1, UPCAST=upcast(x.dtype),
        num_warps=4, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
    if count > 1:
        merge_kernel[(triton.cdiv(rows, ROWS),)](
            parts, strength, out, rows, depth, width, tokens, count, depth + width, BLOCK_M=ROWS, BLOCK_L=block_l
        )
    return out.to(x.dtype)
