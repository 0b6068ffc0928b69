"""The noise levels that each family of samplers moves between, as its diffusers class lays them out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from stepforge.runtime.arrays import Float64
from stepforge.runtime.bundle.scheduler import SchedulerCard
from stepforge.runtime.errors import RequestError
from stepforge.runtime.plan.sampling.linear import Level, NoisePath
from stepforge.runtime.plan.sampling.schedules import (
    RESPACE,
    alphas_cumprod,
    check_timesteps,
    float32_table,
    midpoint_times,
    ratio,
    spaced,
    times_of,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerOptions:
    """The choices of a request from which noise levels are made, defaults filled in."""

    sampler: str
    steps: int
    schedule: str
    spacing: str
    timesteps: Float64 | None  # the request's own
    sigmas: Float64 | None  # the request's own
    eta: float
    alpha_to_one: bool


def in_line(card: SchedulerCard, levels: Sequence[Level], options: SamplerOptions) -> NoisePath:
    """Every step ends where the next begins."""
    return NoisePath(card.prediction_type, tuple(levels[:-1]), tuple(pairwise(levels)), options.eta)


def table_level(bar: Float64, t: float, final: float) -> Level:
    """Level of timestep t in the table of ᾱ; before timestep 0, of ᾱ = final."""
    value = float(bar[int(t)]) if t >= 0 else final
    return Level(float(t), math.sqrt(value), math.sqrt(1 - value))


def table_times(card: SchedulerCard, options: SamplerOptions) -> Float64:
    """Timesteps that index the table of ᾱ."""
    if options.timesteps is not None:
        return options.timesteps
    times = np.round(spaced(options.spacing, options.steps, card.num_train_timesteps, offset=card.steps_offset))
    return check_timesteps(times, 0, card.num_train_timesteps - 1)


def ddim_levels(card: SchedulerCard, options: SamplerOptions) -> NoisePath:
    """Each step goes down by count // steps timesteps, whatever the spacing."""
    times, bar = table_times(card, options), alphas_cumprod(card)
    final = 1.0 if options.alpha_to_one else float(bar[0])
    stride = card.num_train_timesteps // options.steps
    at = tuple(table_level(bar, t, final) for t in times)
    ends = (table_level(bar, t - stride, final) for t in times)
    return NoisePath(card.prediction_type, at, tuple(zip(at, ends, strict=True)), options.eta)


def pndm_levels(card: SchedulerCard, options: SamplerOptions) -> NoisePath:
    """As DDIM; the second timestep is evaluated twice, first to redo the step that led to it."""
    times, bar = list(table_times(card, options)), alphas_cumprod(card)
    final = 1.0 if options.alpha_to_one else float(bar[0])
    stride = card.num_train_timesteps // options.steps
    times[1:1] = times[1:2]
    starts = [t + stride if k == 1 else t for k, t in enumerate(times)]
    moves = tuple((table_level(bar, t, final), table_level(bar, t - stride, final)) for t in starts)
    return NoisePath(card.prediction_type, tuple(table_level(bar, t, final) for t in times), moves)


def ddpm_levels(card: SchedulerCard, options: SamplerOptions) -> NoisePath:
    times, bar = table_times(card, options), alphas_cumprod(card)
    return in_line(card, [table_level(bar, t, 1.0) for t in (*times, -1)], options)


def distilled_times(card: SchedulerCard, options: SamplerOptions) -> Float64:
    """A subset of the 50 timesteps on which consistency models are distilled, or the request's own."""
    if options.timesteps is not None:
        return options.timesteps
    trained = 50
    if options.steps > trained or card.num_train_timesteps < trained:
        raise RequestError(f"sampler {options.sampler!r} takes 1 to {trained} steps, got {options.steps}")
    stride = card.num_train_timesteps // trained
    chosen = np.floor(np.linspace(0, trained, options.steps, endpoint=False))
    return (trained - chosen) * stride - 1


