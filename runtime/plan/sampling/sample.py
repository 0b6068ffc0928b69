"""From a sampler's name and options to its steps: noise levels, then a row of coefficients for each evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from stepforge.runtime.arrays import Float64
from stepforge.runtime.bundle.scheduler import SPACINGS, SchedulerCard
from stepforge.runtime.bundle.steps import Row
from stepforge.runtime.checks import choice, shown, whole
from stepforge.runtime.errors import RequestError
from stepforge.runtime.plan.sampling import multistep
from stepforge.runtime.plan.sampling.levels import SamplerOptions
from stepforge.runtime.plan.sampling.linear import Linear, NoisePath
from stepforge.runtime.plan.sampling.samplers import SAMPLERS, Sampler
from stepforge.runtime.plan.sampling.schedules import check_falling, check_timesteps
from stepforge.runtime.plan.sampling.truncate import Strength, truncated, with_known
from stepforge.runtime.plan.step import Step
from stepforge.runtime.plan.switch import Switch

CLIP = (1.0, 1.0)  # clipping to -1..1 is thresholding whose limit cannot rise


def sample_steps(
    card: SchedulerCard,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    schedule: str | None = None,
    spacing: str | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    eta: float | None = None,
    init: Strength | None = None,
    experts: Switch | None = None,
) -> tuple[tuple[Step, ...], float]:
    """Steps of a sampler, and the factor of the noise that it starts from. Raises RequestError.

    init: the steps that an image of the caller's goes through, see truncate.py. experts: which denoiser runs when.

    sampler, schedule, spacing: None for the model's own, and where it has none that fits, the sampler's. timesteps,
    sigmas: in place of steps. Sigmas for euler include the one that the last step ends at, usually 0; sigmas for
    flow_euler end at 0 unsaid, and are shifted as the model asks.
    """
    if sampler is None and card.is_compiled:
        given = {"schedule": schedule, "spacing": spacing, "timesteps": timesteps, "sigmas": sigmas, "eta": eta}
        if init is not None and (init.blends or not init.is_whole):
            raise RequestError(
                f"the model's sampler {card.sampler} takes no init image (an inpainting model's at strength 1); "
                f"{_those(card, lambda kind: kind.truncates)}"
            )
        if experts is not None and experts.hands_over:
            raise RequestError(
                f"the model's sampler {card.sampler} cannot start afresh at a later step, as {experts} asks; give windows in "
                f"sigma, or a sampler; {_those(card, _hands_over)}"
            )
        found, noise = compiled_steps(card, steps, [option for option, value in given.items() if value is not None])
        return found if experts is None else experts.chosen(found), noise
    name = choice("sampler", sampler or card.sampler, tuple(SAMPLERS))
    kind = SAMPLERS[name]
    _check_model(card, name)
    own_times = own_sigmas = None
    if timesteps is not None:
        own_times = check_timesteps(timesteps, 0, card.num_train_timesteps - (name != "flow_euler"))
    if sigmas is not None:
        own_sigmas = check_falling("sigmas", sigmas)
    options = SamplerOptions(
        sampler=name,
        steps=_count(card, name, steps, own_times, own_sigmas),
        schedule=_schedule(card, name, schedule, own=timesteps is not None or sigmas is not None),
        spacing=_spacing(card, name, spacing),
        timesteps=own_times,
        sigmas=own_sigmas,
        eta=_eta(card, name, eta),
        alpha_to_one=kind.alpha_to_one if card.set_alpha_to_one is None else card.set_alpha_to_one,
    )
    path = kind.levels(card, options)
    limit = card.threshold if kind.thresholds else None
    if limit is None and card.clip_sample and kind.clips:
        limit = CLIP
    if card.prediction_type == "epsilon" and path.at[0].alpha == 0:
        raise RequestError(
            f"sampler {name!r} cannot start where there is no signal on a model that predicts epsilon;"
            " choose euler, or a spacing that starts later"
        )
    path = replace(path, limited=limit is not None)
    whole_path = path
    if init is not None:
        _check_init(card, name, init)
        path = truncated(path, init, options.steps, kind.evaluations, repeats=name == "pndm")
    if experts is not None and experts.hands_over:
        if not _hands_over(kind):
            raise RequestError(
                f"sampler {name!r} cannot start afresh at a later step, as {experts} asks; give windows in sigma, or another "
                f"sampler; {_those(card, _hands_over)}"
            )
        found = _handed_over(kind, experts, whole_path, path, card.num_train_timesteps)
    else:
        found = tuple(step_of(path, k, kind.move(path, k), k // kind.evaluations) for k in range(len(path.at)))
        found = found if experts is None else experts.chosen(found)
    if limit is not None:
        found = tuple(replace(step, threshold=limit) for step in found)
    if card.learned_range and kind.variance is not None:
        if experts is not None and experts.hands_over:
            raise RequestError("a denoiser that predicts its variance does not hand over; give experts in sigma")
        found = tuple(
            replace(step, noise=1.0, variance=kind.variance(*path.moves[k])) if step.t > 0 else step
            for k, step in enumerate(found)
        )
    if (kind.draws_last or (options.eta and name == "ddim")) and not found[-1].noise:
        found = (*found[:-1], replace(found[-1], draws_more=True))
    if init is not None:
        found = with_known(found, path, skips_midpoints=name == "kdpm2") if init.blends else found
        if not init.is_whole:
            return found, path.at[0].sigma
    if path.at[0].scale_in == 1.0:
        return found, 1.0
    first = max(level.sigma for level in path.at)
    return found, math.hypot(first, 1.0) if options.spacing == "leading" else first


def _hands_over(kind: Sampler) -> bool:
    """Whether a sampler can go on with another denoiser as diffusers' second pipeline does. Its PNDM takes any second
    entry of the list for the repeated one, its LMS asks for more history than there is."""
    return kind.truncates and kind.move is not multistep.pndm


def _handed_over(
    kind: Sampler, experts: Switch, whole_path: NoisePath, path: NoisePath, train: int
) -> tuple[Step, ...]:
    """The steps of each denoiser in turn. path: what of the whole one an image of the caller's goes through."""
    if path.blended:
        raise RequestError("inpainting does not go with experts in fractions of the timesteps; give windows in sigma")
    found: list[Step] = []
    for denoiser, own, count in experts.parts(whole_path, train, kind.evaluations):
        if not found and path.before:
            count -= path.before
            own = path
            if count < 1:
                raise RequestError(
                    f"experts: the init image's strength leaves {denoiser} no step; raise it, or the steps"
                )
        index = found[-1].index + 1 if found else 0
        moved = [step_of(own, k, kind.move(own, k), index + k // kind.evaluations) for k in range(count)]
        found += [replace(step, denoiser=denoiser) for step in moved]
    return tuple(found)


def _check_init(card: SchedulerCard, name: str, init: Strength) -> None:
    if not SAMPLERS[name].truncates:
        fit = _those(card, lambda kind: kind.truncates)
        raise RequestError(f"sampler {name!r} cannot start from an image (its history is missing); {fit}")
    if init.blends and not SAMPLERS[name].blends:
        fit = _those(card, lambda kind: kind.truncates and kind.blends)
        raise RequestError(f"sampler {name!r} cannot have its latents changed between steps, as inpainting does; {fit}")


def compiled_steps(card: SchedulerCard, steps: int | None, given: Sequence[str]) -> tuple[tuple[Step, ...], float]:
    """Steps from the bundle's table. given: options of the request that only samplers with a formula take."""
    if given:
        raise RequestError(
            f"the model's sampler {card.sampler} takes steps only, not {given[0]}; {_those(card, lambda _: True)}"
        )
    if card.table is None:
        raise RequestError(f"the steps of the model's sampler {card.sampler} are not at hand; read the bundle")
    init_noise, rows = card.table.rows(card.sampler, whole("steps", steps, 1, card.num_train_timesteps))
    return tuple(as_step(row) for row in rows), init_noise


def as_step(row: Row) -> Step:
    """A compiled row as a step of the plan."""
    return Step(row.t, row.sigma, row.scale_in, row.keep, row.gain, row.noise, row.denoised, index=row.step)


def step_of(path: NoisePath, k: int, latent: Linear, index: int) -> Step:
    """x_{k+1} as a step of the plan, of the sampler's step `index`; its windows end at the oldest coefficient that is not 0."""
    level, clean = path.at[k], path.estimate(k)
    out = next(iter(path.raw(k).terms))
    return Step(
        t=float(np.float32(level.t)),  # what the network is told
        sigma=level.ratio,
        scale_in=level.scale_in,
        keep=window(latent, "x", k),
        gain=window(latent, "p", k),
        noise=latent["z", k],
        denoised=(clean["x", k], clean[out]),
        raw=latent["r", k],
        index=index,
    )


def window(latent: Linear, symbol: str, k: int) -> tuple[float, ...]:
    oldest = min((j for (name, j), value in latent.terms.items() if name == symbol and value != 0.0), default=k)
    return tuple(float(latent[symbol, j]) for j in range(k, oldest - 1, -1))


def _those(card: SchedulerCard, fit: Callable[[Sampler], bool]) -> str:
    """End of a refusal: which samplers would do on the model."""
    names = [
        name
        for name, kind in SAMPLERS.items()
        if fit(kind) and card.prediction_type in kind.predictions and (kind.zero_snr or not card.rescale_betas_zero_snr)
    ]
    return f"choose one of {', '.join(names)}" if names else "name no sampler: the model has one of its own"


def _check_model(card: SchedulerCard, name: str) -> None:
    kind = SAMPLERS[name]
    if card.prediction_type not in kind.predictions:
        fit = _those(card, lambda _: True)
        raise RequestError(f"sampler {name!r} cannot run a model that predicts {card.prediction_type}; {fit}")
    if card.rescale_betas_zero_snr and not kind.zero_snr:
        fit = _those(card, lambda _: True)
        raise RequestError(f"sampler {name!r} cannot run a model of zero terminal SNR; {fit}")


def _count(card: SchedulerCard, name: str, steps: int | None, timesteps: Float64 | None, sigmas: Float64 | None) -> int:
    """Steps of the sampler."""
    own = {"timesteps": timesteps, "sigmas": sigmas}
    given = [what for what, values in own.items() if values is not None]
    for what in given:
        if what not in SAMPLERS[name].custom:
            fit = _those(card, lambda other: what in other.custom)  # noqa: B023, called at once
            raise RequestError(f"sampler {name!r} takes no {what} of a request; {fit}")
    if len(given) + (steps is not None) != 1:
        raise RequestError("give exactly one of steps, timesteps and sigmas")
    if timesteps is not None:
        if not SAMPLERS[name].fractions and (timesteps % 1 != 0).any():
            raise RequestError(f"timesteps of sampler {name!r} must be whole numbers, got {shown(timesteps.tolist())}")
        if name == "flow_euler" and timesteps[-1] == 0:
            raise RequestError("timesteps of sampler 'flow_euler' must be above 0; it ends there unsaid")
        return len(timesteps)
    if sigmas is not None:
        flow = name == "flow_euler"
        needed = sigmas if flow else sigmas[:-1]
        if not needed.size or needed[-1] <= 0 or sigmas[-1] < 0 or (flow and sigmas[0] > 1):
            rule = "lie above 0 and up to 1" if flow else "be two or more, above 0 but for the last"
            raise RequestError(f"sigmas of sampler {name!r} must {rule}; got {shown(sigmas.tolist())}")
        return len(needed)
    return whole("steps", steps, 1, card.num_train_timesteps)


def _schedule(card: SchedulerCard, name: str, schedule: str | None, *, own: bool) -> str:
    """Schedule of sigmas; own: the request brings its timesteps or sigmas."""
    if schedule:
        choice(f"schedule of sampler {name!r}", schedule, SAMPLERS[name].schedules)
        if own and schedule != "normal":
            raise RequestError(
                f"schedule {schedule!r} makes its own sigmas; it takes no timesteps or sigmas of a request"
            )
        return schedule
    return card.schedule if not own and card.schedule in SAMPLERS[name].schedules else "normal"


def _spacing(card: SchedulerCard, name: str, spacing: str | None) -> str:
    default = SAMPLERS[name].spacing
    if spacing:
        choice("spacing", spacing, SPACINGS)
        if default is None:
            raise RequestError(f"sampler {name!r} has timesteps of its own and takes no spacing")
    return spacing or card.timestep_spacing or default or ""


def _eta(card: SchedulerCard, name: str, eta: float | None) -> float:
    default = SAMPLERS[name].eta
    if eta is None:
        return default or 0.0
    if default is None:
        raise RequestError(f"sampler {name!r} has no eta; {_those(card, lambda other: other.eta is not None)}")
    if not 0.0 <= eta <= 1.0:
        raise RequestError(f"eta is {eta}; it must lie in 0..1")
    return float(eta)
