"""Guidance weights: one w for each network evaluation, in  uncond + w·(cond − uncond).

1.0 runs the conditional row only, 0.0 the unconditional row only, anything else both. A request gives a number, one
number a network evaluation, or a text of the grammar in docs/guidance.md. `parse_guidance` makes a value of it, `weights`
resolves the value against the steps of a plan. Both evaluations of a two-evaluation step get the same weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real

from stepforge.runtime.checks import clipped, listed, real, shown
from stepforge.runtime.errors import RequestError
from stepforge.runtime.grammar import FLOAT, NAMED, NUMBER, Call, number, plain, read_call, text_of
from stepforge.runtime.plan.step import Step

GRAMMAR = (
    "a number such as 7.5, one a network evaluation such as [7.5, 7.5, 1], interval(7.5, sigma=0.28..5.42), "
    "interval(7.5, steps=0.1..0.7), linear(1..12), linear(7.5), cosine(7.5), pcs(7.5, s=4), clamp(linear(7.5), 2), "
    "7.5@0-0.6,1@0.6-1, or one of these for each network: unet=7.5; refiner=5"
)
MAX_WEIGHT = 100.0
MAX_WEIGHTS = 2000  # two network evaluations for each of 1000 steps

_RANGE = re.compile(rf"({FLOAT})\s*\.\.\s*({FLOAT}|inf)")
_PIECE = re.compile(rf"({FLOAT})\s*@\s*({FLOAT})\s*-\s*({FLOAT})")


@dataclass(frozen=True, slots=True)
class Position:
    """A network evaluation within its plan: sigma, step and network are those of its step's first evaluation."""

    sigma: float
    step: int  # sampler's step, from 0
    steps: int
    denoiser: str

    @property
    def tau(self) -> float:
        """Progress over the sampler's steps, from 0 (noisiest) to 1 (cleanest); a single step stands in the middle."""
        return self.step / (self.steps - 1) if self.steps > 1 else 0.5


@dataclass(frozen=True, slots=True)
class SigmaInterval:
    """w where low < sigma <= high, else 1; Kynkäänniemi et al., arXiv:2404.07724."""

    w: float
    low: float
    high: float

    def at(self, position: Position) -> float:
        return self.w if self.low < position.sigma <= self.high else 1.0

    def __str__(self) -> str:
        return f"interval({plain(self.w)}, sigma={plain(self.low)}..{plain(self.high)})"


@dataclass(frozen=True, slots=True)
class StepInterval:
    """w in the sampler's steps int(start·N) <= k < int(end·N), else 1, as diffusers' guiders count
    (guiders/classifier_free_guidance.py)."""

    w: float
    start: float
    end: float

    def at(self, position: Position) -> float:
        n = position.steps
        return self.w if int(self.start * n) <= position.step < int(self.end * n) else 1.0

    def __str__(self) -> str:
        return f"interval({plain(self.w)}, steps={plain(self.start)}..{plain(self.end)})"


@dataclass(frozen=True, slots=True)
class Pieces:
    """Weights by fraction of the sampler's steps, as (w, start, end), counted as in `StepInterval`."""

    parts: tuple[tuple[float, float, float], ...]

    def at(self, position: Position) -> float:
        n = position.steps
        return next(w for w, start, end in self.parts if int(start * n) <= position.step < int(end * n))

    def __str__(self) -> str:
        return ",".join(f"{plain(w)}@{plain(start)}-{plain(end)}" for w, start, end in self.parts)


@dataclass(frozen=True, slots=True)
class Line:
    """first + (last − first)·tau."""

    first: float
    last: float

    def at(self, position: Position) -> float:
        return self.first + (self.last - self.first) * position.tau

    def __str__(self) -> str:
        return f"linear({plain(self.first)}..{plain(self.last)})"


