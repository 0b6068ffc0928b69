"""Operands of wide layers, y = [x | S]·[W | B]ᵀ: whoever writes x leaves room for S behind each row, and S = x Aᵀ is put there.

LayerNorm is a Triton kernel, one pass over rows that may lie apart; so are GEGLU (`gated`) and group norm (`norms`). The
shrink is a product of cuBLAS that writes its columns in place: on an H100 it takes 3.4 to 6.5 µs where shrinking inside the
kernel that writes x cost 5 to 120 more than that kernel alone (`benchmarks/results/h100_widen.txt`). The A of an image has its
strengths in it.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, import-untyped"
import torch
import triton
import triton.language as tl
from torch import Tensor

from stepforge.kernels import gated, norms
from stepforge.kernels.launch import check_floats, check_rows, check_shape, empty_out, require


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


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, pre: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """LayerNorm of x + pre, x [M, C] with rows that may lie apart, pre [C]. Returns [M, C]: `out`, if it is given."""
    check_floats(x=x, weight=weight, bias=bias, pre=pre)
    check_rows("x", x)
    rows, width = x.shape
    for name, vector in (("weight", weight), ("bias", bias), ("pre", pre)):
        if vector is not None:
            check_shape(name, vector, (width,))
    if out is not None:
        check_shape("out", out, (rows, width))
        check_rows("out", out)
    into = out if out is not None and empty_out(x, ()).dtype == out.dtype else empty_out(x, (rows, width))
    if into.numel():
        block_c = triton.next_power_of_2(width)
        block_m = max(1, 2048 // block_c)
        layer_norm_kernel[(triton.cdiv(rows, block_m),)](
            x, pre if pre is not None else weight, weight, bias, into, rows, width, x.stride(0), into.stride(0), eps,
            BLOCK_M=block_m, BLOCK_C=block_c, PRE=pre is not None, enable_fp_fusion=True,
        )  # fmt: skip
    if out is None:
        return into.to(x.dtype)
    return out if into is out else out.copy_(into)


def widen(
    x: Tensor, a: Tensor, *, norm: tuple[Tensor, Tensor, float] | None = None, gate: bool = False,
    pre: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[value | value Aᵀ] [M, K + L], as in `reference.widen`. norm: weight, bias and eps of LayerNorm."""
    require(norm is None or not gate, "LayerNorm and GEGLU exclude each other")
    require(pre is None or not gate, "pre is added to rows that are not gated")
    require(a.ndim == 3, f"a has shape {tuple(a.shape)}; it must be [images, L, K]")
    check_rows("x", x)
    rows, depth = x.shape[0], x.shape[1] // 2 if gate else x.shape[1]
    images, width = a.shape[:2]
    check_floats(x=x, a=a, pre=pre)
    check_shape("a", a, (images, width, depth))
    require(rows % images == 0, f"{rows} rows do not divide into {images} images")
    out = torch.empty(rows, depth + width, device=x.device, dtype=x.dtype)
    value = out[:, :depth]
    if gate:
        gated.geglu(x, out=value)
    elif norm is not None:
        layer_norm(x, *norm, pre=pre, out=value)
    else:
        torch.add(x, pre, out=value) if pre is not None else value.copy_(x)
    shrink(out, a)
    return out


def shrink(rows: Tensor, a: Tensor) -> None:
    """Put S of rows [M, K + L] behind their first K columns, a [images, L, K]."""
    each = rows.view(len(a), -1, rows.shape[1])
    torch.bmm(each[..., : a.shape[2]], a.transpose(1, 2), out=each[..., a.shape[2] :])


def widen_norm(
    x: Tensor, a: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *,
    silu: bool = False, other: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None,
    extra: Tensor | None = None, keep: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """[y | y Aᵀ] [M, C + L] of a group norm's y, pixels as rows, and what `norms.group_norm` keeps; a [B, L, C]."""
    batch, _, height, width = x.shape
    require(a.ndim == 3, f"a has shape {tuple(a.shape)}; it must be [images, L, K]")
    check_floats(x=x, a=a)
    check_shape("a", a, (batch, a.shape[1], len(weight)))
    rows = torch.empty(batch * height * width, len(weight) + a.shape[1], device=x.device, dtype=x.dtype)
    image = rows.view(batch, height, width, -1)[..., : len(weight)].permute(0, 3, 1, 2)
    _, total = norms.group_norm(
        x,
        weight,
        bias,
        groups,
        eps,
        silu=silu,
        other=other,
        shift=shift,
        residual=residual,
        extra=extra,
        keep=keep,
        out=image,
    )
    shrink(rows, a)
    return rows, total
