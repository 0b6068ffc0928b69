"""Any linear diffusers scheduler as rows of numbers, by pushing basis vectors through it.

A scheduler whose steps are linear in latent, predictions and noise is known exactly from what it does to unit vectors.
So `expansion` is the reference for every sampler of `runtime/samplers.py`, and `from_diffusers` compiles schedulers for
which stepforge has no formula.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stepforge.runtime.errors import CheckpointError
from stepforge.runtime.plan import Step

Array = NDArray[np.float64]
LONGEST = 8  # latents or predictions of a window
RESIDUAL = 1e-7  # relative; coefficients in float64 are good to about 1e-13


class _Double:
    """A module whose float32 is float64."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.float32 = module.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


@contextmanager
def in_float64(scheduler_class: type) -> Iterator[None]:
    """Within, schedulers of this class keep tables and upcast samples in float64 where their code says float32.

    Replaces names in the module of the class, so no other thread may use that module meanwhile.
    """
    module = sys.modules[scheduler_class.__module__]
    replaced = {name: getattr(module, name) for name in ("np", "torch") if hasattr(module, name)}
    default = torch.get_default_dtype()
    try:
        for name, value in replaced.items():
            setattr(module, name, _Double(value))
        torch.set_default_dtype(torch.float64)
        yield
    finally:
        torch.set_default_dtype(default)
        for name, value in replaced.items():
            setattr(module, name, value)


class _Noise:
    """Stands in for a module's `randn_tensor`; hands out what it is given, one draw per step."""

    def __init__(self) -> None:
        self.next: Any = None
        self.draws = 0

    def __call__(self, shape: Any, *_: Any, **__: Any) -> Any:
        self.draws += 1
        if tuple(shape) != tuple(self.next.shape):
            raise CheckpointError(f"scheduler draws noise of shape {tuple(shape)}, not of its latent")
        if self.draws > 1:
            raise CheckpointError("scheduler draws noise more than once in a step; rows have one draw")
        return self.next


@dataclass(frozen=True, slots=True)
class _Run:
    """What a scheduler did: latents x_0..x_K [K + 1, inputs] and, per evaluation, what the network was given."""

    latents: Array
    clean: Array | None  # estimates of the clean latent [K, inputs], where the scheduler gives them
    t: tuple[float, ...]
    sigma: tuple[float, ...]  # noise-to-signal
    level: tuple[tuple[float, float], ...]  # alpha, sigma of x_k
    scale_in: tuple[float, ...]
    init_noise: float


def _drive(scheduler: Any, inputs: Array, steps: int | None, options: Mapping[str, Any], timing: Mapping[str, Any]) -> _Run:
    """Runs the scheduler on rows of `inputs`: x_0, then p_0.., then z_0.. each [inputs, width]."""
    if steps is None:
        scheduler.set_timesteps(**timing)
    else:
        scheduler.set_timesteps(steps, **timing)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else repeated timesteps make it skip
    times = list(scheduler.timesteps)
    count = len(times)
    module = sys.modules[type(scheduler).__module__]
    noise = _Noise()
    original = getattr(module, "randn_tensor", None)
    init_noise = float(scheduler.init_noise_sigma) if hasattr(scheduler, "init_noise_sigma") else 1.0

    def tensor(row: Array) -> Any:
        return torch.from_numpy(np.array(row, dtype=np.float64)).reshape(-1, 1, 1, 1)

    sample = tensor(inputs[0] * init_noise)
    latents, clean, seen = [inputs[0] * init_noise], [], []
    try:
        if original is not None:
            module.randn_tensor = noise  # type: ignore[attr-defined]
        for k, t in enumerate(times):
            scale = 1.0
            if hasattr(scheduler, "scale_model_input"):
                scale = float(scheduler.scale_model_input(torch.ones(1, 1, 1, 1, dtype=torch.float64), t).max())
            index = getattr(scheduler, "step_index", None)
            seen.append((float(t), scale, *_level(scheduler, t, k if index is None else index, scale)))
            noise.next, noise.draws = tensor(inputs[1 + count + k]), 0
            out = scheduler.step(tensor(inputs[1 + k]), t, sample, **options)
            sample = out.prev_sample
            latents.append(sample.double().flatten().numpy())
            if getattr(out, "pred_original_sample", None) is not None:
                clean.append(out.pred_original_sample.double().flatten().numpy())
    finally:
        if original is not None:
            module.randn_tensor = original  # type: ignore[attr-defined]
    t_, scale_, alpha_, sigma_ = zip(*seen, strict=True)
    ratios = tuple(s / a if a else float("inf") for a, s in zip(alpha_, sigma_, strict=True))
    return _Run(
        latents=np.stack(latents),
        clean=np.stack(clean) if len(clean) == count else None,
        t=t_,
        sigma=ratios,
        level=tuple(zip(alpha_, sigma_, strict=True)),
        scale_in=scale_,
        init_noise=init_noise,
    )


def _level(scheduler: Any, t: Any, index: int, scale: float) -> tuple[float, float]:
    """alpha and sigma of the latent that the network sees at this step."""
    if scale != 1.0:  # latents x0 + sigma·noise, scaled to norm 1 for the network
        return 1.0, float((1 / scale**2 - 1) ** 0.5)
    sigmas, bar = getattr(scheduler, "sigmas", None), getattr(scheduler, "alphas_cumprod", None)
    if sigmas is not None:
        sigma = float(sigmas[index])
        if bar is None or scheduler.config.get("use_flow_sigmas"):
            return 1 - sigma, sigma
        norm = float(np.hypot(sigma, 1.0))
        return 1 / norm, sigma / norm
    if bar is None:
        raise CheckpointError(f"{type(scheduler).__name__} has neither sigmas nor alphas_cumprod")
    value = float(bar[int(t)])
    return value**0.5, (1 - value) ** 0.5


