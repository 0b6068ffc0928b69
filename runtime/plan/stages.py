"""Plans of super-resolution stages: what a request says of a stage, on the stage's own scheduler."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from stepforge.runtime.bundle import Bundle, StageCard
from stepforge.runtime.checks import shown
from stepforge.runtime.errors import RequestError
from stepforge.runtime.plan.compile import CACHED_PLANS, Sampling, Weighing, compiled
from stepforge.runtime.plan.guidance import parse_guidance
from stepforge.runtime.plan.guiders import Guider
from stepforge.runtime.plan.plan import Plan
from stepforge.runtime.plan.reuse import Reuse
from stepforge.runtime.plan.step import Step

if TYPE_CHECKING:
    from stepforge.runtime.request import Upscale

OF_NETWORKS = ("name", "image")  # what a stage that is one pass of a network takes


def compile_stage(upscale: Upscale, bundle: Bundle) -> Plan:
    """The plan of one stage; without steps for a feed-forward network. Raises RequestError for what the stage cannot do."""
    card = bundle.stages.get(upscale.name)
    if card is None:
        have = f"it has {', '.join(bundle.stages)}" if bundle.stages else "it was exported without any (--sr NAME=PATH)"
        raise RequestError(f"the bundle has no super-resolution stage {shown(upscale.name)}; {have}")
    what = f"stage {upscale.name!r}"
    if card.scheduler is None:
        if stated := [name for name in upscale.to_dict() if name not in OF_NETWORKS]:
            raise RequestError(f"{what} is a feed-forward network, which takes no {stated[0]}")
        return Plan((), 1.0)
    if upscale.noise_level is not None:
        if card.noising is None:
            raise RequestError(f"{what} reads its image without noise and takes no noise_level")
        if upscale.noise_level > card.most_noise:
            raise RequestError(
                f"noise_level of {what} is {upscale.noise_level}; it knows levels from 0 to {card.most_noise}"
            )
    sampling = Sampling(upscale.sampler, upscale.steps or card.steps, upscale.schedule, None, None, None, None)
    guidance = parse_guidance(card.guidance) if upscale.guidance is None else upscale.guidance
    try:
        return _compiled(card, sampling, Weighing(guidance, Guider(), Reuse(), 1.0, ()))
    except RequestError as error:
        raise RequestError(f"{what}: {error}") from error


@lru_cache(CACHED_PLANS)
def _compiled(card: StageCard, sampling: Sampling, weighing: Weighing) -> Plan:
    assert card.scheduler is not None
    plan = compiled(card.scheduler, sampling, weighing)
    if card.kind == "x2":
        plan = replace(plan, steps=tuple(_told_sigma(step) for step in plan.steps))
    return plan


def _told_sigma(step: Step) -> Step:
    """The x2 latent upscaler is told 0.25·ln sigma, as in Karras et al. (arXiv:2206.00364, table 1)."""
    return replace(step, t=float(np.float32(0.25 * math.log(step.sigma))))
