"""Find plans that run fewer rows and draw nearly the same pictures: what `stepforge tune` does.

A candidate's cost is its rows, each weighed by what a row of its network takes on this machine (`price`), in rows of the whole
denoiser; its distance is that between its pictures and those of the full plan, from the same prompts and seeds (`distance`).

Search: every rung of every part alone on a few prompts; then combinations, cheapest first among those whose parts' distances
add up to no more than is allowed, on all prompts. The sum is only a guess, and each measurement corrects it (`Guess`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import cycle, pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stepforge.runtime.engine import Engine
from stepforge.runtime.errors import GenerationError, RequestError
from stepforge.runtime.plan.compile import compile_plan
from stepforge.runtime.request import Request
from stepforge.runtime.tune.candidate import FULL, Candidate, candidates, rungs
from stepforge.runtime.tune.distance import distance
from stepforge.runtime.tune.price import prices, row_counts

# which multiple of the limit a round of the search aims at: the frontier has neighbours too
TARGETS = (1.0, 1.0, 0.5, 2.0)
LEAST = 4  # combinations that a budget must reach for
TRUST = 0.3  # how much one measurement outweighs the guess that distances add up


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate that was measured on all prompts."""

    candidate: Candidate
    rows: int  # denoiser rows per image
    cost: float  # per image, in rows of the whole denoiser
    distance: float  # mean over the images
    worst: float


@dataclass(frozen=True, slots=True)
class Tuning:
    """What `tune` found."""

    full: Trial
    trials: tuple[Trial, ...]  # without the full plan
    prices: Mapping[str, float]  # label of Stats.rows -> what a row costs, the whole denoiser's being 1
    unlike: float | None  # mean distance between the full plan's pictures of different prompts, for comparison
    images: int  # drawn
    limit: float

    @property
    def frontier(self) -> tuple[Trial, ...]:
        """Trials that no other one beats in both cost and distance, dearest first."""
        found: list[Trial] = []
        for trial in sorted((self.full, *self.trials), key=lambda t: (t.cost, t.distance)):
            if not found or trial.distance < found[-1].distance:
                found.append(trial)
        return tuple(reversed(found))

    @property
    def chosen(self) -> Trial | None:
        """The cheapest trial within the limit; None if only the full plan is."""
        fitting = [t for t in self.trials if t.distance <= self.limit and t.cost < self.full.cost]
        return min(fitting, key=lambda t: (t.cost, t.distance), default=None)


class Guess:
    """Distance of a combination from those of its parts: Σ weight·(distance of the part alone).

    Weights start at 1 and follow the measurements by ridge regression; parts that got in each other's way, or that the
    few prompts of the first measurement misjudged, are so corrected.
    """

    def __init__(self, alone: Mapping[tuple[str, object], float]) -> None:
        self._alone = alone
        self._names = [field.name for field in fields(Candidate)]
        self._weights = np.ones(len(self._names))
        self._seen: list[tuple[NDArray[np.float64], float]] = []

    def _parts(self, candidate: Candidate) -> NDArray[np.float64]:
        return np.array([self._alone.get((name, getattr(candidate, name)), 0.0) for name in self._names])

    def __call__(self, candidate: Candidate) -> float:
        return float(self._parts(candidate) @ self._weights)

    def learn(self, candidate: Candidate, measured: float) -> None:
        self._seen.append((self._parts(candidate), measured))
        rows = np.array([parts for parts, _ in self._seen])
        scale = TRUST * float(np.sqrt((rows**2).sum(1).mean())) or 1.0
        matrix = np.concatenate([rows, scale * np.eye(len(self._names))])
        target = np.concatenate([[value for _, value in self._seen], np.full(len(self._names), scale)])
        self._weights = np.maximum(np.linalg.lstsq(matrix, target, rcond=None)[0], 0.1)


