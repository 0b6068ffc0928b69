"""Any linear diffusers scheduler as rows of numbers, by pushing basis vectors through it.

A scheduler whose steps are linear in latent, predictions and noise is known exactly from what it does to unit vectors.
So `expansion` is the reference for every sampler of `runtime/plan/sampling/`, and `from_diffusers` and `step_table` compile
schedulers for which stepforge has no formula.
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

from stepforge.runtime.arrays import Float64
from stepforge.runtime.bundle.steps import LONGEST_WINDOW, Row, StepTable
from stepforge.runtime.checks import clipped
from stepforge.runtime.errors import CheckpointError
from stepforge.runtime.plan import Step
from stepforge.runtime.plan.sampling.sample import as_step

Window = tuple[tuple[float, ...], tuple[float, ...], float]  # keep, gain, noise
RESIDUAL = 1e-9  # relative error of a window; expansions are good to about 1e-12
FAINT = 1e-9  # noise below this is none: diffusers' DDPM ends with a deviation of 1e-10 in place of 0
# Coefficient of noise that is drawn and not used, while a later step draws too: the generator has to move on. The least
# positive float32, so that its product with any noise changes no latent.
UNUSED = 2.0**-149
PROBES, AMPLITUDE = 4, 5.0  # random inputs that a linear scheduler sees besides the basis; so large that clipping shows


def expansion(
    scheduler: Any, steps: int | None = None, *, step_options: Mapping[str, Any] | None = None, **timing: Any
) -> list[dict[tuple[str, int], float]]:
    """Each latent x_0..x_K of the scheduler over its inputs, as `runtime.plan.expand` gives those of a plan.

    timing: other arguments of `set_timesteps`; step_options: of `step`, such as eta.
    """
    trace = follow(scheduler, steps, step_options, timing)
    count = len(trace.t)
    keys = [("x", 0), *(("p", k) for k in range(count)), *(("z", k) for k in range(count))]
    return [{key: float(value) for key, value in zip(keys, row, strict=True) if value} for row in trace.latents]


def from_diffusers(
    scheduler: Any, steps: int | None = None, *, step_options: Mapping[str, Any] | None = None, **timing: Any
) -> tuple[tuple[Step, ...], float]:
    """The scheduler's steps as rows over the shortest windows that give them, and the factor of the first noise."""
    init_noise, rows = rows_of(follow(scheduler, steps, step_options, timing), scheduler.order)
    return tuple(map(as_step, rows)), init_noise


def step_table(scheduler: Any, counts: Iterable[int]) -> StepTable:
    """The scheduler's steps for each count that it can run. Raises CheckpointError, with the first reason, if it runs none."""
    found: dict[int, tuple[float, tuple[Row, ...]]] = {}
    reason: CheckpointError | None = None
    exact = exact_copy(scheduler)
    for count in counts:
        try:
            trace = follow(scheduler, count, None, {}, exact)
            found[count] = rows_of(trace, scheduler.order)
        except CheckpointError as error:
            reason = reason or error
    if not found or (reason and found.keys() == {1}):  # one step shows little: neither clipping nor what noise it draws
        raise reason or CheckpointError("no step counts were given")
    return StepTable.of(found)


