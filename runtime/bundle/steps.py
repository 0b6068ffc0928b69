"""Compiled steps of a model's own sampler, for samplers without a formula in `plan/sampling/samplers.py`; written at export.

    scheduler/steps.json, or sr/<stage>/scheduler/steps.json
                              [{"steps": 20, "init_noise": 1.0, "rows": [[step, t, sigma, scale_in, noise,
                            [denoised, denoised], [keep, ...], [gain, ...]], ...]}, ...]

One entry for each step count that can be asked for, one row a network evaluation; numbers as in `plan.step.Step`, and sigma
null where there is no signal.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from stepforge.runtime.checks import shown
from stepforge.runtime.errors import BundleError, RequestError

STEPS_FILE = "scheduler/steps.json"
MOST_BYTES = 64 * 2**20
MOST_STEPS = 1000  # steps of an entry
MOST_EVALUATIONS = 4  # evaluations of a step, and of the first steps of Runge-Kutta
LONGEST_WINDOW = 16  # latents or predictions


class Row(NamedTuple):
    """One network evaluation, as `plan.step.Step` explains it."""

    step: int  # Step.index
    t: float
    sigma: float
    scale_in: float
    noise: float
    denoised: tuple[float, float]
    keep: tuple[float, ...]
    gain: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class StepTable:
    """Step count -> (factor of the first noise, rows). Tables of one digest are equal."""

    digest: str  # sha256 of the file
    counts: Mapping[int, tuple[float, tuple[Row, ...]]] = field(compare=False, repr=False)

    def rows(self, name: str, steps: int) -> tuple[float, tuple[Row, ...]]:
        """Raises RequestError for a count that was not compiled. name: of the sampler."""
        if steps not in self.counts:
            nearest = min(self.counts, key=lambda count: (abs(count - steps), count))
            raise RequestError(
                f"{name} was compiled for {spans(sorted(self.counts))} steps, not for {steps}; the nearest is {nearest}"
            )
        return self.counts[steps]

    @classmethod
    def of(cls, counts: Mapping[int, tuple[float, tuple[Row, ...]]]) -> StepTable:
        return cls(hashlib.sha256(written(counts)).hexdigest(), counts)

    @classmethod
    def parse(cls, data: bytes) -> StepTable:
        """What `written` wrote. Raises BundleError for anything else."""
        try:
            if len(data) > MOST_BYTES:
                raise ValueError(f"{len(data)} bytes; at most {MOST_BYTES} are allowed")
            entries = json.loads(data)
            if not isinstance(entries, list) or not entries:
                raise ValueError("it is not a list of entries")
            counts: dict[int, tuple[float, tuple[Row, ...]]] = {}
            for entry in entries:
                steps, init_noise, rows = entry["steps"], entry["init_noise"], entry["rows"]
                if type(steps) is not int or not 1 <= steps <= MOST_STEPS or steps in counts:
                    raise ValueError(f"a step count is {shown(steps)}, or is given twice")
                counts[steps] = _number(init_noise), tuple(_rows(steps, rows))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise BundleError(f"{STEPS_FILE} is damaged: {error}") from None
        return cls(hashlib.sha256(data).hexdigest(), counts)


def steps_file(stage: str = "") -> str:
    """Place of the compiled steps of the base model, or of a stage."""
    return f"sr/{stage}/{STEPS_FILE}" if stage else STEPS_FILE


def written(counts: Mapping[int, tuple[float, tuple[Row, ...]]]) -> bytes:
    """The file's bytes. All numbers but a sigma of infinity are finite."""
    entries = [
        {
            "steps": steps,
            "init_noise": init_noise,
            "rows": [row._replace(sigma=row.sigma if math.isfinite(row.sigma) else None) for row in rows],  # type: ignore[arg-type]
        }
        for steps, (init_noise, rows) in counts.items()
    ]
    return json.dumps(entries, separators=(",", ":"), allow_nan=False).encode()


def spans(counts: list[int]) -> str:
    """Rising whole numbers as text: "1 to 50, 60"."""
    starts = [counts[0], *(b for a, b in pairwise(counts) if b != a + 1)]
    ends = [*(a for a, b in pairwise(counts) if b != a + 1), counts[-1]]
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))


def _rows(steps: int, rows: Any) -> Iterator[Row]:
    if not isinstance(rows, list) or not 1 <= len(rows) <= MOST_EVALUATIONS * (steps + 3):
        raise ValueError(f"the entry of {steps} steps has no rows, or too many")
    last = 0
    for k, row in enumerate(rows):
        index, t, sigma, scale_in, noise, denoised, keep, gain = row
        if type(index) is not int or not last <= index <= min(last + 1, k):
            raise ValueError(f"index {shown(index)} of row {k} does not follow {last}")
        last = index
        longest = min(k + 1, LONGEST_WINDOW)
        yield Row(
            index,
            _number(t),
            math.inf if sigma is None else _number(sigma),
            _number(scale_in),
            _number(noise),
            _numbers(denoised, 2, 2),  # type: ignore[arg-type]
            _numbers(keep, 1, longest),
            _numbers(gain, 1, longest),
        )


def _numbers(values: Any, least: int, most: int) -> tuple[float, ...]:
    if not isinstance(values, list) or not least <= len(values) <= most:
        raise ValueError(f"{shown(values)} is not a list of {least} to {most} numbers")
    return tuple(map(_number, values))


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{shown(value)} is not a finite number")
    return float(value)
