"""When a ControlNet runs: its scale in each evaluation of a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stepforge.runtime.errors import RequestError
from stepforge.runtime.plan.step import Step

if TYPE_CHECKING:
    from stepforge.runtime.request import Control


def scales(control: Control, steps: Sequence[Step]) -> tuple[float, ...]:
    """The scale in each evaluation; 0.0: not run. Raises RequestError if a list has another length."""
    count = len(steps)
    given = control.scale if isinstance(control.scale, tuple) else (control.scale,) * count
    if len(given) != count:
        raise RequestError(f"ControlNet {control.name!r} has {len(given)} scales for {count} network evaluations")
    low, high = control.sigma or (-math.inf, math.inf)
    return tuple(
        float(scale)
        if i / count >= control.start and (i + 1) / count <= control.end and low < step.sigma <= high
        else 0.0
        for i, (scale, step) in enumerate(zip(given, steps, strict=True))
    )
