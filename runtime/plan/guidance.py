"""Guidance weights: one w for each network evaluation, in  uncond + w·(cond − uncond).

1.0 runs the conditional row only, 0.0 the unconditional row only, anything else both. A request gives a number, one
number a network evaluation, or a text of the grammar in docs/guidance.md. `parse` checks it without a plan; `weights`
resolves it against the rows of one. Both evaluations of a two-evaluation step get the same weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Real

from stepforge.runtime.errors import RequestError
from stepforge.runtime.grammar import FLOAT, NAMED, NUMBER, Call, number, read_call, shown
from stepforge.runtime.plan import Step

Guidance = float | str | Sequence[float]
GRAMMAR = (
    "a number such as 7.5, one a network evaluation such as [7.5, 7.5, 1], interval(7.5, sigma=0.28..5.42), "
    "interval(7.5, steps=0.1..0.7), linear(1..12), linear(7.5), cosine(7.5), pcs(7.5, s=4), clamp(linear(7.5), 2), "
    "7.5@0-0.6,1@0.6-1, or one of these for each network: unet=7.5; refiner=5"
)
MAX_WEIGHT = 100.0

_RANGE = re.compile(rf"({FLOAT})\s*\.\.\s*({FLOAT}|inf)")
_PIECE = re.compile(rf"({FLOAT})\s*@\s*({FLOAT})\s*-\s*({FLOAT})")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a network evaluation stands: sigma, step and network are those of its step's first evaluation."""

    sigma: float
    step: int  # of the sampler, from 0
    steps: int
    denoiser: str

    @property
    def tau(self) -> float:
        """Progress over the sampler's steps, from 0 (noisiest) to 1 (cleanest); a single step stands in the middle."""
        return self.step / (self.steps - 1) if self.steps > 1 else 0.5


@dataclass(frozen=True, slots=True)
class Listed:
    """One weight a network evaluation."""

    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Interval:
    """w where low < sigma <= high, else 1; Kynkäänniemi et al., arXiv:2404.07724."""

    w: float
    low: float
    high: float

    def at(self, place: Place) -> float:
        return self.w if self.low < place.sigma <= self.high else 1.0


@dataclass(frozen=True, slots=True)
class Pieces:
    """Weights by fraction of the sampler's steps, as (w, start, end); step k of N is inside where
    int(start·N) <= k < int(end·N), as diffusers' guiders count (guiders/classifier_free_guidance.py)."""

    parts: tuple[tuple[float, float, float], ...]

    def at(self, place: Place) -> float:
        n = place.steps
        return next(w for w, start, end in self.parts if int(start * n) <= place.step < int(end * n))


@dataclass(frozen=True, slots=True)
class Ramp:
    """max(floor, first + (last − first)·f(tau)), where f is tau, or (1 − cos(π·tau^power))/2.

    Wang et al., arXiv:2404.13040: linear is 2·w·tau, cosine w·(1 − cos(π·tau)), both of mean w; pcs is
    w·(1 − cos(π·tau^s))/2, which ends at w; clamp is max(c, ·).
    """

    first: float
    last: float
    cosine: bool = False
    power: float = 1.0
    floor: float = -math.inf

    def at(self, place: Place) -> float:
        shape = (1 - math.cos(math.pi * place.tau**self.power)) / 2 if self.cosine else place.tau
        return max(self.floor, self.first + (self.last - self.first) * shape)


Curve = float | Listed | Interval | Pieces | Ramp


@dataclass(frozen=True, slots=True)
class Experts:
    """A curve for each network. Progress and fractions are those of the whole plan."""

    curves: tuple[tuple[str, Curve], ...]


def parse(guidance: Guidance) -> float | tuple[float, ...] | str:
    """What a request keeps: a number, a tuple, or else its text as it was written. Raises RequestError."""
    read = _read(guidance)
    if isinstance(read, float):
        return read
    return read.values if isinstance(read, Listed) else str(guidance)


