"""Operators that `passes.sums` makes: images [B, C, H, W] as rows of pixels, sums in place, norms of sums."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepforge.kernels import ops as kernels


def rows_of(image: Tensor) -> Tensor:
    """Pixels by channels [B·H·W, C]: a view of an image in channels last, whose pixels may lie apart."""
    return image.permute(0, 2, 3, 1).flatten(0, 2)


def image_of(rows: Tensor, like: Tensor) -> Tensor:
    """[B, C, H, W] of pixels by channels, B, H and W as in another image."""
    return rows.unflatten(0, (len(like), *like.shape[2:])).permute(0, 3, 1, 2)


def pointwise(x: Tensor, w: Tensor, bias: Tensor = None) -> Tensor:
    """A 1×1 convolution, w [out, in]."""
    return image_of(F.linear(rows_of(x), w, bias), x)


def accumulate(x: Tensor, w: Tensor, base: Tensor, bias: Tensor = None) -> Tensor:
    """base + x wᵀ + bias, in base's memory where its rows are dense: nobody reads base afterwards."""
    image = base.ndim == 4
    into = base.permute(0, 2, 3, 1) if image else base
    try:
        flat = into.view(-1, into.shape[-1])
    except RuntimeError:  # pixels that do not follow one another at one distance
        into = into.contiguous()
        flat = into.view(-1, into.shape[-1])
    source = rows_of(x) if x.ndim == 4 else x
    if bias is not None:
        flat.add_(bias)
    flat.addmm_(source.reshape(-1, source.shape[-1]), w.T)
    return into.permute(0, 3, 1, 2) if image else into


def norm(x: Tensor, weight: Tensor, bias: Tensor, other: Tensor, shift: Tensor, residual: Tensor, extra: Tensor, *,
         groups: int, epsilon: float, silu: bool, first: int = 0, keep: bool = False) -> Any:  # fmt: skip
    """Group norm of [x + residual | other] + shift; with keep also x + residual + shift + extra."""
    image = x if x.ndim == 4 else x[..., None]
    if residual is not None and residual.ndim == 3:
        residual = residual[..., None]
    sources: dict[str, Any] = {"other": other, "shift": shift, "residual": residual, "extra": extra}
    y, total = kernels.group_norm(image, weight, bias, groups, epsilon, silu=silu, **sources, keep=keep)
    y = y.reshape(x.shape) if x.ndim != 4 else y
    return (y, total) if keep else y


def widen_norm(x: Tensor, weight: Tensor, bias: Tensor, other: Tensor, shift: Tensor, residual: Tensor, extra: Tensor,
               a: Tensor, *, groups: int, epsilon: float, silu: bool, first: int = 0, keep: bool = False,
               tokens: bool = False) -> Any:  # fmt: skip
    """[y | y Aᵀ] of `norm`'s y, an image [B, C + L, H, W] or tokens [B, H·W, C + L]; with keep also its sum."""
    sources: dict[str, Any] = {"other": other, "shift": shift, "residual": residual, "extra": extra}
    rows, total = kernels.widen_norm(x, a, weight, bias, groups, epsilon, silu=silu, **sources, keep=keep)
    y = rows.unflatten(0, (len(x), -1)) if tokens else image_of(rows, x)
    return (y, total) if keep else y


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, pre: Tensor = None, *, epsilon: float) -> Tensor:
    return kernels.layer_norm(x, weight, bias, epsilon, pre=pre)


def total(x: Tensor, residual: Tensor, shift: Tensor, sizes: Any = None, *, scale: int = 1) -> Tensor:
    """x + residual + shift, every pixel `scale` times in each direction, or as nearest upsampling to `sizes` has it."""
    if sizes is not None:
        height, width = (int(size) for size in sizes[2:])
        scale = 2 if (height, width) == (2 * x.shape[2], 2 * x.shape[3]) else 1
    y = kernels.image_sum(x, residual, shift, scale=scale)
    if sizes is not None and tuple(y.shape[2:]) != (height, width):  # sides that are not even
        y = F.interpolate(y, size=(height, width), mode="nearest")
    return y


def columns(x: Tensor, *, start: int, end: int) -> Tensor:
    return x[:, start:end]


def strengths(columns: Tensor, strength: Tensor) -> Tensor:
    """fp32 [rows, L] of 0/1 [rows, L] and [rows, 1, 1]."""
    return (columns * strength.reshape(-1, 1)).float()


def scaled_columns(a: Tensor, strength: Tensor, *, slices: int) -> Any:
    """The A of n layers [n, slices · L, K], times the strength of each image [rows, L]: n values [rows, slices · L, K]."""
    scaled = a.new_empty(len(a), len(strength), *a.shape[1:])
    each = strength[None, :, None, :, None]
    torch.mul(a.unflatten(1, (1, slices, -1)), each, out=scaled.unflatten(2, (slices, -1)))  # in fp32, rounded once
    return scaled.unbind(0) if len(scaled) > 1 else scaled[0]


def widen(x: Tensor, a: Tensor, weight: Tensor, bias: Tensor, pre: Tensor, *, epsilon: float = 0.0,
          gate: bool = False) -> Tensor:  # fmt: skip
    """[value | value Aᵀ] of x [rows, tokens, K] or [rows, K]."""
    norm = (weight, bias, epsilon) if weight is not None else None
    if x.ndim == 4:
        return image_of(kernels.widen(rows_of(x), a, pre=pre), x)
    return kernels.widen(x, a, norm=norm, gate=gate, pre=pre)


def shift(vector: Tensor, w: Tensor) -> Tensor:
    """[out] of a vector [in] that a 1×1 convolution's source lacks; w [out, in, 1, 1]."""
    return F.linear(vector, w.flatten(1))


def wide_conv(x: Tensor, w: Tensor, up: Tensor, other: Tensor = None, shift: Tensor = None, bias: Tensor = None, *,
              stride: int, pad: int, first: int = 0) -> Tensor:  # fmt: skip
    """conv(v, W) + conv(v, A) B, v = [x | other], by one convolution with the channels [W; A] and one product on them in place.

    w [N + L, C, k, k], up [rows, L, N] with the strengths of each row. With `other` the convolution is 1×1: two products that
    add up, from shift [N + L], and x has `first` channels. Returns [rows, N, h, w], the first channels of N + L.
    """
    if other is not None:
        matrix = w.flatten(1)
        both = F.linear(rows_of(x), matrix[:, :first], shift).addmm_(rows_of(other), matrix[:, first:].T)
        pixels = both.unflatten(0, (len(x), *x.shape[2:]))
    else:
        pixels = F.conv2d(x, w, None, stride, pad).permute(0, 2, 3, 1)
        if not pixels.is_contiguous():
            pixels = pixels.contiguous()
    rows, width = len(pixels), up.shape[2]
    flat = pixels.view(rows, -1, pixels.shape[-1])
    y = flat[..., :width]
    y.baddbmm_(flat[..., width:], up)
    if bias is not None:
        y.add_(bias)
    return pixels[..., :width].permute(0, 3, 1, 2)


OPS: dict[str, Any] = {
    "WideConv": wide_conv, "Shift": shift,
    "Strengths": strengths, "Widen": widen, "ScaledColumns": scaled_columns,
    "Pointwise": pointwise, "Accumulate": accumulate, "Norm": norm, "WidenNorm": widen_norm, "LayerNorm": layer_norm,
    "Sum": total, "Columns": columns,
}  # fmt: skip