@dataclass(frozen=True, slots=True)
class Ramp:
    """Wang et al., arXiv:2404.13040: linear is 2·w·tau, cosine w·(1 − cos(π·tau)), both of mean w; pcs is
    w·(1 − cos(π·tau^power))/2, which ends at w.

    base 0 ramps w; base 1 ramps w − 1, the weight of Ho & Salimans' form cond + w'·(cond − uncond), arXiv:2207.12598,
    eq. 6, in which Wang et al. write.
    """

    shape: str  # "linear", "cosine" or "pcs"
    w: float
    base: float = 0.0
    power: float = 1.0  # exponent of pcs

    @property
    def last(self) -> float:
        return self.base + (1.0 if self.shape == "pcs" else 2.0) * (self.w - self.base)

    def at(self, position: Position) -> float:
        tau = position.tau
        rise = tau if self.shape == "linear" else (1 - math.cos(math.pi * tau**self.power)) / 2
        return self.base + (self.last - self.base) * rise

    def __str__(self) -> str:
        power = f", s={plain(self.power)}" if self.shape == "pcs" else ""
        return f"{self.shape}({plain(self.w)}{power}{f', base={plain(self.base)}' if self.base else ''})"


@dataclass(frozen=True, slots=True)
class Clamp:
    """max(floor, ramp); Wang et al., arXiv:2404.13040."""

    ramp: Line | Ramp
    floor: float

    def at(self, position: Position) -> float:
        return max(self.floor, self.ramp.at(position))

    def __str__(self) -> str:
        return f"clamp({self.ramp}, {plain(self.floor)})"


Shape = SigmaInterval | StepInterval | Pieces | Line | Ramp | Clamp
Curve = float | tuple[float, ...] | Shape  # constant, one weight an evaluation, or a function of the position


@dataclass(frozen=True, slots=True)
class Experts:
    """A curve for each network. Progress and fractions are those of the whole plan."""

    curves: tuple[tuple[str, Curve], ...]

    def __str__(self) -> str:
        return "; ".join(f"{name}={_printed(curve)}" for name, curve in self.curves)


Guidance = Curve | Experts


def parse_guidance(given: object) -> Guidance:
    """A number, one number an evaluation, or a text of the grammar as a value whose `str` is canonical text.

    Raises RequestError with the grammar.
    """
    if isinstance(given, Shape | Experts):
        return given
    if isinstance(given, str):
        try:
            return _experts(text_of(given))
        except ValueError as error:
            raise RequestError(f"guidance {shown(given)} is not understood: {clipped(error)}; give {GRAMMAR}") from None
    if isinstance(given, Real) and not isinstance(given, bool):
        return _weight(given)
    try:
        values = listed("guidance", given, MAX_WEIGHTS)
    except RequestError:
        raise RequestError(f"guidance {shown(given)} is not understood; give {GRAMMAR}") from None
    return tuple(_weight(value) for value in values)


def weights(guidance: Guidance, steps: Sequence[Step]) -> tuple[float, ...]:
    """The weight of each network evaluation of a plan.

    Raises RequestError for a list of another length, one that changes within a step, a network of the plan without a
    weight, and indices that do not number the sampler's steps. Networks that the plan does not run may have a weight.
    """
    if isinstance(guidance, float):
        return (guidance,) * len(steps)
    positions = _positions(steps)
    if not isinstance(guidance, Experts):
        return tuple(_resolve(guidance, positions, "guidance", "the plan"))
    found, curves = [0.0] * len(steps), dict(guidance.curves)
    for name in dict.fromkeys(position.denoiser for position in positions):
        if name not in curves:
            raise RequestError(
                f"guidance has no weight for {name}, which the plan runs; it names {clipped(', '.join(curves))}"
            )
        own = [k for k, position in enumerate(positions) if position.denoiser == name]
        values = _resolve(curves[name], [positions[k] for k in own], f"guidance of {name}", "it")
        for k, w in zip(own, values, strict=True):
            found[k] = w
    return tuple(found)


def _positions(steps: Sequence[Step]) -> list[Position]:
    first: dict[int, Step] = {}
    for step in steps:
        first.setdefault(step.index, step)
    numbers = [step.index for step in steps]
    if any(after - before not in (0, 1) for before, after in pairwise(numbers)) or len(numbers) > 2 * len(first):
        raise RequestError("only a constant guidance fits steps whose index does not number the sampler's steps")
    return [Position(first[i].sigma, i - numbers[0], len(first), first[i].denoiser) for i in numbers]


