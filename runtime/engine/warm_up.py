"""Short runs that show an engine every network and batch size of a request before the first one comes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from stepforge.runtime.bundle import Bundle
from stepforge.runtime.checks import whole
from stepforge.runtime.engine.jobs.future import RequestFuture
from stepforge.runtime.engine.state import Job, Leg
from stepforge.runtime.plan import Plan, Step
from stepforge.runtime.plan.reuse import MAKES, NEEDS
from stepforge.runtime.plan.step import rows_of
from stepforge.runtime.request import Request
from stepforge.runtime.request.init import Init
from stepforge.runtime.request.request import MAX_IMAGES


def masked(request: Request, bundle: Bundle) -> Request:
    """A request without an image as the bundle's model can run it: an inpainting model gets one that is masked as a whole."""
    if not bundle.reads_mask:
        return request
    height, width = request.height or bundle.card.height, request.width or bundle.card.width
    picture, mask = np.zeros((height, width, 3), np.uint8), np.full((height, width), 255, np.uint8)
    return replace(request, init=Init(image=picture, mask=mask))


def short_jobs(job: Job, images: int | None, max_rows: int, max_pixels: int) -> Iterator[Job]:
    """Jobs of every number of images that can share a call, the most first: what needs most memory is asked for first. One
    image passes all legs, the others the first one alone.

    images: most of them; None: as many as the first leg's rows and pixels let. Raises RequestError.
    """
    leg = job.legs[0]
    rows = max((rows_of(step.guidance) for step in leg.plan.steps), default=1)
    most = max(1, min(max_rows // rows, max_pixels // (rows * leg.pixels), MAX_IMAGES))
    if images is not None:
        most = whole("images", images, 1, MAX_IMAGES)
    for count in range(most, 0, -1):
        legs = [_short(leg) for leg in (job.legs if count == 1 else job.legs[:1])]
        future = RequestFuture(job.future.check_wait)
        yield Job(replace(job.request, images=count), legs, future, adapters=job.adapters)


def _short(leg: Leg) -> Leg:
    """The leg with one step of each kind. What it draws is no picture."""
    return Leg(
        replace(leg.plan, steps=_kinds(leg.plan)), leg.size, leg.stage,
        card=leg.card, upscale=leg.upscale, reads_latents=leg.reads_latents,
    )  # fmt: skip


def _kinds(plan: Plan) -> tuple[Step, ...]:
    """The first step of each denoiser and reuse variant with each number of rows and set of ControlNets, and the steps whose
    activations they reuse."""
    first: dict[tuple[object, ...], int] = {}
    for k, step in enumerate(plan.steps):
        first.setdefault((step.denoiser, step.reuse, rows_of(step.guidance), tuple(map(bool, step.control))), k)
    wanted = list(first.values())
    for k in wanted:  # grows on the way
        need = NEEDS[plan.steps[k].reuse]
        if need is not None:
            wanted.append(max(j for j in range(k) if need in MAKES[plan.steps[j].reuse]))
    return tuple(plan.steps[k] for k in sorted(set(wanted)))