def rows_of(trace: Trace, order: int) -> tuple[float, tuple[Row, ...]]:
    """Factor of the first noise, and rows over the shortest windows that give the trace. order: evaluations a step."""
    windows = shortest_windows(trace.latents)
    last = max((k for k, (_, _, noise) in enumerate(windows) if noise), default=-1)
    rows = []
    for k, (keep, gain, noise) in enumerate(windows):
        if not noise and trace.drawn[k] and k < last:
            noise = UNUSED
        level = trace.t[k], trace.sigma[k], trace.scale_in[k]
        rows.append(Row(k // order, *level, noise, trace.denoised[k], keep, gain))
    return float(trace.latents[0, 0]), tuple(rows)


@dataclass(frozen=True, slots=True)
class Trace:
    """K evaluations of a scheduler: latents over its inputs, and what the network was given."""

    latents: Float64  # [K + 1, 1 + 2K]: coefficients of x_0, p_0..p_{K-1}, z_0..z_{K-1}
    t: tuple[float, ...]  # timesteps, rounded to float32 by the scheduler
    scale_in: tuple[float, ...]
    sigma: tuple[float, ...]  # noise-to-signal
    denoised: tuple[tuple[float, float], ...]
    drawn: tuple[bool, ...]  # whether the step draws noise, used or not


def follow(
    scheduler: Any,
    steps: int | None,
    step_options: Mapping[str, Any] | None,
    timing: Mapping[str, Any],
    exact: Any = None,
) -> Trace:
    """Runs unit vectors through a float64 copy of the scheduler, and large numbers beside them to see that it is linear.

    exact: its `exact_copy`, where there is one; neither is changed.
    """
    name = type(scheduler).__name__
    timing = timing if steps is None else {"num_inference_steps": steps, **timing}
    exact = exact_copy(scheduler) if exact is None else deepcopy(exact)
    try:
        with silent():
            plain = deepcopy(scheduler)
            plain.set_timesteps(**timing)
        with silent(), in_float64(type(scheduler)):
            return drive(exact, list(plain.timesteps), step_options or {}, timing)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{name} cannot run these steps: {one_line(error)}") from error


def exact_copy(scheduler: Any) -> Any:
    """A copy whose tables are float64. Raises CheckpointError if the class cannot be made so."""
    with silent(), in_float64(type(scheduler)):
        try:
            return type(scheduler).from_config(scheduler.config)
        except Exception as error:
            raise CheckpointError(f"{type(scheduler).__name__} cannot be built: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    return clipped(error) or type(error).__name__


def drive(scheduler: Any, times: list[Any], options: Mapping[str, Any], timing: Mapping[str, Any]) -> Trace:
    """Runs a float64 scheduler, telling it the times that its float32 twin has."""
    name = type(scheduler).__name__
    scheduler.set_timesteps(**timing)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else a repeated first timestep makes it skip one
    count = len(times)
    if count != len(scheduler.timesteps):
        raise CheckpointError(f"{name} has {len(scheduler.timesteps)} timesteps in float64, {count} in float32")
    size = 1 + 2 * count
    numbers = np.random.default_rng(0).normal(size=(size, PROBES)) * AMPLITUDE
    inputs = np.concatenate([np.eye(size), numbers], axis=1)
    latents = [inputs[0] * float(getattr(scheduler, "init_noise_sigma", 1.0))]
    scales, levels, denoised, drawn = [], [], [], []
    sample = as_latent(latents[0])
    for k, t in enumerate(times):
        scale = 1.0
        if hasattr(scheduler, "scale_model_input"):
            scale = float(scheduler.scale_model_input(torch.ones(1, 1, 1, 1, dtype=torch.float64), t))
        scales.append(scale)
        alpha, sigma = level_of(scheduler, t, k, scale)
        levels.append(sigma / alpha if alpha else math.inf)
        with noise_of(type(scheduler), as_latent(inputs[1 + count + k])) as draws:
            out = scheduler.step(as_latent(inputs[1 + k]), t, sample, **options)
        drawn.append(not draws)
        if not torch.isfinite(out.prev_sample).all():
            raise CheckpointError(f"{name} gives numbers that are not finite at timestep {float(t):g}")
        estimate = getattr(out, "pred_original_sample", None)
        if estimate is None:
            denoised.append(clean_by_level(scheduler, k, alpha, sigma))
        else:
            basis = np.stack([latents[k], inputs[1 + k]], axis=1)
            solved = np.linalg.lstsq(basis[:size], as_vector(estimate)[:size], rcond=None)[0]
            denoised.append((float(solved[0]), float(solved[1])))
        sample = out.prev_sample
        latents.append(as_vector(sample))
    basis, probes = np.split(np.stack(latents), [size], axis=1)
    if not (np.abs(probes - basis @ numbers) <= 1e-9 * (np.abs(basis) @ np.abs(numbers))).all():
        raise CheckpointError(f"{name} is not linear in latent, predictions and noise: clipping or thresholding?")
    return Trace(
        latents=basis,
        t=tuple(float(t) for t in times),
        scale_in=tuple(scales),
        sigma=tuple(levels),
        denoised=tuple(denoised),
        drawn=tuple(drawn),
    )


def as_latent(vector: Float64) -> Any:
    return torch.tensor(vector, dtype=torch.float64).reshape(-1, 1, 1, 1)


def as_vector(latent: Any) -> Float64:
    return np.asarray(latent.to(torch.float64).flatten().numpy())


class Double:
    """A module whose float32 is float64."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.float32 = module.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


@contextmanager
def silent() -> Iterator[None]:
    """Within, the libraries' advice is not logged, and no warning shown: of options that they ignore, or change for some step
    counts, of networks without numbers."""
    before = {name: logging.getLogger(name).level for name in ("diffusers", "transformers")}
    for name in before:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def in_float64(scheduler_class: type) -> Iterator[None]:
    """Within, schedulers of this class keep tables and upcast samples in float64 where their code says float32.

    Replaces names in the module of the class, and torch's default dtype: not for use beside other threads.
    """
    module = sys.modules[scheduler_class.__module__]
    replaced = {name: getattr(module, name) for name in ("np", "torch") if hasattr(module, name)}
    default = torch.get_default_dtype()
    try:
        for name, value in replaced.items():
            setattr(module, name, Double(value))
        torch.set_default_dtype(torch.float64)
        yield
    finally:
        torch.set_default_dtype(default)
        for name, value in replaced.items():
            setattr(module, name, value)


@contextmanager
def noise_of(scheduler_class: type, noise: Any) -> Iterator[list[Any]]:
    """Within, the module's `randn_tensor` gives this noise, once, and takes it from the list."""
    module: Any = sys.modules[scheduler_class.__module__]
    original = getattr(module, "randn_tensor", None)
    draws: list[Any] = [noise]

    def given(shape: Any, *_: Any, **__: Any) -> Any:
        if not draws:
            raise CheckpointError(f"{scheduler_class.__name__} draws noise twice in a step; a row has one draw")
        if tuple(shape) != tuple(noise.shape):
            raise CheckpointError(f"{scheduler_class.__name__} draws noise of another shape than its latent")
        return draws.pop()

    if original is None:
        yield draws
        return
    try:
        module.randn_tensor = given
        yield draws
    finally:
        module.randn_tensor = original


def level_of(scheduler: Any, t: Any, k: int, scale: float) -> tuple[float, float]:
    """alpha and sigma of the latent that evaluation k sees."""
    if scale != 1.0:  # latents x0 + sigma·noise; the network sees them at the norm of the training images, or at 1
        return 1.0, math.sqrt(1 / scale**2 - (scheduler.config.get("sigma_data") or 1.0) ** 2)
    sigmas, bar = getattr(scheduler, "sigmas", None), getattr(scheduler, "alphas_cumprod", None)
    if sigmas is not None:
        index = getattr(scheduler, "step_index", None)
        sigma = float(sigmas[k if index is None else index])
        if bar is None or scheduler.config.get("use_flow_sigmas"):
            return 1 - sigma, sigma
        norm = math.hypot(sigma, 1.0)
        return 1 / norm, sigma / norm
    if bar is None:
        raise CheckpointError(f"{type(scheduler).__name__} has neither sigmas nor alphas_cumprod")
    value = float(bar[int(t)])
    return math.sqrt(value), math.sqrt(1 - value)


def clean_by_level(scheduler: Any, k: int, alpha: float, sigma: float) -> tuple[float, float]:
    """Coefficients of x_k and p_k in the estimate of the clean latent, from alpha and sigma."""
    if hasattr(scheduler, "precondition_outputs"):  # EDM
        one = torch.ones((), dtype=torch.float64)
        level = one * sigma
        keep = scheduler.precondition_outputs(one, 0 * one, level)
        return float(keep), float(scheduler.precondition_outputs(0 * one, one, level))
    prediction = scheduler.config.get("prediction_type", "flow_prediction")
    norm = math.hypot(alpha, sigma)
    if prediction == "epsilon":
        return (1 / alpha, -sigma / alpha) if alpha else (math.inf, -math.inf)
    if prediction == "sample":
        return 0.0, 1.0
    if prediction == "v_prediction":
        return alpha / norm**2, -sigma / norm
    if prediction == "flow_prediction":
        return 1.0, -sigma
    raise CheckpointError(f"{type(scheduler).__name__}: prediction type {prediction!r} is unknown (evaluation {k})")


def shortest_windows(latents: Float64) -> list[Window]:
    """keep, gain and noise of every step, within the least number of latents and predictions that does for all."""
    steps = range(len(latents) - 1)
    for total in range(2, 2 * LONGEST_WINDOW + 1):
        for kept in range(max(1, total - LONGEST_WINDOW), min(LONGEST_WINDOW, total - 1) + 1):
            if all(window(latents, k, kept, total - kept) for k in steps):
                return [smallest(latents, k, kept, total - kept) for k in steps]
    raise CheckpointError(f"a step needs more than {LONGEST_WINDOW} latents or predictions")


def smallest(latents: Float64, k: int, most_kept: int, most_gained: int) -> Window:
    """The window of one step with the fewest coefficients, and of those the fewest latents."""
    sizes = ((i, j) for i in range(1, most_kept + 1) for j in range(1, most_gained + 1))
    found = (window(latents, k, *size) for size in sorted(sizes, key=lambda size: (sum(size), size)))
    return next(coefficients for coefficients in found if coefficients)


def window(latents: Float64, k: int, kept: int, gained: int) -> Window | None:
    """x_{k+1} over the last latents and predictions, or None where these are too few."""
    target, count = latents[k + 1], len(latents) - 1
    past = latents[max(0, k + 1 - kept) : k + 1][::-1]
    free = [*(1 + j for j in range(k, max(-1, k - gained), -1)), 1 + count + k]  # p_k, p_{k-1}.., z_k
    bound = np.delete(np.arange(len(target)), free)
    keep = np.linalg.lstsq(past[:, bound].T, target[bound], rcond=None)[0]
    size = np.abs(target[bound]) + np.abs(keep) @ np.abs(past[:, bound])
    if (np.abs(keep @ past[:, bound] - target[bound]) > RESIDUAL * size.max()).any():
        return None
    *gain, noise = (float(value) for value in (target - keep @ past)[free])
    return tuple(map(float, keep)), tuple(gain), noise if abs(noise) > FAINT else 0.0
