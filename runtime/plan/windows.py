"""When a ControlNet runs: its scale in each evaluation of a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stepforge.runtime.errors import RequestError
from stepforge.runtime.plan.step import Step


@dataclass(frozen=True, slots=True)
class Window:
    """What of a `Control` decides its scales."""

    name: str
    scale: float | tuple[float, ...]
    start: float
    end: float
    sigma: tuple[float, float] | None

    def scales(self, steps: Sequence[Step]) -> tuple[float, ...]:
        """The scale in each evaluation; 0.0: not run. Raises RequestError if a list has another length."""
        count = len(steps)
        given = self.scale if isinstance(self.scale, tuple) else (self.scale,) * count
        if len(given) != count:
            raise RequestError(f"ControlNet {self.name!r} has {len(given)} scales for {count} network evaluations")
        low, high = self.sigma or (-math.inf, math.inf)
        return tuple(
            scale if i / count >= self.start and (i + 1) / count <= self.end and low < step.sigma <= high else 0.0
            for i, (scale, step) in enumerate(zip(given, steps, strict=True))
        )
