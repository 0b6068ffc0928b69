"""Which denoiser a step runs: windows of experts, in fractions of the training timesteps or in sigma."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from stepforge.runtime.bundle import UNET, ExpertCard
from stepforge.runtime.checks import clipped, shown
from stepforge.runtime.errors import RequestError
from stepforge.runtime.grammar import FLOAT, plain, text_of
from stepforge.runtime.plan.sampling.linear import NoisePath
from stepforge.runtime.plan.step import Step

GRAMMAR = (
    '"base@0..0.8,refiner@0.8..1" in fractions of the training timesteps, "high@sigma=5..inf" in sigma, or the name of '
    "one denoiser; base is the model's own, which also runs where no window names another"
)
BASE = UNET.name
MOST = 32  # windows

_WINDOW = re.compile(rf"([A-Za-z0-9][A-Za-z0-9_-]{{0,127}})\s*@\s*(sigma\s*=\s*)?({FLOAT})\s*\.\.\s*({FLOAT}|inf)")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")


@dataclass(frozen=True, slots=True)
class Share:
    """Where one denoiser runs: from start to end of the training timesteps, noisiest first, or where low < sigma <= high."""

    denoiser: str
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Switch:
    """The denoisers of a plan; a value whose `str` is canonical text.

    Shares in fractions of the training timesteps hand over as diffusers' pipelines do by denoising_end and denoising_start:
    each denoiser starts afresh, without the predictions of the one before. Shares in sigma are experts of one trajectory: a
    multistep sampler reads what other experts predicted, and both evaluations of a step run the expert of its first sigma.
    """

    shares: tuple[Share, ...]
    in_sigma: bool = False

    @classmethod
    def parse(cls, given: Switch | str) -> Switch:
        """Raises RequestError with the grammar."""
        if isinstance(given, Switch):
            return given
        if not isinstance(given, str):
            raise RequestError(f"experts is {shown(given)}; give {GRAMMAR}")
        try:
            return cls._parse(text_of(given))
        except ValueError as error:
            raise RequestError(f"experts {shown(given)} is not understood: {clipped(error)}; give {GRAMMAR}") from None

    @classmethod
    def _parse(cls, text: str) -> Switch:
        if _NAME.fullmatch(text):
            return cls.of([Share(_named(text), 0.0, 1.0)], in_sigma=False)
        parts = [part.strip() for part in text.split(",")]
        if len(parts) > MOST:
            raise ValueError(f"it has {len(parts)} windows; at most {MOST} are allowed")
        found = [_WINDOW.fullmatch(part) for part in parts]
        shares = []
        for part, match in zip(parts, found, strict=True):
            if match is None:
                raise ValueError(f"{shown(part)} is no window")
            shares.append(Share(_named(match[1]), float(match[3]), float(match[4])))
        units = {bool(match[2]) for match in found if match}
        if len(units) > 1:
            raise ValueError("windows are all in fractions or all in sigma")
        return cls.of(shares, in_sigma=units.pop())

    @classmethod
    def of(cls, shares: Sequence[Share], *, in_sigma: bool) -> Switch:
        """Shares in order, gaps filled by the base. Raises ValueError for windows that overlap or are empty."""
        shares = sorted(shares, key=lambda share: share.low)
        for share in shares:
            if not 0 <= share.low < share.high or (not in_sigma and share.high > 1):
                most = "sigma" if in_sigma else "1"
                raise ValueError(f"{_shown(share, in_sigma)} is no window from 0 up to {most}")
        for before, after in pairwise(shares):
            if after.low < before.high:
                raise ValueError(f"{_shown(before, in_sigma)} and {_shown(after, in_sigma)} overlap")
        return cls(tuple(_filled(shares, math.inf if in_sigma else 1.0)), in_sigma)

    @property
    def denoisers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(share.denoiser for share in self.shares))

    @property
    def hands_over(self) -> bool:
        """Whether one denoiser starts afresh where another has ended."""
        return not self.in_sigma and len(self.shares) > 1

    def __str__(self) -> str:
        if len(self.shares) == 1:
            return self.shares[0].denoiser
        return ",".join(_shown(share, self.in_sigma) for share in self.shares)

    def chosen(self, steps: Sequence[Step]) -> tuple[Step, ...]:
        """Steps of one trajectory with the denoiser of each."""
        named = []
        for _, evaluations in groupby(steps, key=lambda step: step.index):
            first, *others = evaluations
            name = next((s.denoiser for s in self.shares if s.low < first.sigma <= s.high), BASE)
            name = name if self.in_sigma else self.shares[0].denoiser
            named += [replace(step, denoiser=name) for step in (first, *others)]
        return tuple(named)

    def parts(self, path: NoisePath, train: int, evaluations: int) -> list[tuple[str, NoisePath, int]]:
        """Denoiser, the path that it starts on and how many evaluations of it it runs, as diffusers' pipelines cut the list of
        timesteps.

        path: of the whole schedule. train: training timesteps. Raises RequestError for a denoiser that no step is left for.
        """
        found = []
        for share in self.shares:
            first, count = 0, len(path.at)
            if share.low > 0:
                left = sum(level.t < _cut(share.low, train) for level in path.at)
                left += evaluations == 2 and left % 2 == 0  # never between the two evaluations of a step
                first, count = len(path.at) - left, left
            own = replace(path, at=path.at[first:], moves=path.moves[first:], before=path.before + first)
            if share.high < 1:
                count = sum(level.t >= _cut(share.high, train) for level in own.at)
            if count < 1:
                raise RequestError(
                    f"experts: no timestep of the {len(path.at)} lies in {_shown(share, False)}; raise the steps, or widen it"
                )
            found.append((share.denoiser, own, count))
        return found


def default_switch(experts: Mapping[str, ExpertCard]) -> Switch | None:
    """What a bundle runs where a request names no experts; None: one denoiser."""
    if not experts:
        return None
    shares = [Share(name, card.start, math.inf if card.end is None else card.end) for name, card in experts.items()]
    return Switch.of(shares, in_sigma=next(iter(experts.values())).unit == "sigma")


def _cut(fraction: float, train: int) -> int:
    """First training timestep behind a fraction of them; diffusers' pipelines round so."""
    return round(train - fraction * train)


def _filled(shares: Sequence[Share], end: float) -> Iterator[Share]:
    at = 0.0
    for share in shares:
        if share.low > at:
            yield Share(BASE, at, share.low)
        yield share
        at = share.high
    if at < end:
        yield Share(BASE, at, end)


def _named(name: str) -> str:
    return BASE if name == "base" else name


def _shown(share: Share, in_sigma: bool) -> str:
    high = "inf" if math.isinf(share.high) else plain(share.high)
    return f"{share.denoiser}@{'sigma=' if in_sigma else ''}{plain(share.low)}..{high}"
