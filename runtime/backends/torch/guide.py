"""Guiders on the device: `plan.guiders` for many images at once, each with numbers of its own, without the host.

What only some images of a call ask for is computed for all of them, and taken where it is meant. Sums are in fp64, as on the
host. Adaptive guidance is not here: it decides on the host which rows run.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepforge.runtime.plan.guiders import Guider, Projected, ZeroStar

ZERO_STAR, APG, RESCALE, DYNAMIC = "zero_star", "apg", "rescale", "dynamic"
NUMBERS = (ZERO_STAR, APG, "momentum", "norm", "eta", RESCALE, DYNAMIC, "cap")  # columns of an image's row; 0: off


def numbers(guider: Guider) -> list[float]:
    """Of NUMBERS, in their order; that of `dynamic` is its percentile."""
    values: dict[str, float] = {RESCALE: guider.rescale or 0.0}
    match guider.combiner:
        case ZeroStar():
            values[ZERO_STAR] = 1.0
        case Projected(momentum, norm, eta):
            values |= {APG: 1.0, "momentum": momentum, "norm": norm, "eta": eta}
    if guider.dynamic is not None:
        values |= {DYNAMIC: guider.dynamic.percentile, "cap": guider.dynamic.cap}
    return [values.get(name, 0.0) for name in NUMBERS]


def parts(guider: Guider) -> frozenset[str]:
    """What a guider needs beyond a weight."""
    found = dict(zip(NUMBERS, numbers(guider), strict=True))
    return frozenset(name for name in (ZERO_STAR, APG, RESCALE, DYNAMIC) if found[name])


def guided(
    asked: frozenset[str], prediction: Tensor, sources: Tensor, weights: Tensor, own: Tensor, x: Tensor, denoised: Tensor,
    change: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The guided predictions of n images [n, E] in fp32, and APG's changes.

    prediction [R, E], of which image i has the rows sources[i] [2], the conditional one first; weights [n, 2], 0 where a row
    did not run; own fp32 [n, NUMBERS]; x [n, E] the latents, and denoised fp64 [n, 2] what makes clean ones of them; change
    [n, E] APG's of the step before, 0 in the first.
    """
    number: Mapping[str, Tensor] = dict(zip(NUMBERS, own.split(1, 1), strict=True))
    cond, uncond = (prediction.index_select(0, rows).float() for rows in sources.unbind(1))
    ran = weights != 0
    both = ran.all(1, keepdim=True)
    w = weights[:, :1]
    p = uncond + w * (cond - uncond)
    if ZERO_STAR in asked:
        scaled = uncond * (dot(cond, uncond) / (dot(uncond, uncond) + 1e-8)).float()
        p = torch.where(number[ZERO_STAR] != 0, scaled + w * (cond - scaled), p)
    if APG in asked:
        moved = cond - uncond + number["momentum"] * change
        change = torch.where(both & (number["momentum"] != 0), moved, change)
        p = torch.where(number[APG] != 0, projected(w, cond, uncond, moved, number["norm"], number["eta"]), p)
    if RESCALE in asked:
        phi, spread = number[RESCALE].double(), deviation(p)
        ratio = phi * deviation(cond) / spread + 1 - phi
        p = p * torch.where((phi != 0) & (spread > 0), ratio, 1.0).float()
    # a row that did not run may be another image's: nothing of it counts, not even times 0
    alone = torch.where(ran[:, :1], cond, torch.where(ran[:, 1:], uncond, 0.0))
    p = torch.where(both, p, alone)
    if DYNAMIC in asked:
        p = torch.where(number[DYNAMIC] != 0, thresholded(p, x, denoised, number[DYNAMIC], number["cap"]), p)
    return p, change


def projected(w: Tensor, cond: Tensor, uncond: Tensor, change: Tensor, norm: Tensor, eta: Tensor) -> Tensor:
    """`plan.guiders.apg`."""
    size = dot(change, change).sqrt()
    shrunk = change.double() * torch.where((norm > 0) & (norm < size), norm / size, 1.0)
    along = cond.double() / dot(cond, cond).sqrt().clamp(min=1e-12)
    parallel = (shrunk * along).sum(1, keepdim=True)
    return (uncond + w * (shrunk + (eta - 1) * parallel * along)).float()


def thresholded(p: Tensor, x: Tensor, denoised: Tensor, percentile: Tensor, cap: Tensor) -> Tensor:
    """`plan.guiders.dynamic`."""
    a, b = denoised.split(1, 1)
    known = a * x.double()
    clean = known + b * p
    ordered = clean.abs().sort(1).values
    at = percentile.double() * (ordered.shape[1] - 1)
    low = at.floor().long()
    ends = ordered.gather(1, torch.cat([low, (low + 1).clamp(max=ordered.shape[1] - 1)], 1))
    s = torch.lerp(ends[:, :1], ends[:, 1:], at - low).clamp(min=1.0).minimum(cap.double())
    return torch.where(b != 0, (clean.minimum(s).maximum(-s) / s - known) / b, p).float()


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum(1, keepdim=True)


def deviation(values: Tensor) -> Tensor:
    return values.double().std(1, keepdim=True, correction=0)
