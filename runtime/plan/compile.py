"""Compile a request into its plan: everything that can be decided before the first network call."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stepforge.runtime.bundle import Bundle, ComponentId
from stepforge.runtime.errors import RequestError
from stepforge.runtime.plan import Plan, Step, rows_of
from stepforge.runtime.plan.guidance import weights
from stepforge.runtime.plan.guiders import parse as parse_guider
from stepforge.runtime.plan.reuse import parse as parse_reuse
from stepforge.runtime.plan.reuse import variants
from stepforge.runtime.plan.samplers import sample_rows
from stepforge.runtime.plan.schedules import SchedulerCard
from stepforge.runtime.plan.windows import scales

if TYPE_CHECKING:
    from stepforge.runtime.request import Request

Rows = tuple[tuple[Step, ...], float]  # as samplers.sample_rows returns them


def compile_plan(request: Request, scheduler: SchedulerCard, rows: Rows | None = None) -> Plan:
    """The request as rows of numbers. Raises RequestError for what the model's scheduler cannot do.

    rows: steps and initial noise of the caller's own, in place of the request's sampler (`export.schedulers.from_diffusers`
    makes them from any linear diffusers scheduler); the request's guidance applies to them too.
    """
    steps, init_noise = rows or sample_rows(
        scheduler,
        sampler=request.sampler or "",
        steps=request.steps if request.timesteps is None and request.sigmas is None else None,
        schedule=request.schedule or "",
        spacing=request.spacing,
        timesteps=request.timesteps,
        sigmas=request.sigmas,
        eta=request.eta,
    )
    strengths = request.adapter_schedule
    if not isinstance(strengths, tuple):
        strengths = (strengths,) * len(steps)
    elif len(strengths) != len(steps):
        raise RequestError(f"adapter_schedule has {len(strengths)} numbers for {len(steps)} network evaluations")
    by_control = [scales(control, steps) for control in request.controls]
    controls = list(zip(*by_control, strict=True)) if by_control else [()] * len(steps)
    guider = parse_guider(request.guider)
    guidance = [
        1.0 if guider.is_zeroed(step) and rows_of(w) == 2 else w
        for step, w in zip(steps, weights(request.guidance, steps), strict=True)
    ]
    if guider.adaptive is not None and request.reuse and 0.0 in guidance:
        # once adaptive guidance has latched, nothing of the unconditional row is kept
        raise RequestError("adaptive guidance and reuse do not go with steps of guidance 0; leave one of the three out")
    columns = zip(steps, guidance, strengths, controls, strict=True)
    steps = tuple(replace(step, guidance=w, adapters=s, control=scale) for step, w, s, scale in columns)
    reused = zip(steps, variants(parse_reuse(request.reuse), steps), strict=True)
    return Plan(tuple(replace(step, reuse=variant) for step, variant in reused), init_noise)


def check_variants(plan: Plan, bundle: Bundle) -> None:
    """Raises RequestError if the plan names a reuse variant that the bundle was exported without."""
    for denoiser, variant in sorted({(step.denoiser, step.reuse) for step in plan.steps if step.reuse}):
        if ComponentId("denoiser", denoiser, variant) not in bundle.components:
            raise RequestError(f"the bundle has no variant {variant!r}; export it with --reuse {variant}")


def describe(plan: Plan) -> list[dict[str, object]]:
    """The plan as printable rows, one dict a step."""
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
            "denoiser": ComponentId("denoiser", step.denoiser, step.reuse).label,
        }
        for k, step in enumerate(plan.steps)
    ]
