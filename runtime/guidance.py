"""Guidance weights: one w for each step, in  uncond + w·(cond − uncond).

1.0 runs the conditional row only, 0.0 the unconditional row only, anything else both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from stepforge.runtime.errors import RequestError

Guidance = float | str | Sequence[float]
GRAMMAR = "a number such as 7.5, or one number a step such as [7.5, 7.5, 1, 1]"
MAX_WEIGHT = 100.0


def parse(guidance: Guidance) -> float | tuple[float, ...]:
    """A constant weight, or one weight a step. Raises RequestError with the grammar."""
    if isinstance(guidance, str):
        text = guidance.strip().strip("[]()")
        try:
            values = [float(part) for part in text.split(",")]
        except ValueError:
            raise RequestError(f"guidance {guidance!r} is not understood; give {GRAMMAR}") from None
        return parse(values if len(values) > 1 else values[0])
    if isinstance(guidance, (int, float)) and not isinstance(guidance, bool):
        return _weight(float(guidance))
    if isinstance(guidance, Sequence) and not isinstance(guidance, str) and guidance:
        return tuple(_weight(value) for value in guidance)
    raise RequestError(f"guidance {guidance!r} is not understood; give {GRAMMAR}")


def _weight(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RequestError(f"guidance weight {value!r} is not a finite number")
    if abs(value) > MAX_WEIGHT:
        raise RequestError(f"guidance weight {value} is beyond ±{MAX_WEIGHT:g}")
    return float(value)


def weights(guidance: Guidance, steps: int) -> tuple[float, ...]:
    """The weight of each of `steps` network evaluations. Raises RequestError if a list has another length."""
    parsed = parse(guidance)
    if isinstance(parsed, float):
        return (parsed,) * steps
    if len(parsed) != steps:
        raise RequestError(f"guidance has {len(parsed)} weights, but the plan has {steps} network evaluations")
    return parsed
