"""Noise schedules: a model's betas, the timesteps taken through them, and the sigmas of those timesteps.

sigma is always the noise-to-signal ratio √((1 − ᾱ)/ᾱ), ᾱ = Π(1 − beta), except for flow models, where a latent is
(1 − sigma)·x0 + sigma·noise. Coefficients come from float64: diffusers keeps these tables in float32, so its numbers differ
from ours by about 1e-7. Timesteps come from float32 tables like diffusers' (`float32_table`): some are cut to whole
numbers, and a last bit decides which.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from stepforge.runtime.arrays import Float32, Float64
from stepforge.runtime.bundle.scheduler import SchedulerCard
from stepforge.runtime.checks import shown
from stepforge.runtime.errors import RequestError

Floats = TypeVar("Floats", Float32, Float64)


def betas_of(card: SchedulerCard) -> Float64:
    """Noise added at each training timestep. Cosine: Nichol and Dhariwal, arXiv:2102.09672, eq. 17, capped at 0.999."""
    count = card.num_train_timesteps
    if card.trained_betas is not None:
        return np.array(card.trained_betas)
    if card.beta_schedule == "linear":
        return np.linspace(card.beta_start, card.beta_end, count)
    if card.beta_schedule == "scaled_linear":
        return np.linspace(card.beta_start**0.5, card.beta_end**0.5, count) ** 2
    bar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.asarray(np.minimum(1.0 - bar[1:] / bar[:-1], 0.999))


def alphas_cumprod(card: SchedulerCard) -> Float64:
    """ᾱ_t = Π_{s ≤ t} (1 − beta_s); with zero terminal SNR, √ᾱ shifted and scaled to end at 0.

    Lin et al., arXiv:2305.08891, algorithm 1.
    """
    bar = np.cumprod(1.0 - betas_of(card))
    if card.rescale_betas_zero_snr:
        root = np.sqrt(bar)
        bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return np.asarray(bar, dtype=np.float64)


def ratio(alphas_bar: Float64) -> Float64:
    """sigma = √((1 − ᾱ)/ᾱ)."""
    return np.sqrt((1.0 - alphas_bar) / alphas_bar)


def float32_table(card: SchedulerCard) -> Float32:
    """sigma of every training timestep, through the roundings of diffusers' float32 tables.

    The root is rounded correctly. Torch's float32 `** 0.5` is MKL's, off by one unit for a fifth of all timesteps on AMD EPYC,
    which moves a timestep between two whole numbers by as much.
    """
    one = np.float32(1.0)
    if card.trained_betas is not None:
        betas = np.array(card.trained_betas, np.float32)
    elif card.beta_schedule == "linear":
        betas = linspace32(card.beta_start, card.beta_end, card.num_train_timesteps)
    elif card.beta_schedule == "scaled_linear":
        betas = linspace32(card.beta_start**0.5, card.beta_end**0.5, card.num_train_timesteps) ** 2
    else:
        betas = betas_of(card).astype(np.float32)
    if card.rescale_betas_zero_snr:
        root = np.sqrt(cumprod32(one - betas))
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        bar = root**2
        betas = one - np.concatenate([bar[:1], bar[1:] / bar[:-1]])
    bar = cumprod32(one - betas)
    if card.rescale_betas_zero_snr:
        bar[-1] = 2.0**-24
    table: Float32 = np.sqrt((one - bar) / bar)
    return table


def cumprod32(values: Float32) -> Float32:
    """torch.cumprod: products in float64, each rounded."""
    return np.cumprod(values.astype(np.float64)).astype(np.float32)


def linspace32(first: float, last: float, count: int) -> Float32:
    """torch.linspace in float32: counted from the nearer end, product and sum rounded once together."""
    start, end = np.float64(np.float32(first)), np.float64(np.float32(last))
    step = np.float64((np.float32(last) - np.float32(first)) / np.float32(max(count - 1, 1)))
    i = np.arange(count)
    return np.where(i < count // 2, start + step * i, end - step * (count - 1 - i)).astype(np.float32)


def spaced(spacing: str, steps: int, count: int, *, offset: int = 0, ahead: bool = False) -> Float64:
    """`steps` timesteps of 0..count−1, falling; Lin et al., arXiv:2305.08891, table 2.

    ahead: the grid has one more point, the end of the last step, which is left out (DPM-Solver, UniPC, DEIS);
    "trailing" has that form already.
    """
    points = steps + 1 if ahead else steps
    if spacing == "linspace":
        return np.linspace(0.0, count - 1.0, points)[::-1][:steps]
    if spacing == "leading":
        return (np.arange(points) * (count // points))[::-1][:steps].astype(np.float64) + offset
    # `arange` over a float step can give one point too many
    return np.round(np.arange(count, 0, -count / steps))[:steps] - 1.0


def karras(high: float, low: float, steps: int) -> Float64:
    """Equal steps in sigma^(1/7); Karras et al., arXiv:2206.00364, eq. 5."""
    ramp = np.linspace(0.0, 1.0, steps)
    return np.asarray((high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7)


def exponential(high: float, low: float, steps: int) -> Float64:
    """Equal steps in log sigma."""
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def beta(high: float, low: float, steps: int) -> Float64:
    """Quantiles of Beta(0.6, 0.6) between low and high; Lee et al., arXiv:2407.12173."""
    return low + beta_quantile(1.0 - np.linspace(0.0, 1.0, steps), 0.6) * (high - low)


RESPACE = {"karras": karras, "exponential": exponential, "beta": beta}


def beta_quantile(q: Float64, a: float) -> Float64:
    """x with I_x(a, a) = q, by bisection; at 1/2 and beyond by symmetry.

    I_x(a, a) = x^a / (a·B(a, a)) · Σ_n x^n · a/(a + n) · Π_{i ≤ n} (i − a)/i, which halves with each n for x ≤ 1/2.
    """
    half = np.minimum(q, 1.0 - q)
    norm = math.gamma(a) ** 2 / math.gamma(2 * a)
    n = np.arange(60)
    weight = np.cumprod(np.concatenate([[1.0], (n[1:] - a) / n[1:]])) / (a + n)
    low, high = np.zeros_like(half), np.full_like(half, 0.5)
    for _ in range(60):
        x = (low + high) / 2
        below = x**a * ((x[:, None] ** n) @ weight) / norm < half
        low, high = np.where(below, x, low), np.where(below, high, x)
    return np.where(q <= 0.5, low, 1.0 - low)


def times_of(sigmas: Float64, table: Float32) -> Float64:
    """Where sigmas lie in the rising `float32_table`, in timesteps: linear in log sigma, held at the ends.

    As diffusers' `_sigma_to_t`: logs and their distances in the table's float32, the rest in float64.
    """
    low, share = placed(np.log(np.maximum(sigmas, 1e-10)), np.log(table))
    return np.asarray((1 - share) * low + share * (low + 1), np.float64)


def midpoint_times(sigmas: Float32, table: Float32) -> Float64:
    """Where the geometric means of neighbouring sigmas lie: diffusers' KDPM2 does all of it in float32, as torch tensors."""
    logs = np.log(sigmas)
    low, share = placed(np.log(np.exp(logs[:-1] - (logs[:-1] - logs[1:]) * np.float32(0.5))), np.log(table))
    whole = low.astype(np.float32)
    return ((1 - share) * whole + share * (whole + 1)).astype(np.float64)


def placed(logs: Floats, known: Float32) -> tuple[NDArray[np.intp], Floats]:
    """Index of the greatest known log below each, and how far it is to the next one, 0 to 1."""
    low = np.clip(np.searchsorted(known, logs, side="right") - 1, 0, len(known) - 2)
    return low, np.clip((known[low] - logs) / (known[low] - known[low + 1]), 0, 1)


def check_timesteps(values: Any, low: int, high: int) -> Float64:
    """Timesteps as an array: falling, within low..high."""
    times = check_falling("timesteps", values)
    if times[0] > high or times[-1] < low:
        raise RequestError(f"timesteps must lie in {low}..{high}; these run from {times[0]:g} to {times[-1]:g}")
    return times


def check_falling(what: str, values: Any) -> Float64:
    """A list of numbers as an array: finite, strictly falling, at least one."""
    try:
        array = np.array([float(value) for value in values], dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise RequestError(f"{what} must be a list of numbers, got {shown(values)}") from None
    if not array.size or not np.isfinite(array).all() or (np.diff(array) >= 0).any():
        raise RequestError(f"{what} must be finite and strictly falling, got {shown(array.tolist())}")
    return array