def weights(guidance: Guidance, steps: Sequence[Step]) -> tuple[float, ...]:
    """The weight of each network evaluation of a plan.

    Raises RequestError for a list of another length, one that changes within a step, a network of the plan without a
    weight, and rows that do not number the sampler's steps. Networks that the plan does not run may have a weight.
    """
    read = _read(guidance)
    if isinstance(read, float):
        return (read,) * len(steps)
    places = _places(steps)
    if not isinstance(read, Experts):
        return tuple(_resolve(read, places, "guidance", "the plan"))
    found, curves = [0.0] * len(steps), dict(read.curves)
    for name in dict.fromkeys(place.denoiser for place in places):
        if name not in curves:
            raise RequestError(f"guidance has no weight for {name}, which the plan runs; it names {', '.join(curves)}")
        rows = [k for k, place in enumerate(places) if place.denoiser == name]
        values = _resolve(curves[name], [places[k] for k in rows], f"guidance of {name}", "it")
        for k, w in zip(rows, values, strict=True):
            found[k] = w
    return tuple(found)


def _places(steps: Sequence[Step]) -> list[Place]:
    first: dict[int, Step] = {}
    for step in steps:
        first.setdefault(step.index, step)
    numbers = [step.index for step in steps]
    if any(after - before not in (0, 1) for before, after in pairwise(numbers)) or len(numbers) > 2 * len(first):
        raise RequestError("only a constant guidance fits rows whose index does not number the sampler's steps")
    return [Place(first[i].sigma, i - numbers[0], len(first), first[i].denoiser) for i in numbers]


def _resolve(curve: Curve, places: Sequence[Place], what: str, whose: str) -> list[float]:
    if isinstance(curve, float):
        return [curve] * len(places)
    if not isinstance(curve, Listed):
        return [curve.at(place) for place in places]
    if len(curve.values) != len(places):
        raise RequestError(f"{what} has {len(curve.values)} weights, but {whose} has {len(places)} network evaluations")
    for (before, w), (after, other) in pairwise(zip(places, curve.values, strict=True)):
        if before.step == after.step and w != other:
            raise RequestError(
                f"{what} gives the two network evaluations of step {after.step} the weights {w} and {other}"
            )
    return list(curve.values)


def _read(guidance: object) -> Curve | Experts:
    if isinstance(guidance, str):
        try:
            return _experts(guidance)
        except ValueError as error:
            raise RequestError(f"guidance {shown(guidance)} is not understood: {error}; give {GRAMMAR}") from None
    if isinstance(guidance, Real) and not isinstance(guidance, bool):
        return _weight(guidance)
    if isinstance(guidance, Sequence) and not isinstance(guidance, bytes) and guidance:
        return Listed(tuple(_weight(value) for value in guidance))
    raise RequestError(f"guidance {shown(guidance)} is not understood; give {GRAMMAR}")


def _experts(text: str) -> Curve | Experts:
    parts = [part.strip() for part in text.split(";")]
    named = [NAMED.fullmatch(part) for part in parts]
    if len(parts) == 1 and named[0] is None:
        return _curve(text)
    curves: dict[str, Curve] = {}
    for part, match in zip(parts, named, strict=True):
        if match is None:
            raise ValueError(f"{shown(part)} names no network")
        name, value = match.groups()
        if name in curves:
            raise ValueError(f"{name} is named twice")
        curves[name] = _curve(value)
    return Experts(tuple(curves.items()))


def _curve(text: str) -> Curve:
    text = text.strip()
    if NUMBER.fullmatch(text):
        return _weight(float(text))
    call = read_call(text)
    if call is not None:
        if call.name not in CURVES:
            raise ValueError(f"{call.name} is unknown")
        return CURVES[call.name](call)
    if "@" in text:
        return _pieces(text)
    if text[:1] + text[-1:] in ("[]", "()"):
        text = text[1:-1]
    return Listed(tuple(_weight(number(part)) for part in text.split(",")))