def _unit(scheduler: Any, steps: int | None, timing: Mapping[str, Any]) -> Array:
    """One unit vector per input: x_0, p_0.., z_0.."""
    if steps is None:
        scheduler.set_timesteps(**timing)
    else:
        scheduler.set_timesteps(steps, **timing)
    return np.eye(1 + 2 * len(scheduler.timesteps))


def _expand(scheduler: Any, steps: int | None, options: Mapping[str, Any], timing: Mapping[str, Any]) -> _Run:
    """Runs unit vectors, and checks on plain numbers that they tell the whole story."""
    name = type(scheduler).__name__
    with in_float64(type(scheduler)):
        double = type(scheduler).from_config(scheduler.config)
        try:
            run = _drive(double, _unit(double, steps, timing), steps, options, timing)
            rng = np.random.default_rng(0)
            numbers = rng.normal(size=(run.latents.shape[1], 4)) * 5.0  # large, so that clipping shows
            check = _drive(double, numbers, steps, options, timing)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{name} cannot be run on these steps: {error}") from error
    if not np.isfinite(run.latents).all():
        raise CheckpointError(f"{name} gives numbers that are not finite on these steps")
    wanted = run.latents @ numbers
    scale = np.abs(run.latents) @ np.abs(numbers)
    error = np.abs(check.latents - wanted) / np.maximum(scale, 1e-30)
    if not error.max() <= 1e-6:
        raise CheckpointError(f"{name} is not linear in latent, predictions and noise; clipping or thresholding?")
    return run


def expansion(
    scheduler: Any, steps: int | None = None, *, step_options: Mapping[str, Any] | None = None, **timing: Any
) -> list[dict[tuple[str, int], float]]:
    """Each latent x_0..x_K of the scheduler over its inputs, as `runtime.plan.expand` gives those of a plan.

    timing: further arguments of `set_timesteps`; step_options: of `step`, such as eta.
    """
    run = _expand(scheduler, steps, step_options or {}, timing)
    count = len(run.t)
    keys = [("x", 0), *(("p", k) for k in range(count)), *(("z", k) for k in range(count))]
    return [{key: float(value) for key, value in zip(keys, row, strict=True) if value} for row in run.latents]


def from_diffusers(
    scheduler: Any, steps: int | None = None, *, step_options: Mapping[str, Any] | None = None, **timing: Any
) -> tuple[tuple[Step, ...], float]:
    """The scheduler's steps as rows, each over the shortest window that gives it, and the factor of the first noise."""
    run = _expand(scheduler, steps, step_options or {}, timing)
    count = len(run.t)
    prediction = scheduler.config.get("prediction_type") or "flow_prediction"
    rows = []
    for k in range(count):
        keep, gain, noise = _shortest(run.latents, k, count)
        rows.append(
            Step(
                t=run.t[k],
                sigma=run.sigma[k],
                scale_in=run.scale_in[k],
                keep=keep,
                gain=gain,
                noise=noise,
                denoised=_denoised(run, k, prediction),
            )
        )
    return tuple(rows), run.init_noise


def _shortest(latents: Array, k: int, count: int) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """keep, gain and noise of x_{k+1}: fewest coefficients, then fewest latents."""
    target = latents[k + 1]
    limit = min(LONGEST, k + 1)
    for total in range(2, 2 * limit + 1):
        for kept in range(max(1, total - limit), min(limit, total - 1) + 1):
            gained = total - kept
            free = [*(1 + k - j for j in range(gained)), 1 + count + k]  # p_k.., z_k: any coefficient can be had
            bound = np.delete(np.arange(len(target)), free)
            past = latents[k - np.arange(kept)]
            keep = np.linalg.lstsq(past[:, bound].T, target[bound], rcond=None)[0]
            size = np.abs(target[bound]) + np.abs(keep) @ np.abs(past[:, bound])
            if (np.abs(keep @ past[:, bound] - target[bound]) <= RESIDUAL * max(size.max(), 1e-30)).all():
                rest = target - keep @ past
                values = [float(rest[i]) for i in free]
                noise = 0.0 if abs(values[-1]) < 1e-9 else values[-1]
                return tuple(map(float, keep)), tuple(values[:-1]), noise
    raise CheckpointError(f"step {k} needs more than {LONGEST} latents or predictions")


def _denoised(run: _Run, k: int, prediction: str) -> tuple[float, float]:
    """Coefficients of x_k and p_k in the estimate of the clean latent."""
    if run.clean is not None:
        past = np.stack([run.latents[k], np.eye(run.latents.shape[1])[1 + k]])
        both = np.linalg.lstsq(past.T, run.clean[k], rcond=None)[0]
        return float(both[0]), float(both[1])
    alpha, sigma = run.level[k]
    norm = float(np.hypot(alpha, sigma))
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction == "sample":
        return 0.0, 1.0
    if prediction == "v_prediction":
        return alpha / norm**2, -sigma / norm
    if prediction == "flow_prediction":
        return 1.0, -sigma
    raise CheckpointError(f"prediction type {prediction!r} is unknown; clean latents cannot be estimated")
