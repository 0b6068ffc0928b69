"""Plans that start from an image: the last steps of a schedule, as diffusers' image-to-image pipelines cut it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stepforge.runtime.errors import RequestError
from stepforge.runtime.plan.sampling.linear import NoisePath
from stepforge.runtime.plan.step import Step


@dataclass(frozen=True, slots=True)
class Strength:
    """How much of the schedule an image goes through.

    value: share of the steps, above 0 and up to 1. is_masked: a mask says which part is drawn anew; at strength 1 that one
    starts from noise alone, as in diffusers. blends: the rest is put back after each step.
    """

    value: float
    is_masked: bool = False
    blends: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the first latents are noise alone."""
        return self.is_masked and self.value == 1.0


def truncated(path: NoisePath, init: Strength, steps: int, evaluations: int, *, repeats: bool) -> NoisePath:
    """The path of the last `int(steps * strength)` steps; coefficients stay those of the whole schedule.

    repeats: PNDM, whose list of timesteps has its second entry twice. diffusers cuts the list there, and takes whatever
    its second entry is then for the repetition, so that a latent has the noise of the entry before its label from then on;
    this does the same. Raises RequestError if no step is left.
    """
    count = min(int(steps * init.value), steps)
    if count < 1:
        raise RequestError(f"strength {init.value:g} of {steps} steps leaves none; raise either")
    first = (steps - count) * evaluations
    at, moves = path.at[first:], list(path.moves[first:])
    if repeats and first:
        if first == 1:
            moves[0] = path.moves[2]
            moves[1] = path.moves[0]
        elif len(moves) > 1:
            moves[1] = moves[0]
    return replace(path, at=at, moves=tuple(moves), before=first, blended=init.blends)


def with_known(steps: Sequence[Step], path: NoisePath, *, skips_midpoints: bool) -> tuple[Step, ...]:
    """Steps with the noise level that the known part of an image has after each: the next one's; it is clean at the end.

    skips_midpoints: KDPM2, whose `add_noise` in diffusers knows no midpoints: at one the known part has the level behind it.
    """
    levels = [(level.alpha, level.sigma) for level in path.at[1:]]
    if skips_midpoints:
        levels[::2] = levels[1::2]
    return tuple(replace(step, known=level) for step, level in zip(steps, (*levels, (1.0, 0.0)), strict=True))
