"""How far a kernel may be from the exact result: error bounds for every element, with nothing tuned.

The standard model of floating point (Higham, Accuracy and Stability of Numerical Algorithms, ch. 2 and 3): one rounding
costs a factor 1 + u, a sum of n products in any order γ(n) = n·u/(1 − n·u) of the sum of their absolute values, and
below the normal range a rounding costs half a unit of the last place there. Every function takes the quantised inputs
and returns (exact, bound) in fp64.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepforge.kernels import reference

UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
TINY = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134, torch.float32: 2.0**-150}  # half the smallest number
IEEE_SUM = 2.0**-24  # fp32 sums that round to nearest: the interpreter, and CUDA cores
TENSOR_CORE_SUM = 2.0**-23  # tensor cores truncate what they add
STEEPEST = 1.13  # largest slope of silu (1.0998) and gelu (1.1289)
DIRECT = 8  # roundings of an activation in fp32, its erf or exp included


def gamma(n: int, u: float) -> float:
    return n * u / (1 - n * u)


def rounded_to(dtype: Any, exact: Tensor, error: Tensor) -> Tensor:
    """The bound after one rounding to `dtype` of a value that was off by `error`."""
    return UNIT[dtype] * (exact.abs() + error) + error + TINY[dtype]


def accumulated(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor,
    table: Tensor | None, bias: Tensor | None, residual: Tensor | None, u: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The low-rank layer in fp32, before an activation: S rounded once to the inputs' type before the second product."""
    dtype = x.dtype
    x, w, a, b, scale = (tensor.double() for tensor in (x, w, a, b, scale))
    zero = x.new_zeros(())
    bias, residual = (tensor.double() if tensor is not None else zero for tensor in (bias, residual))
    s = reference.low_rank(x, a, scale, ranks, table)
    z = x @ w.T + reference.expand(s, b, ranks, table) + bias
    s_size = reference.low_rank(x.abs(), a.abs(), scale.abs(), ranks, table)
    low = reference.expand(s_size, b.abs(), ranks, table)
    tiny = reference.expand(torch.full_like(s, TINY[dtype]), b.abs(), ranks, table)
    k, r = x.shape[1], a.shape[2]
    size = x.abs() @ w.abs().T + low + bias.abs() + residual.abs()
    rounding = 0.0 if dtype == torch.float32 else UNIT[dtype]
    error = gamma(k + r + 4, u) * size + (1 + gamma(r + 4, u)) * ((rounding + gamma(k + 2, u)) * low + tiny)
    return z + residual, error


