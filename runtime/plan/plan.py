"""The plan of a request: its steps, and everything else that is decided before the loop."""

from __future__ import annotations

from dataclasses import dataclass

from stepforge.runtime.plan.guiders import Guider
from stepforge.runtime.plan.step import Step, rows_of


@dataclass(frozen=True, slots=True)
class Plan:
    """All steps of a request. Equal requests share one plan object."""

    steps: tuple[Step, ...]
    init_noise: float  # x_0 = start·y + init_noise·z, y the latents of a given image
    guider: Guider = Guider()  # noqa: RUF009, a frozen value
    start: float = 0.0

    @property
    def rows(self) -> int:
        """Denoiser rows of the whole plan: 2 for a guided step, else 1."""
        return sum(rows_of(step.guidance) for step in self.steps)