class Comparison:
    """The prompts drawn by the full plan, and how far from that candidates draw them."""

    def __init__(self, engine: Engine, requests: Sequence[Request], on_image: Callable[[int], None] | None) -> None:
        self._engine, self._requests, self._on_image = engine, requests, on_image
        self.images = 0  # drawn so far
        self.wanted = self._draw(requests)

    def __call__(self, candidate: Candidate, prompts: int | None = None) -> list[float]:
        """Distance of each image; prompts: only the first so many."""
        pictures = self._draw([candidate.apply(request) for request in self._requests[:prompts]])
        return [distance(a, b) for a, b in zip(self.wanted[: len(pictures)], pictures, strict=True)]

    def unlike(self) -> float | None:
        """Mean distance between the full plan's pictures of neighbouring prompts; None if there is only one."""
        firsts = self.wanted[:: self._requests[0].images]
        return float(np.mean([distance(a, b) for a, b in pairwise(firsts)])) if len(firsts) > 1 else None

    def _draw(self, requests: Sequence[Request]) -> list[Image.Image]:
        pictures: dict[int, Sequence[Image.Image]] = {}
        for outcome in self._engine.stream(requests):
            if outcome.result is None:
                raise outcome.error or GenerationError("an image of the search failed")
            pictures[outcome.index] = outcome.result.images
            self.images += len(outcome.result.images)
            if self._on_image is not None:
                self._on_image(self.images)
        return [picture for index in range(len(requests)) for picture in pictures[index]]


def tune(
    engine: Engine,
    requests: Sequence[Request],
    *,
    limit: float,
    budget: int,
    parts: Sequence[str] = (),
    on_image: Callable[[int], None] | None = None,
) -> Tuning:
    """Search for cheap plans. requests: of one plan, each a prompt with its seed; their guidance is one number.

    limit: largest mean distance. budget: most images that are drawn beside the timed ones. on_image: told how many so far.
    Raises RequestError for requests that cannot be tuned and for a budget that does not reach.
    """
    _check(requests)
    base, count = requests[0], sum(request.images for request in requests)
    ladder = rungs(engine, base, parts)
    singles = [(name, value) for name, values in ladder.items() for value in values]
    reserve = (1 + LEAST) * count  # the full plan and some combinations
    if budget < (least := reserve + len(singles) * base.images):
        raise RequestError(f"a budget of {budget} images is too small for these prompts; give at least {least}")
    scouts = max(1, (budget - reserve) // (2 * len(singles) * base.images))
    worth = prices(engine, base)
    pool = _pool(engine, base, worth, ladder)
    full = Trial(FULL, *pool.pop(FULL), 0.0, 0.0)
    compare = Comparison(engine, requests, on_image)
    alone = {
        (name, value): float(np.mean(compare(replace(FULL, **{name: value}), scouts)))  # type: ignore[arg-type]
        for name, value in singles
    }
    guess, trials = Guess(alone), list[Trial]()
    targets, idle = cycle(limit * factor for factor in TARGETS), 0
    while idle < len(TARGETS) and compare.images + count <= budget:
        target = next(targets)
        best = min((trial.cost for trial in trials if trial.distance <= target), default=full.cost)
        found = next((c for c, (_, cost) in pool.items() if cost < best and guess(c) <= target), None)
        if found is None:
            idle += 1
            continue
        idle = 0
        values = compare(found)
        trials.append(Trial(found, *pool.pop(found), float(np.mean(values)), max(values)))
        guess.learn(found, trials[-1].distance)
    return Tuning(full, tuple(trials), worth, compare.unlike(), compare.images, limit)


def _check(requests: Sequence[Request]) -> None:
    if not requests:
        raise RequestError("tune needs at least one prompt")
    base = requests[0]
    if not isinstance(base.guidance, float) or base.guidance in (0.0, 1.0):
        raise RequestError(f"tune starts from one guidance weight other than 0 and 1, not {base.guidance!r}")
    if base.reuse or base.preset or any((control.start, control.end) != (0.0, 1.0) for control in base.controls):
        raise RequestError(
            "tune starts from the full plan: without reuse and preset, and with ControlNets in all steps"
        )


def _pool(
    engine: Engine, base: Request, worth: Mapping[str, float], ladder: Mapping[str, Sequence[object]]
) -> dict[Candidate, tuple[int, float]]:
    """Rows and cost of every combination, cheapest first; of those that compile to one plan, the simplest."""
    whole = compile_plan(base, engine.scheduler_card)
    rows = (whole.steps, whole.init_noise)
    plans: dict[object, tuple[Candidate, tuple[int, float]]] = {}
    for candidate in candidates(ladder):
        request = candidate.apply(base)
        plan = compile_plan(request, engine.scheduler_card, rows)
        cost = sum(count * worth[label] for label, count in row_counts(plan, request, engine.bundle).items())
        plans.setdefault(plan.steps, (candidate, (plan.rows, cost)))
    return dict(sorted(plans.values(), key=lambda entry: entry[1][1]))