def lowrank_linear(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, *,
    table: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None,
    u: float = IEEE_SUM,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """For `reference.lowrank_linear`."""
    z, error = accumulated(x, w, a, b, scale, ranks, table, bias, residual, u)
    return z, rounded_to(x.dtype, z, error)


def bank_shrink(
    x: Tensor, bank: Tensor, adapter: Tensor, strength: Tensor, *, u: float = IEEE_SUM
) -> tuple[Tensor, Tensor]:
    """For `reference.bank_shrink`: a sum of K products, the strength's product, one rounding."""
    dtype, depth = x.dtype, x.shape[2]
    x, bank, strength = (tensor.double() for tensor in (x, bank, strength))
    exact = reference.bank_shrink(x, bank, adapter, strength)
    size = reference.bank_shrink(x.abs(), bank.abs(), adapter, strength.abs())
    return exact, rounded_to(dtype, exact, gamma(depth + 2, u) * size)


def lowrank_geglu(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, *,
    table: Tensor | None = None, bias: Tensor | None = None, u: float = IEEE_SUM,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """For `reference.lowrank_geglu` by kernels that keep both halves in fp32.

    (v + δ)(c + ε) − vc = cδ + vε + δε for c = gelu(g): δ is the error of the layer, ε that of the gate through gelu's
    largest slope and the roundings of gelu itself. Then the product is rounded in fp32.
    """
    h, error = accumulated(x, w, a, b, scale, ranks, table, bias, None, u)
    (v, g), (off_v, off_g) = h.chunk(2, dim=-1), error.chunk(2, dim=-1)
    c = F.gelu(g)
    off_c = STEEPEST * off_g + DIRECT * u * (g.abs() + off_g)
    off = c.abs() * off_v + v.abs() * off_c + off_v * off_c
    return v * c, rounded_to(x.dtype, v * c, off + u * ((v * c).abs() + off) + TINY[torch.float32])


def lowrank_conv(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, *,
    table: Tensor | None = None, stride: int = 1, pad: int = 1, u: float = IEEE_SUM,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """For `reference.lowrank_conv`."""
    dtype = y.dtype
    y, x, a, b, scale = (tensor.double() for tensor in (y, x, a, b, scale))
    exact = reference.lowrank_conv(y, x, a, b, scale, ranks, table, stride, pad)
    nothing = torch.zeros_like(y)
    low = reference.lowrank_conv(nothing, x.abs(), a.abs(), b.abs(), scale.abs(), ranks, table, stride, pad)
    k, r = a[0, 0].numel(), a.shape[1]
    rounding = 0.0 if dtype == torch.float32 else UNIT[dtype]
    error = gamma(r + 2, u) * (y.abs() + low) + (1 + gamma(r + 2, u)) * (rounding + gamma(k + 2, u)) * low
    live = torch.arange(r) < ranks.cpu()[:, None, None]
    error = error + TINY[dtype] * torch.where(live.to(b.device), b.abs(), 0.0).sum(-1).amax(0)
    return exact, rounded_to(dtype, exact, error)


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *,
    silu: bool = True, other: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None,
    extra: Tensor | None = None, keep: bool = False, run: int = 128, u: float = IEEE_SUM,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:  # fmt: skip
    """For `reference.group_norm`: (exact, bound) of y and of the sum. run: additions that one element passes through, the
    longest chain of a sum. keep: y is made of the written sum, which is rounded."""
    dtype = x.dtype
    parts = {"other": other, "shift": shift, "residual": residual, "extra": extra}
    wide: dict[str, Any] = {name: None if part is None else part.double() for name, part in parts.items()}
    size: dict[str, Any] = {name: None if part is None else part.abs() for name, part in wide.items()}
    weight, bias = weight.double(), bias.double()
    z, total = reference.group_norm(x.double(), weight, bias, groups, eps, silu=False, **wide)
    v = x.double() if residual is None else x.double() + wide["residual"]
    size_v = x.double().abs() if residual is None else x.double().abs() + size["residual"]
    if other is not None:
        v, size_v = torch.cat([v, wide["other"]], 1), torch.cat([size_v, size["other"]], 1)
    if shift is not None:
        v, size_v = v + wide["shift"][:, :, None, None], size_v + size["shift"][:, :, None, None]
    sets, lanes = v.reshape(v.shape[0], groups, -1), v.shape[1] // groups

    def of_channels(sets_value: Tensor) -> Tensor:
        return sets_value.repeat_interleave(lanes, 1)[..., None, None]

    mean = of_channels(sets.mean(-1))
    rstd = of_channels((sets.var(-1, correction=0) + eps).rsqrt())
    summed = gamma(4, u) * size_v  # rounding of v, in fp32
    low = x.shape[1]
    total_off = summed[:, :low] + (0.0 if extra is None else 2 * u * (total.abs() + size["extra"][:, None, None]))
    off = of_channels((gamma(run, u) * sets.abs() + summed.reshape(sets.shape)).mean(-1))  # error of the mean
    spread = of_channels((summed.reshape(sets.shape) ** 2).mean(-1)).sqrt() * rstd
    # relative error of rstd: what a wrong mean adds to the variance is squared
    wrong = gamma(2 * run, u) + (off * rstd) ** 2 + 2 * spread
    factor = rstd * weight.abs()[:, None, None]
    read = summed.clone()
    if keep:
        read[:, :low] = total_off + UNIT[dtype] * (total.abs() + total_off) + TINY[dtype] + 2 * u * total.abs()
    error = (
        factor * ((off + read) * (1 + wrong) + (v - mean).abs() * (wrong + 8 * u)) + 8 * u * bias.abs()[:, None, None]
    )
    kept = total, rounded_to(dtype, total, total_off)
    if not silu:
        return (z, rounded_to(dtype, z, error)), kept
    y = F.silu(z)
    return (y, rounded_to(dtype, y, STEEPEST * error + DIRECT * u * (z.abs() + error))), kept


def image_sum(
    x: Tensor, residual: Tensor | None = None, shift: Tensor | None = None, *, scale: int = 1, u: float = IEEE_SUM
) -> tuple[Tensor, Tensor]:
    """For `reference.image_sum`."""
    given: list[Any] = [None if part is None else part.double() for part in (x, residual, shift)]
    sizes: list[Any] = [None if part is None else part.abs() for part in given]
    exact = reference.image_sum(given[0], given[1], given[2], scale)
    return exact, rounded_to(x.dtype, exact, gamma(2, u) * reference.image_sum(sizes[0], sizes[1], sizes[2], scale))


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    pre: Tensor | None = None,
    run: int = 128,
    u: float = IEEE_SUM,
) -> tuple[Tensor, Tensor]:
    """For `reference.layer_norm`."""
    v = x.double() if pre is None else x.double() + pre.double()
    size = x.double().abs() if pre is None else x.double().abs() + pre.double().abs()
    rstd = (v.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    off = gamma(run, u) * v.abs().mean(-1, keepdim=True) + u * size.mean(-1, keepdim=True)
    wrong = gamma(2 * run, u) + (off * rstd) ** 2 + 2 * u * size.amax(-1, keepdim=True) * rstd
    apart = (v - v.mean(-1, keepdim=True)).abs()
    error = (
        rstd * weight.double().abs() * ((off + u * size) * (1 + wrong) + apart * (wrong + 8 * u))
        + 8 * u * bias.double().abs()
    )
    exact = reference.layer_norm(x.double(), weight.double(), bias.double(), eps, None if pre is None else pre.double())
    return exact, rounded_to(x.dtype, exact, error)


def widen(
    x: Tensor, a: Tensor, *, norm: tuple[Tensor, Tensor, float] | None = None, gate: bool = False,
    pre: Tensor | None = None, u: float = IEEE_SUM,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """For `reference.widen`: S is made of the rounded value, whose own bound it inherits through |A|."""
    plain = x.double() if pre is None else x.double() + pre.double()
    zero = plain, torch.zeros_like(plain) if pre is None else rounded_to(x.dtype, plain, u * plain.abs())
    value, off = geglu(x, u=u) if gate else layer_norm(x, *norm, pre=pre, u=u) if norm is not None else zero

    def shrunk(rows: Tensor, down: Tensor) -> Tensor:
        return (rows.unflatten(0, (len(a), -1)) @ down.transpose(1, 2)).flatten(0, 1)

    s = shrunk(value, a.double())
    error = shrunk(off, a.double().abs()) + gamma(a.shape[2] + 2, u) * shrunk(value.abs() + off, a.double().abs())
    return torch.cat([value, s], 1), torch.cat([off, rounded_to(x.dtype, s, error)], 1)


def geglu(h: Tensor, *, u: float = IEEE_SUM) -> tuple[Tensor, Tensor]:
    """For `reference.geglu`."""
    exact = reference.geglu(h.double())
    value, gate = h.double().abs().chunk(2, dim=-1)
    return exact, rounded_to(h.dtype, exact, DIRECT * u * value * gate)


def excess(result: Tensor, exact: Tensor, bound: Tensor) -> float:
    """The largest error in units of its bound: 1 or less is right, and NaN anywhere in `result` is infinite."""
    found = result.double()
    off = (found - exact).abs()
    largest = torch.finfo(result.dtype).max
    over = exact.abs() > largest  # what the type cannot hold must have become infinity of the right sign
    off = torch.where(over & ((found == exact.sign() * torch.inf) | (off <= bound)), 0.0, off)
    ratio = torch.where(off == 0, 0.0, off / bound)
    return float(torch.nan_to_num(ratio, nan=torch.inf).max()) if ratio.numel() else 0.0