def lcm_levels(card: SchedulerCard, options: SamplerOptions) -> NoisePath:
    times, bar = distilled_times(card, options), alphas_cumprod(card)
    return in_line(card, [table_level(bar, t, 1.0) for t in (*times, -1)], options)


def tcd_levels(card: SchedulerCard, options: SamplerOptions) -> NoisePath:
    """Each step has a lower level on the way, at time (1 − eta)·t_end; the last one ends at timestep 0."""
    times, bar = distilled_times(card, options), alphas_cumprod(card)
    at = tuple(table_level(bar, t, 1.0) for t in times)
    ends = (*at[1:], table_level(bar, 0, 1.0))
    # 1e-9: (1 − eta)·t is a whole number now and then, and must not fall below it
    lows = (table_level(bar, math.floor((1 - options.eta) * end.t + 1e-9), 1.0) for end in ends)
    return NoisePath(card.prediction_type, at, tuple(zip(at, lows, ends, strict=True)), options.eta)


def sigma_table(card: SchedulerCard) -> Float64:
    """sigma of every training timestep. A last sigma of infinity is held at 4096, as in diffusers: ᾱ = 2⁻²⁴."""
    bar = alphas_cumprod(card)
    if card.rescale_betas_zero_snr:
        bar[-1] = 2.0**-24
    return ratio(bar)


def sigmas_at(times: Float64, table: Float64) -> Float64:
    sigmas = np.interp(times, np.arange(len(table)), table)
    if (np.diff(sigmas) >= 0).any():
        raise RequestError(f"{len(times)} steps are too many for this spacing: two of them have the same timestep")
    return sigmas


def sigma_points(card: SchedulerCard, options: SamplerOptions) -> tuple[Float64, Float64]:
    """Timesteps and sigmas, with the end, of samplers that move in sigma."""
    table = sigma_table(card)
    if options.sigmas is not None:
        return times_of(options.sigmas[:-1].astype(np.float32), float32_table(card)), options.sigmas
    times = options.timesteps
    if times is None:
        times = spaced(options.spacing, options.steps, card.num_train_timesteps, offset=card.steps_offset)
    sigmas = sigmas_at(times, table)
    if options.schedule != "normal":
        sigmas = RESPACE[options.schedule](float(sigmas[0]), float(sigmas[-1]), options.steps)
        times = times_of(rounded_sigmas(card, options, times), float32_table(card))
    return times, np.append(sigmas, 0.0)


def rounded_sigmas(card: SchedulerCard, options: SamplerOptions, times: Float64) -> Float64:
    """The sigmas of `sigma_points` from the float32 table. times: of the spacing."""
    table = float32_table(card)
    sigmas = np.interp(times.astype(np.float32), np.arange(len(table)), table)
    if options.schedule != "normal":
        sigmas = RESPACE[options.schedule](float(sigmas[0]), float(sigmas[-1]), options.steps)
    return sigmas


def sigma_level(t: float, sigma: float) -> Level:
    """A latent x0 + sigma·noise; the network sees it at norm 1."""
    return Level(float(t), 1.0, float(sigma), 1 / math.hypot(float(sigma), 1.0))


def sigma_levels(card: SchedulerCard, options: SamplerOptions) -> NoisePath:
    times, sigmas = sigma_points(card, options)
    return in_line(card, [sigma_level(*pair) for pair in zip((*times, 0.0), sigmas, strict=True)], options)


def heun_levels(card: SchedulerCard, options: SamplerOptions) -> NoisePath:
    """Two evaluations a step, at its start and at its end; one for the step to sigma 0."""
    line = sigma_levels(card, options)
    at = [level for move in line.moves for level in move][:-1]
    moves = [move for move in line.moves for _ in range(2)][:-1]
    return NoisePath(card.prediction_type, tuple(at), tuple(moves))