def _resolve(curve: Curve, positions: Sequence[Position], what: str, whose: str) -> list[float]:
    if isinstance(curve, float):
        return [curve] * len(positions)
    if not isinstance(curve, tuple):
        return [curve.at(position) for position in positions]
    if len(curve) != len(positions):
        raise RequestError(f"{what} has {len(curve)} weights, but {whose} has {len(positions)} network evaluations")
    for (before, w), (after, other) in pairwise(zip(positions, curve, strict=True)):
        if before.step == after.step and w != other:
            raise RequestError(
                f"{what} gives the two network evaluations of step {after.step} the weights {w} and {other}"
            )
    return list(curve)


def _printed(curve: Curve) -> str:
    if isinstance(curve, tuple):
        return f"[{', '.join(map(plain, curve))}]"
    return plain(curve) if isinstance(curve, float) else str(curve)


def _experts(text: str) -> Guidance:
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
    values = text.split(",")
    if len(values) > MAX_WEIGHTS:
        raise ValueError(f"it has {len(values)} weights, more than {MAX_WEIGHTS}")
    return tuple(_weight(number(part)) for part in values)


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
            raise ValueError(f"sigma must rise from 0 or more, got {shown(given['sigma'])}")
        return SigmaInterval(w, low, high)
    start, end = _range(given["steps"])
    if not 0 <= start < end <= 1:
        raise ValueError(f"steps are fractions that rise within 0..1, got {shown(given['steps'])}")
    return StepInterval(w, start, end)


def _linear(call: Call) -> Line | Ramp:
    given = call.bind(("w",), ("base",))
    if ".." not in given["w"]:
        return _ramp("linear", given)
    if "base" in given:
        raise ValueError("base goes with one weight, not with a range")
    first, last = _range(given["w"])
    return Line(_weight(first), _weight(last))


def _cosine(call: Call) -> Ramp:
    return _ramp("cosine", call.bind(("w",), ("base",)))


def _pcs(call: Call) -> Ramp:
    given = call.bind(("w",), ("s", "base"))
    power = number(given.get("s", "0"))
    if not 0 < power <= MAX_WEIGHT:
        raise ValueError("pcs needs s above 0, such as pcs(7.5, s=4)")
    return _ramp("pcs", given, power)


def _ramp(shape: str, given: dict[str, str], power: float = 1.0) -> Ramp:
    base = number(given.get("base", "0"))
    if base not in (0.0, 1.0):
        raise ValueError(f"base is 0 (the ramp is on w) or 1 (on w − 1), not {plain(base)}")
    ramp = Ramp(shape, _weight(number(given["w"])), base, power)
    _weight(ramp.last)
    return ramp


RAMPS: dict[str, Callable[[Call], Line | Ramp]] = {"linear": _linear, "cosine": _cosine, "pcs": _pcs}


def _clamp(call: Call) -> Clamp:
    given = call.bind(("ramp", "floor"))
    inner = read_call(given["ramp"])
    if inner is None or inner.name not in RAMPS:
        raise ValueError("clamp takes linear, cosine or pcs")
    return Clamp(RAMPS[inner.name](inner), _weight(number(given["floor"])))


CURVES: dict[str, Callable[[Call], Curve]] = {"interval": _interval, **RAMPS, "clamp": _clamp}


def _range(text: str) -> tuple[float, float]:
    match = _RANGE.fullmatch(text)
    if match is None:
        raise ValueError(f"{shown(text)} is not a range such as 0.1..0.7")
    return float(match[1]), float(match[2])


def _weight(value: object) -> float:
    w = real(value)
    if w is None or math.isinf(w):
        raise RequestError(f"guidance weight {shown(value)} is not a finite number")
    if abs(w) > MAX_WEIGHT:
        raise RequestError(f"guidance weight {w:g} is beyond ±{MAX_WEIGHT:g}")
    return w
