"""Compile a request into its plan: everything that can be decided before the first network call."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from stepforge.runtime.bundle import UNET, Bundle, ComponentId, ModelCard
from stepforge.runtime.bundle.scheduler import SchedulerCard
from stepforge.runtime.errors import RequestError
from stepforge.runtime.plan.guidance import Guidance, weights
from stepforge.runtime.plan.guiders import Guider
from stepforge.runtime.plan.plan import Plan
from stepforge.runtime.plan.reuse import Reuse, variants
from stepforge.runtime.plan.sampling.sample import sample_steps
from stepforge.runtime.plan.sampling.truncate import Strength
from stepforge.runtime.plan.step import Step, rows_of
from stepforge.runtime.plan.switch import Switch
from stepforge.runtime.plan.windows import Window

if TYPE_CHECKING:
    from stepforge.runtime.request import Request

CACHED_PLANS = 64  # LRU capacity

Rows = tuple[tuple[Step, ...], float]  # as sample.sample_steps returns them


class Sampling(NamedTuple):
    """What of a request decides its sampler's steps."""

    sampler: str | None
    steps: int | None
    schedule: str | None
    spacing: str | None
    timesteps: tuple[float, ...] | None
    sigmas: tuple[float, ...] | None
    eta: float | None
    init: Strength | None = None
    experts: Switch | None = None


class Weighing(NamedTuple):
    """What of a request decides the rest of its plan."""

    guidance: Guidance
    guider: Guider
    reuse: Reuse
    adapters: float | tuple[float, ...]
    controls: tuple[Window, ...]


def compile_plan(request: Request, scheduler: SchedulerCard, rows: Rows | None = None, *, blends: bool = True) -> Plan:
    """The request as steps. Raises RequestError for what the model's scheduler cannot do.

    Requests that differ only in what decides no step, such as prompts and seeds, get one and the same plan.

    rows: steps and initial noise of the caller's own, in place of the request's sampler (`export.oracle.from_diffusers`
    makes them from any linear diffusers scheduler); the request's guidance applies to them too,
    and each names its denoiser.
    blends: inpainting puts the known part back after each step; a model that reads mask and image does without.
    """
    weighing = Weighing(
        request.guidance,
        request.guider,
        request.reuse,
        request.adapter_schedule,
        tuple(control.window for control in request.controls),
    )
    init = request.init
    if rows is not None and init is not None:
        raise RequestError("steps of the caller's own take no init image")
    if rows is not None:
        return _weighed(*rows, weighing)
    has_steps = request.timesteps is None and request.sigmas is None
    sampling = Sampling(
        request.sampler,
        request.steps if has_steps else None,
        request.schedule,
        request.spacing,
        request.timesteps,
        request.sigmas,
        request.eta,
        None if init is None else Strength(init.strength, init.mask is not None, blends and init.mask is not None),
        request.experts,
    )
    return compiled(scheduler, sampling, weighing)


@lru_cache(CACHED_PLANS)
def compiled(scheduler: SchedulerCard, sampling: Sampling, weighing: Weighing) -> Plan:
    """The plan that these decide, made once. Raises RequestError."""
    plan = _weighed(*sample_steps(scheduler, **sampling._asdict()), weighing)
    if sampling.init is None or sampling.init.is_whole:
        return plan
    first = plan.steps[0].sigma  # sigma / alpha, and init_noise is sigma
    return replace(plan, start=plan.init_noise / first)


def _weighed(steps: tuple[Step, ...], init_noise: float, weighing: Weighing) -> Plan:
    """The sampler's steps with guidance, strengths, ControlNets and variants."""
    strengths = weighing.adapters
    if not isinstance(strengths, tuple):
        strengths = (strengths,) * len(steps)
    elif len(strengths) != len(steps):
        raise RequestError(f"adapter_schedule has {len(strengths)} numbers for {len(steps)} network evaluations")
    by_control = [window.scales(steps) for window in weighing.controls]
    controls = list(zip(*by_control, strict=True)) if by_control else [()] * len(steps)
    guider = weighing.guider
    guidance = [
        1.0 if guider.is_zeroed(step) and rows_of(w) == 2 else w
        for step, w in zip(steps, weights(weighing.guidance, steps), strict=True)
    ]
    if guider.adaptive is not None and weighing.reuse and 0.0 in guidance:
        # once adaptive guidance has latched, nothing of the unconditional row is kept
        raise RequestError("adaptive guidance and reuse do not go with steps of guidance 0; leave one of the three out")
    columns = zip(steps, guidance, strengths, controls, strict=True)
    steps = tuple(replace(step, guidance=w, adapters=s, control=scale) for step, w, s, scale in columns)
    reused = zip(steps, variants(weighing.reuse, steps), strict=True)
    return Plan(tuple(replace(step, reuse=variant) for step, variant in reused), init_noise, guider)


def check_variants(plan: Plan, bundle: Bundle) -> None:
    """Raises RequestError if the plan names an expert or a reuse variant that the bundle was exported without, or a ControlNet
    for an expert that takes none."""
    for denoiser in dict.fromkeys(step.denoiser for step in plan.steps):
        network = bundle.components.get(ComponentId("denoiser", denoiser))
        if network is None:
            known = f"it has {', '.join(['base', *bundle.experts])}"
            have = known if bundle.experts else "it was exported without any (--expert)"
            raise RequestError(f"the bundle has no expert {denoiser!r}; {have}")
        takes = any(tensor.name.startswith("residual_") for tensor in network.inputs)
        if not takes and any(any(step.control) for step in plan.steps if step.denoiser == denoiser) and bundle.controls:
            raise RequestError(
                f"a ControlNet would run with {denoiser}, which takes none; end its window before {denoiser} begins"
            )
    for denoiser, variant in sorted({(step.denoiser, step.reuse) for step in plan.steps if step.reuse}):
        if ComponentId("denoiser", denoiser, variant) not in bundle.components:
            if ComponentId("denoiser", UNET.name, variant) in bundle.components:
                raise RequestError(f"{denoiser} has no variant {variant!r}; leave out reuse, or that expert")
            raise RequestError(f"the bundle has no variant {variant!r}; export it with --reuse {variant}")


def check_text(plan: Plan, card: ModelCard) -> None:
    """Raises RequestError if the plan guides a model that reads no text: it has one row a step."""
    if not card.text_encoders and (odd := [step.guidance for step in plan.steps if step.guidance != 1.0]):
        raise RequestError(f"{card.name} reads no text, so that nothing can guide it: guidance is {odd[0]:g}; give 1")


def describe(plan: Plan, stage: str = "") -> list[dict[str, object]]:
    """The plan as printable rows, one dict a step. stage: whose it is, empty for the base model."""
    return [
        {
            "step": k,
            "t": round(step.t, 3),
            "sigma": round(step.sigma, 4),
            "scale_in": round(step.scale_in, 6),
            "guidance": step.guidance,
            "rows": rows_of(step.guidance),
            "keep": [round(value, 6) for value in step.keep],
            "gain": [round(value, 6) for value in step.gain],
            "noise": round(step.noise, 6),
            "adapters": step.adapters,
            **({"control": list(step.control)} if step.control else {}),
            **({"known": [round(value, 6) for value in step.known]} if step.known else {}),
            "denoiser": ComponentId("denoiser", step.denoiser, step.reuse, stage).label,
        }
        for k, step in enumerate(plan.steps)
    ]