def kdpm2_levels(card: SchedulerCard, options: SamplerOptions) -> NoisePath:
    """Two evaluations a step, at its start and at its geometric midpoint; one for the step to sigma 0."""
    times, sigmas = sigma_points(card, options)
    if options.schedule == "karras":
        times = np.round(times)
    middles = np.sqrt(sigmas[:-1] * sigmas[1:])
    grid = spaced(options.spacing, options.steps, card.num_train_timesteps, offset=card.steps_offset)
    rounded = rounded_sigmas(card, options, grid).astype(np.float32)
    middle_times = [*midpoint_times(rounded, float32_table(card)), 0.0]  # the step to sigma 0 has none
    at: list[Level] = []
    moves: list[tuple[Level, ...]] = []
    for i, t in enumerate(times):
        start, middle = sigma_level(t, sigmas[i]), sigma_level(middle_times[i], middles[i])
        at += [start, middle]
        moves += [(start, middle), (start, sigma_level(0.0, sigmas[i + 1]))]
    return NoisePath(card.prediction_type, tuple(at[:-1]), tuple(moves[:-1]))


def ahead_levels(card: SchedulerCard, options: SamplerOptions) -> NoisePath:
    """Levels of norm 1 for DPM-Solver, UniPC and DEIS. Respaced sigmas span the whole table, whatever the spacing."""
    table, deis = sigma_table(card), options.sampler == "deis"
    times = options.timesteps
    if times is None:
        count, offset = card.num_train_timesteps, card.steps_offset
        times = np.round(spaced(options.spacing, options.steps, count, offset=offset, ahead=True))
    if options.schedule == "normal":
        sigmas = sigmas_at(times, table)
        last = float(table[0]) if deis else 0.0
    else:
        respace, rounded = RESPACE[options.schedule], float32_table(card)
        sigmas = respace(float(table[-1]), float(table[0]), options.steps)
        last = float(sigmas[-1]) if deis else 0.0  # DEIS of diffusers ends with a step that moves nothing
        rounds = options.schedule == "karras" and (
            not options.sampler.startswith("dpmpp") or card.beta_schedule != "squaredcos_cap_v2"
        )
        times = times_of(respace(float(rounded[-1]), float(rounded[0]), options.steps), rounded)
        times = np.round(times) if rounds else np.floor(times)
    ends = np.append(sigmas, last)
    norms = np.hypot(ends, 1.0)
    triples = zip((*times, 0.0), 1 / norms, ends / norms, strict=True)
    return in_line(card, [Level(float(t), float(alpha), float(sigma)) for t, alpha, sigma in triples], options)


def flow_levels(card: SchedulerCard, options: SamplerOptions) -> NoisePath:
    """Flow sigmas, shifted: s·sigma / (1 + (s − 1)·sigma). As in diffusers the lowest of the grid is shifted twice."""
    count = card.num_train_timesteps
    sigmas = flow_sigmas(card, options, np.float64)
    times = options.timesteps
    if times is None:
        times = (flow_sigmas(card, options, np.float32).astype(np.float32) * np.float32(count)).astype(np.float64)
    pairs = zip((*times, 0.0), (*sigmas, 0.0), strict=True)
    return in_line(card, [Level(float(t), 1 - float(s), float(s)) for t, s in pairs], options)


def flow_sigmas(card: SchedulerCard, options: SamplerOptions, dtype: type[np.floating[Any]]) -> Float64:
    """dtype: of the training sigmas, whose lowest ends the grid."""

    def shifted(sigma: Any) -> Any:
        return card.shift * sigma / (1 + (card.shift - 1) * sigma)

    if options.sigmas is not None:
        grid = options.sigmas.astype(dtype)
    elif options.timesteps is not None:
        grid = options.timesteps / card.num_train_timesteps
    else:
        grid = np.linspace(1.0, float(shifted(dtype(1) / dtype(card.num_train_timesteps))), options.steps)
    sigmas = shifted(grid)
    if options.schedule != "normal":
        sigmas = RESPACE[options.schedule](float(sigmas[0]), float(sigmas[-1]), options.steps)
    return np.asarray(sigmas)