def _pieces(text: str) -> Pieces:
    matches = [_PIECE.fullmatch(part.strip()) for part in text.split(",")]
    parts = []
    for match in matches:
        if match is None:
            raise ValueError("a weight by fraction of the steps is written 7.5@0-0.6")
        w, start, end = map(float, match.groups())
        parts.append((_weight(w), start, end))
    bounds = [0.0, *(end for _, _, end in parts)]
    if [start for _, start, _ in parts] != bounds[:-1] or bounds[-1] != 1.0:
        raise ValueError("fractions must cover 0-1 in order, without gap or overlap")
    if any(start >= end for start, end in pairwise(bounds)):
        raise ValueError("a range of fractions must end above its start")
    return Pieces(tuple(parts))


def _interval(call: Call) -> Curve:
    given = call.bind(("w",), ("sigma", "steps"))
    if ("sigma" in given) == ("steps" in given):
        raise ValueError("interval takes either sigma=0.28..5.42 or steps=0.1..0.7")
    w = _weight(number(given["w"]))
    if "sigma" in given:
        low, high = _range(given["sigma"])
        if not 0 <= low < high:
            raise ValueError(f"sigma must rise from 0 or more, got {given['sigma']}")
        return Interval(w, low, high)
    start, end = _range(given["steps"])
    if not 0 <= start < end <= 1:
        raise ValueError(f"steps are fractions that rise within 0..1, got {given['steps']}")
    return Pieces(((1.0, 0.0, start), (w, start, end), (1.0, end, 1.0)))


def _linear(call: Call) -> Ramp:
    given = call.bind(("w",), ("base",))
    if ".." in given["w"]:
        if "base" in given:
            raise ValueError("base goes with one weight, not with a range")
        first, last = _range(given["w"])
        return Ramp(_weight(first), _weight(last))
    return _ramp(given, peak=2.0)


def _cosine(call: Call) -> Ramp:
    return replace(_ramp(call.bind(("w",), ("base",)), peak=2.0), cosine=True)


def _pcs(call: Call) -> Ramp:
    given = call.bind(("w",), ("s", "base"))
    power = number(given.get("s", "0"))
    if not 0 < power <= MAX_WEIGHT:
        raise ValueError("pcs needs s above 0, such as pcs(7.5, s=4)")
    return replace(_ramp(given, peak=1.0), cosine=True, power=power)


def _clamp(call: Call) -> Ramp:
    given = call.bind(("ramp", "floor"))
    ramp = _curve(given["ramp"])
    if not isinstance(ramp, Ramp):
        raise ValueError("clamp takes linear, cosine or pcs")
    return replace(ramp, floor=max(ramp.floor, _weight(number(given["floor"]))))


def _ramp(given: dict[str, str], peak: float) -> Ramp:
    """From base to base + peak·(w − base). base 0 ramps w; base 1 ramps w − 1, the weight of Ho & Salimans' form
    cond + w'·(cond − uncond), arXiv:2207.12598, eq. 6, in which Wang et al. write."""
    base = number(given.get("base", "0"))
    if base not in (0.0, 1.0):
        raise ValueError(f"base is 0 (the ramp is on w) or 1 (on w − 1), not {given['base']}")
    return Ramp(base, _weight(base + peak * (_weight(number(given["w"])) - base)))


CURVES: dict[str, Callable[[Call], Curve]] = {
    "interval": _interval,
    "linear": _linear,
    "cosine": _cosine,
    "pcs": _pcs,
    "clamp": _clamp,
}


def _range(text: str) -> tuple[float, float]:
    match = _RANGE.fullmatch(text)
    if match is None:
        raise ValueError(f"{shown(text)} is not a range such as 0.1..0.7")
    return float(match[1]), float(match[2])


def _weight(value: object) -> float:
    try:
        w = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        w = math.inf
    if not math.isfinite(w):
        raise RequestError(f"guidance weight {shown(value)} is not a finite number")
    if abs(w) > MAX_WEIGHT:
        raise RequestError(f"guidance weight {w:g} is beyond ±{MAX_WEIGHT:g}")
    return w
