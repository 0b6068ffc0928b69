"""What each kernel computes, in plain PyTorch: the CPU implementation of the operators and the authority of their tests.

All compute in fp64 for fp64 inputs and in fp32 for any other, and round once, to the input's type. Equations are written
once, here; the Triton bodies say only how they divide the work.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the precision that references compute in."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def adapter_rows(table: Tensor | None, rows: int) -> list[tuple[slice, int]]:
    """(rows, adapter) of every row block of a table; without one, all rows on adapter 0."""
    if table is None:
        return [(slice(0, rows), 0)]
    return [(slice(first, first + count), adapter) for first, count, adapter in table.tolist() if count]


def low_rank(x: Tensor, a: Tensor, scale: Tensor, ranks: Tensor, table: Tensor | None) -> Tensor:
    """S[m, p, r] = scale[l, p, r // 16] · Σ_k x[m, k] · A[l, p, r, k], l the adapter of row m; 0 without one.

    x [M, K], a [L, P, R, K], scale [L, P, R/16], ranks [L]; lanes at and above ranks[l] are 0. Returns [M, P, R].
    """
    s = wide(x).new_zeros(x.shape[0], a.shape[1], a.shape[2])
    for rows, adapter in adapter_rows(table, x.shape[0]):
        if adapter >= 0:
            rank = int(ranks[adapter])
            product = torch.einsum("mk,prk->mpr", wide(x[rows]), wide(a[adapter, :, :rank]))
            s[rows, :, :rank] = product * wide(scale[adapter]).repeat_interleave(16, dim=-1)[:, :rank]
    return s


def expand(s: Tensor, b: Tensor, ranks: Tensor, table: Tensor | None) -> Tensor:
    """D[m, n] = Σ_r S[m, p(n), r] · B[l, n, r], p(n) the slice that column n lies in. Returns [M, N]."""
    rows_, slices, _ = s.shape
    width = b.shape[1] // slices
    d = s.new_zeros(rows_, b.shape[1])
    for rows, adapter in adapter_rows(table, rows_):
        if adapter >= 0:
            rank = int(ranks[adapter])
            up = wide(b[adapter, :, :rank]).reshape(slices, width, rank)
            d[rows] = torch.einsum("mpr,pwr->mpw", s[rows, :, :rank], up).flatten(1)
    return d


def bank_shrink(x: Tensor, bank: Tensor, adapter: Tensor, strength: Tensor) -> Tensor:
    """S[g, t, r] = strength[g] · Σ_k x[g, t, k] · A[adapter[g], k, r]. x [G, T, K], bank [L, K, R], adapter and strength [G].

    Returns [G, T, R] in x's type.
    """
    return (wide(x) @ wide(bank)[adapter.long()] * wide(strength)[:, None, None]).to(x.dtype)


def lowrank_linear(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor,
    table: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y = x Wᵀ + (scale ⊙ x Aᵀ) Bᵀ + bias + residual; Hu et al., arXiv:2106.09685, eq. 3.

    x [M, K], w [N, K], a [L, P, R, K], b [L, N, R], bias [N], residual [M, N]. P > 1: w is P
    layers of equal width stacked (q, k, v), each with its own A. Returns [M, N] in x's type.
    """
    y = wide(x) @ wide(w).T + expand(low_rank(x, a, scale, ranks, table), b, ranks, table)
    if bias is not None:
        y = y + wide(bias)
    if residual is not None:
        y = y + wide(residual)
    return y.to(x.dtype)


def lowrank_conv(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor,
    table: Tensor | None = None, stride: int = 1, pad: int = 1,
) -> Tensor:  # fmt: skip
    """y + (scale ⊙ conv(x, A)) Bᵀ: a convolution's adapter, added to the base convolution's output.

    y [B, H', W', N], x [B, H, W, C] (channels last), a [L, R, k, k, C], b [L, N, R], scale [L, 1, R/16]. The table's rows
    are (image, h, w) of y. Returns y's shape in y's type.
    """
    batch, out_height, out_width, width = y.shape
    out = wide(y).clone().reshape(-1, width)
    images = wide(x).permute(0, 3, 1, 2)
    for rows, adapter in adapter_rows(table, out.shape[0]):
        if adapter < 0:
            continue
        rank = int(ranks[adapter])
        kernel = wide(a[adapter, :rank]).permute(0, 3, 1, 2)
        low = F.conv2d(images, kernel, stride=stride, padding=pad).permute(0, 2, 3, 1).reshape(-1, rank)[rows]
        low = low * wide(scale[adapter, 0]).repeat_interleave(16)[:rank]
        out[rows] += low @ wide(b[adapter, :, :rank]).T
    return out.reshape(batch, out_height, out_width, width).to(y.dtype)


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *,
    silu: bool = True, other: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = silu((v − mean)/sqrt(var + eps)·weight + bias) of v = [x + residual | other] + shift, and v + extra of x's channels.

    Wu and He, arXiv:1803.08494, eq. 1. x and residual [B, C1, H, W] and other [B, C − C1, H, W] of either memory format, shift
    [1 or B, C], weight, bias [C], extra [C1]. Returns [B, C, H, W] and [B, C1, H, W], in channels last and x's type.
    """
    v = wide(x) if residual is None else wide(x) + wide(residual)
    v = v if other is None else torch.cat([v, wide(other)], 1)
    if shift is not None:
        v = v + wide(shift)[:, :, None, None]
    y = F.group_norm(v, groups, wide(weight), wide(bias), eps)
    total = v[:, : x.shape[1]] if extra is None else v[:, : x.shape[1]] + wide(extra)[:, None, None]
    y = F.silu(y) if silu else y
    return tuple(each.to(x.dtype).contiguous(memory_format=torch.channels_last) for each in (y, total))  # type: ignore[return-value]


def image_sum(x: Tensor, residual: Tensor | None = None, shift: Tensor | None = None, scale: int = 1) -> Tensor:
    """x + residual + shift, x and residual [B, C, H, W], shift [C]; each pixel `scale` times in each direction."""
    v = wide(x) if residual is None else wide(x) + wide(residual)
    v = v if shift is None else v + wide(shift)[:, None, None]
    v = v.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return v.to(x.dtype).contiguous(memory_format=torch.channels_last)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, pre: Tensor | None = None) -> Tensor:
    """(v − mean)/sqrt(var + eps)·weight + bias of v = x + pre over the last axis; Ba et al., arXiv:1607.06450, eq. 4.
    x [M, C], weight, bias, pre [C]."""
    v = wide(x) if pre is None else wide(x) + wide(pre)
    return F.layer_norm(v, v.shape[-1:], wide(weight), wide(bias), eps).to(x.dtype)


def widen(
    x: Tensor, a: Tensor, norm: tuple[Tensor, Tensor, float] | None = None, gate: bool = False,
    pre: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[value | value Aᵀ]: the left operand of y = [value | S]·[W | B]ᵀ, a low-rank layer as one product.

    x [M, K] ([M, 2K] with gate), a [images, L, K], of which each has M/images rows. value is x + pre, or LayerNorm of it by
    norm = (weight, bias, eps), or GEGLU of x; it is rounded before it is shrunk. Returns [M, K + L].
    """
    added = x if pre is None else (wide(x) + wide(pre)).to(x.dtype)
    value = geglu(x) if gate else layer_norm(x, *norm, pre) if norm is not None else added
    s = wide(value).unflatten(0, (len(a), -1)) @ wide(a).transpose(1, 2)
    return torch.cat([value, s.flatten(0, 1).to(x.dtype)], 1)


def widen_norm(
    x: Tensor, a: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *,
    silu: bool = False, other: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[y | y Aᵀ] of `group_norm`'s y, pixels as rows [M, C + L], and its sum; a [B, L, C]."""
    sources = {"other": other, "shift": shift, "residual": residual, "extra": extra}
    y, total = group_norm(x, weight, bias, groups, eps, silu=silu, **sources)
    return widen(y.permute(0, 2, 3, 1).flatten(0, 2), a), total


def geglu(h: Tensor) -> Tensor:
    """value · gelu(gate) of h [..., 2C], values first; Shazeer, arXiv:2002.05202, eq. 6, with the exact erf. [..., C]."""
    value, gate = wide(h).chunk(2, dim=-1)
    return (value * F.gelu(gate)).to(h.dtype)


def lowrank_geglu(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor,
    table: Tensor | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y = v · gelu(g), [v | g] = x Wᵀ + (scale ⊙ x Aᵀ) Bᵀ + bias; Shazeer, arXiv:2002.05202, eq. 6, on Hu et al., eq. 3.

    x [M, K], w [2N, K] (values first), a [L, 1, R, K], b [L, 2N, R], bias [2N]. Returns [M, N] in x's type.
    """
    h = wide(x) @ wide(w).T + expand(low_rank(x, a, scale, ranks, table), b, ranks, table)
    return geglu(h if bias is None else h + wide(bias)).to(x.dtype)


def guide_update(
    prediction: Tensor, guidance: Tensor, table: Tensor, scale_in: Tensor, step: Tensor, state: Tensor, z: Tensor,
    places: Tensor, sources: Tensor, num_x: int, exact: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """p = Σ_j guidance·prediction, x_{k+1} = Σ keep·x + Σ gain·p + noise·z; stepforge.runtime.plan.Step.

    P images have a place each, and a call moves those at `places` [n]: prediction [R, E], of which image i has the rows
    sources[i] [J]; guidance [P, K, J], table [P, K, W + 1], scale_in [P, K + 1], step [P], state [P, W, E] with num_x latents
    first, z [P, E]. exact: J is 2, and p = b + w·(a − b) with each result rounded to prediction's type, as diffusers'
    pipelines have it. Returns the new state, and sample = scale_in[k + 1] · x_{k+1} [P, E] in prediction's type (0 for
    images that did not move: those elsewhere, and those whose plan is done).
    """
    state = state.clone()
    sample = prediction.new_zeros(state.shape[0], state.shape[2])
    num_p = state.shape[1] - num_x
    for image, own in zip(places.tolist(), sources, strict=True):
        k = int(step[image])
        if k >= table.shape[1]:
            continue
        weights, row = wide(guidance[image, k]), wide(table[image, k])
        live = weights != 0
        if exact and bool(live.all()):
            cond, uncond = prediction[own[0]], prediction[own[1]]
            guided = wide(uncond + weights[0].item() * (cond - uncond))
        else:
            guided = (weights[live, None] * wide(prediction[own[live]])).sum(0)
        state[image, num_x + k % num_p] = guided
        operands = torch.cat([state[image], z[image, None]])
        live = row != 0
        latent = (row[live, None] * operands[live]).sum(0)
        state[image, (k + 1) % num_x] = latent
        sample[image] = (latent * scale_in[image, k + 1]).to(sample.dtype)
    return state, sample
