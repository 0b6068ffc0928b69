"""Samplers: how the latent moves in each network evaluation, and the table of all of them.

Each sampler is a pure function `(path, k) -> x_{k+1}` in `SAMPLERS`, written on `Linear` values, and gives the same
latents as the diffusers scheduler of that name. Adding one is a function, its levels and a line in the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from stepforge.runtime.bundle.scheduler import SCHEDULES, SchedulerCard
from stepforge.runtime.plan.sampling import levels, multistep
from stepforge.runtime.plan.sampling.levels import SamplerOptions
from stepforge.runtime.plan.sampling.linear import Level, Linear, NoisePath, p, rewind, x, z


def ddim(path: NoisePath, k: int) -> Linear:
    """DDIM; Song et al., arXiv:2010.02502, eq. 12 and 16."""
    start, end = path.moves[k]
    std = path.eta * posterior_std(start, end)
    row = end.alpha * path.x0(k) + math.sqrt(max(end.sigma**2 - std**2, 0.0)) * path.eps(k)
    return row + std * z(k)


def ddpm(path: NoisePath, k: int) -> Linear:
    """DDPM with the small variance; Ho et al., arXiv:2006.11239, eq. 7."""
    start, end = path.moves[k]
    kept = (start.alpha / end.alpha) ** 2  # alpha_t of the paper, over the whole step
    clean = end.alpha * (1 - kept) / start.sigma**2
    noisy = math.sqrt(kept) * end.sigma**2 / start.sigma**2
    row = clean * path.x0(k) + noisy * x(k)
    return row + posterior_std(start, end) * z(k) if start.t > 0 else row


def posterior_std(start: Level, end: Level) -> float:
    """Standard deviation of q(x_end | x_start, x0)."""
    return end.sigma / start.sigma * math.sqrt(1 - (start.alpha / end.alpha) ** 2)


def learned_range(start: Level, end: Level) -> tuple[float, float]:
    """log beta and log beta~ of a step, between which the network's variance chooses; Nichol and Dhariwal,
    arXiv:2102.09672, eq. 15. beta~ is held at 1e-20, as in diffusers."""
    log_beta = math.log(1 - (start.alpha / end.alpha) ** 2)
    return log_beta, math.log(max(posterior_std(start, end) ** 2, 1e-20))


def euler(path: NoisePath, k: int) -> Linear:
    """Euler in sigma; Karras et al., arXiv:2206.00364, algorithm 2 without churn."""
    start, end = path.moves[k]
    return x(k) + (end.sigma - start.sigma) * path.eps(k)


def euler_a(path: NoisePath, k: int) -> Linear:
    """Euler ancestral: Euler to sigma_down, then noise up to the next sigma; k-diffusion, sample_euler_ancestral."""
    start, end = path.moves[k]
    up = end.sigma / start.sigma * math.sqrt(start.sigma**2 - end.sigma**2)
    down = end.sigma**2 / start.sigma
    return x(k) + (down - start.sigma) * path.eps(k) + up * z(k)


def heun(path: NoisePath, k: int) -> Linear:
    """Heun in sigma; Karras et al., arXiv:2206.00364, algorithm 1. Odd evaluations correct the Euler step before."""
    start, end = path.moves[k]
    if k % 2 == 0:
        return euler(path, k)
    row = x(k - 1) + (end.sigma - start.sigma) / 2 * (path.eps(k - 1) + path.eps(k))
    return row if path.blended else row.put(("x", k - 1), rewind(euler(path, k - 1), k))


def kdpm2(path: NoisePath, k: int) -> Linear:
    """DPM-Solver-2 in sigma: Euler to the geometric midpoint, then a full step with the slope found there.

    Karras et al., arXiv:2206.00364, appendix; k-diffusion, sample_dpm_2.
    """
    start, end = path.moves[k]
    if k % 2 == 0:
        return euler(path, k)
    row = x(k - 1) + (end.sigma - start.sigma) * path.eps(k)
    return row if path.blended else row.put(("x", k - 1), rewind(euler(path, k - 1), k))


def lcm(path: NoisePath, k: int) -> Linear:
    """Latent consistency: jump to the clean latent, then noise to the next level; Luo et al., arXiv:2310.04378."""
    start, end = path.moves[k]
    scaled, sigma_data = 10.0 * start.t, 0.5
    skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    out = scaled / math.hypot(scaled, sigma_data)
    clean = out * path.x0(k) + skip * x(k)
    return clean if k == len(path.at) - 1 else end.alpha * clean + end.sigma * z(k)


def tcd(path: NoisePath, k: int) -> Linear:
    """Trajectory consistency: jump to time (1 − eta)·t_end, then noise up to t_end; Zheng et al., arXiv:2402.19159."""
    _, low, end = path.moves[k]
    row = low.alpha * path.x0(k) + low.sigma * path.eps(k)
    if path.eta == 0 or k == len(path.at) - 1:
        return row
    kept = end.alpha / low.alpha
    return kept * row + math.sqrt(1 - kept**2) * z(k)


def flow_euler(path: NoisePath, k: int) -> Linear:
    """Euler on a rectified flow, p = dx/dsigma; Esser et al., arXiv:2403.03206."""
    start, end = path.moves[k]
    return x(k) + (end.sigma - start.sigma) * p(k)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """A sampler, the levels it moves between, and what it accepts; the limits are those of its diffusers class."""

    move: Callable[[NoisePath, int], Linear]
    levels: Callable[[SchedulerCard, SamplerOptions], NoisePath]
    predictions: tuple[str, ...] = ("epsilon", "v_prediction", "sample")
    spacing: str | None = "linspace"  # default; None: it has timesteps of its own
    schedules: tuple[str, ...] = ("normal",)
    custom: tuple[str, ...] = ()  # "timesteps", "sigmas"
    evaluations: int = 1  # network evaluations in a step
    fractions: bool = False  # its timesteps need not be whole
    zero_snr: bool = False
    eta: float | None = None  # default; None: it has no eta
    alpha_to_one: bool = True  # default of set_alpha_to_one
    thresholds: bool = False  # has thresholding
    clips: bool = False  # has clip_sample
    truncates: bool = True  # can start at a later step, on an image with noise
    blends: bool = True  # latents may be changed between its steps
    draws_last: bool = False  # diffusers draws noise in the last step too, which is multiplied by 0
    variance: Callable[[Level, Level], tuple[float, float]] | None = (
        None  # bounds of a variance that the network learned
    )


NOISY = ("epsilon", "v_prediction")
TIMESTEPS = ("timesteps",)


def dpm_solver(move: Callable[[NoisePath, int], Linear], *, draws_last: bool = False) -> Sampler:
    return Sampler(
        move=move, levels=levels.ahead_levels, schedules=SCHEDULES, custom=TIMESTEPS, zero_snr=True, thresholds=True,
        draws_last=draws_last,
    )  # fmt: skip


SAMPLERS = {
    "ddim": Sampler(
        move=ddim, levels=levels.ddim_levels, spacing="leading", zero_snr=True, eta=0.0, thresholds=True, clips=True
    ),
    "ddpm": Sampler(
        move=ddpm,
        levels=levels.ddpm_levels,
        spacing="leading",
        zero_snr=True,
        custom=TIMESTEPS,
        thresholds=True,
        clips=True,
        variance=learned_range,
    ),
    "euler": Sampler(
        move=euler,
        levels=levels.sigma_levels,
        schedules=SCHEDULES,
        custom=("timesteps", "sigmas"),
        fractions=True,
        zero_snr=True,
    ),
    "euler_a": Sampler(move=euler_a, levels=levels.sigma_levels, predictions=NOISY, zero_snr=True, draws_last=True),
    "dpmpp_2m": dpm_solver(multistep.dpmpp_2m),
    "dpmpp_2m_sde": dpm_solver(multistep.dpmpp_2m_sde, draws_last=True),
    "dpmpp_3m": dpm_solver(multistep.dpmpp_3m),
    "unipc": Sampler(
        move=multistep.unipc,
        levels=levels.ahead_levels,
        schedules=SCHEDULES,
        zero_snr=True,
        thresholds=True,
        blends=False,
    ),
    "heun": Sampler(
        move=heun, levels=levels.heun_levels, schedules=SCHEDULES, custom=TIMESTEPS, fractions=True, evaluations=2
    ),
    "kdpm2": Sampler(move=kdpm2, levels=levels.kdpm2_levels, predictions=NOISY, schedules=SCHEDULES, evaluations=2),
    "pndm": Sampler(
        move=multistep.pndm, levels=levels.pndm_levels, predictions=NOISY, spacing="leading", alpha_to_one=False
    ),
    "lms": Sampler(move=multistep.lms, levels=levels.sigma_levels, schedules=SCHEDULES, truncates=False),
    "deis": Sampler(move=multistep.deis, levels=levels.ahead_levels, schedules=SCHEDULES, thresholds=True),
    "lcm": Sampler(
        move=lcm,
        levels=levels.lcm_levels,
        spacing=None,
        zero_snr=True,
        custom=TIMESTEPS,
        thresholds=True,
        clips=True,
    ),
    "tcd": Sampler(move=tcd, levels=levels.tcd_levels, spacing=None, zero_snr=True, custom=TIMESTEPS, eta=0.3),
    "flow_euler": Sampler(
        move=flow_euler,
        levels=levels.flow_levels,
        predictions=("flow",),
        spacing=None,
        schedules=SCHEDULES,
        custom=("timesteps", "sigmas"),
        fractions=True,
        zero_snr=True,
    ),
}
