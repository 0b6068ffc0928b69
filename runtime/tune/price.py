"""What a plan costs on this machine: rows of each network, weighed by what a row of it takes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np

from stepforge.runtime.bundle import Bundle, ComponentId
from stepforge.runtime.bundle.format import Role
from stepforge.runtime.engine import Engine
from stepforge.runtime.plan import Plan, rows_of
from stepforge.runtime.plan.reuse import Reuse
from stepforge.runtime.plan.stages import compile_stage
from stepforge.runtime.request import Request, Result
from stepforge.runtime.tune.candidate import has_variant

PROBE_STEPS = 5  # steps of the requests that are timed
PROBE_RUNS = 3
LEAST = 1e-6  # seconds of a row: noise makes some solutions negative, and prices are ratios


def row_counts(plan: Plan, request: Request, bundle: Bundle) -> dict[str, int]:
    """Rows of one image by label, as `Stats.rows` counts denoisers, ControlNets and the networks of stages."""
    cond_only = [control.guess_mode or bundle.controls[control.name].global_pool for control in request.controls]
    counts: dict[str, int] = {}
    for step in plan.steps:
        rows = rows_of(step.guidance)
        used = [(ComponentId("denoiser", step.denoiser, step.reuse).label, rows)]
        variant = step.reuse if step.reuse == "deepcache" else ""
        for control, conditional, scale in zip(request.controls, cond_only, step.control, strict=True):
            label = ComponentId("control_residuals", control.name, variant).label
            used.append((label, 0 if not scale else int(step.guidance != 0.0) if conditional else rows))
        for label, count in used:
            counts[label] = counts.get(label, 0) + count
    for upscale in request.upscale:
        stage = compile_stage(upscale, bundle)
        label = stage_label(upscale.name, stage)
        counts[label] = counts.get(label, 0) + (stage.rows or 1)
    return {label: count for label, count in counts.items() if count}


def prices(engine: Engine, request: Request) -> dict[str, float]:
    """What a row of each network costs on this machine, in rows of the whole denoiser.

    Short requests of each kind, as many images as fill a network call, the fastest of three runs; the seconds of
    each kind of row are then the solution of a system of equations, one for each request.
    """
    probe = replace(
        request, steps=min(request.steps, PROBE_STEPS), images=max(1, engine.max_rows // 2), preset="", upscale=()
    )
    kinds = ["", *(reuse for reuse in ("deepcache(5)", "tgate(0.2)") if has_variant(engine, reuse.partition("(")[0]))]
    sets = [(), *((replace(c, scale=1.0, start=0.0, end=1.0, sigma=None),) for c in request.controls)]
    requests = [replace(probe, reuse=Reuse.parse(kind), controls=controls) for kind, controls in product(kinds, sets)]
    rows, seconds = [], []
    for one in requests:
        results = [engine.generate(one) for _ in range(PROBE_RUNS)]
        rows.append(denoising_rows(results[0]))
        seconds.append(min(result.stats.seconds["denoise"] for result in results))
    labels = list(dict.fromkeys(label for counts in rows for label in counts))
    matrix = np.array([[counts.get(label, 0) for label in labels] for counts in rows], np.float64)
    solved = np.maximum(np.linalg.lstsq(matrix, np.array(seconds), rcond=None)[0], LEAST)
    found = dict(zip(labels, solved.tolist(), strict=True))
    whole = found[labels[0]]
    found |= _stage_seconds(engine, request)
    return {label: round(value / whole, 3) for label, value in found.items()}


def stage_label(name: str, plan: Plan) -> str:
    """What `Stats.rows` calls the network of a stage."""
    role: Role = "denoiser" if plan.steps else "upscaler"
    return ComponentId(role, plan.steps[0].denoiser if plan.steps else role, stage=name).label


def _stage_seconds(engine: Engine, request: Request) -> dict[str, float]:
    """Seconds of a row of each stage's network, the fastest of three runs of a few steps, in the size that it has there."""
    if not request.upscale:
        return {}
    card = engine.bundle.stages
    short = tuple(
        replace(upscale, steps=PROBE_STEPS) if card[upscale.name].scheduler else upscale for upscale in request.upscale
    )
    probe = replace(request, steps=1, images=1, preset="", upscale=short)
    results = [engine.generate(probe) for _ in range(PROBE_RUNS)]
    found = {}
    for name, plan in results[0].stages:
        label, spent = stage_label(name, plan), f"{name}/{'denoise' if plan.steps else 'upscale'}"
        found[label] = min(result.stats.seconds[spent] / result.stats.rows[label] for result in results)
    return found


def denoising_rows(result: Result) -> dict[str, int]:
    """Rows of the networks that a step runs."""
    networks = {ComponentId("denoiser", step.denoiser, step.reuse).label for step in result.plan.steps}
    for control in result.request.controls:
        networks |= {ComponentId("control_residuals", control.name, variant).label for variant in ("", "deepcache")}
    return {label: count for label, count in result.stats.rows.items() if label in networks}
