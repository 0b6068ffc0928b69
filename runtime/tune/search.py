"""Find plans that run fewer rows and draw nearly the same pictures: what `stepforge tune` does.

A `Candidate` narrows the guidance window and the ControlNets' window and lets steps reuse activations. Its cost is its rows,
each weighed by what a row of its network takes on this machine (`prices`), in rows of the whole denoiser; its distance is
that between its pictures and those of the full plan, from the same prompts and seeds (`distance`).

Search: every rung of every part alone on a few prompts; then combinations, cheapest first among those whose parts' distances
add up to no more than is allowed, on all prompts. The sum is only a guess, and each measurement corrects it (`Guess`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import cycle, pairwise, product

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stepforge.runtime.engine import Engine
from stepforge.runtime.errors import RequestError
from stepforge.runtime.plan import Plan, rows_of
from stepforge.runtime.plan.compile import compile_plan
from stepforge.runtime.plan.guidance import parse_guidance
from stepforge.runtime.plan.reuse import Reuse
from stepforge.runtime.request import Request, Result

SIDE = 32  # pixels of the compared pictures
WINDOW = 7  # pixels of the squares that SSIM compares
PROBE_STEPS = 5  # of the requests that are timed
PROBE_RUNS = 3
# which multiple of the limit a round of the search aims at: the frontier has neighbours too
TARGETS = (1.0, 1.0, 0.5, 2.0)
LEAST = 4  # combinations that a budget must reach for
TRUST = 0.3  # how much one measurement outweighs the guess that distances add up

DeepCache = tuple[int, float, float]  # interval and window; interval 0 is off
OFF: DeepCache = (0, 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Candidate:
    """Windows are fractions of the steps. The defaults are the full plan."""

    guidance_end: float = 1.0
    guidance_start: float = 0.0
    gate: float = 1.0  # T-GATE's; 1 is off
    deepcache: DeepCache = OFF
    control_end: float = 1.0

    def guidance(self, w: float) -> str:
        """In the grammar of guidance.py."""
        if (self.guidance_start, self.guidance_end) == (0.0, 1.0):
            return f"{w:g}"
        return f"interval({w:g}, steps={self.guidance_start:g}..{self.guidance_end:g})"

    @property
    def reuse(self) -> str:
        """In the grammar of reuse.py."""
        interval, first, last = self.deepcache
        window = "" if (first, last) == (0.0, 1.0) else f", steps={first:g}..{last:g}"
        parts = [f"deepcache({interval}{window})"] if interval else []
        return "+".join([*parts, f"tgate({self.gate:g})"] if self.gate < 1 else parts)

    def apply(self, request: Request) -> Request:
        """The request with this plan."""
        assert isinstance(request.guidance, float)
        controls = tuple(replace(control, start=0.0, end=self.control_end) for control in request.controls)
        guidance, reuse = parse_guidance(self.guidance(request.guidance)), Reuse.parse(self.reuse)
        return replace(request, guidance=guidance, reuse=reuse, controls=controls)

    def preset(self, request: Request) -> dict[str, object]:
        """As presets.py stores it."""
        assert isinstance(request.guidance, float)
        window = {"control_start": 0.0, "control_end": self.control_end} if request.controls else {}
        return {"guidance": self.guidance(request.guidance), "reuse": self.reuse, **window}


FULL = Candidate()
# the rungs of each part, beside "as in the full plan"; T-GATE has few, for it saves little
RUNGS: Mapping[str, tuple[object, ...]] = {
    "guidance_end": (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2),
    "guidance_start": (0.05, 0.1, 0.2, 0.3),
    "gate": (0.7, 0.5, 0.3),
    "deepcache": tuple((n, a, b) for a, b in ((0.0, 1.0), (0.2, 1.0), (0.4, 1.0), (0.0, 0.8)) for n in (2, 3, 5)),
    "control_end": (0.8, 0.6, 0.4, 0.2),
}
PARTS: Mapping[str, tuple[str, ...]] = {
    "guidance": ("guidance_end", "guidance_start"),
    "tgate": ("gate",),
    "deepcache": ("deepcache",),
    "control": ("control_end",),
}


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate that was measured on all prompts."""

    candidate: Candidate
    rows: int  # of the denoiser, of one image
    cost: float  # in rows of the whole denoiser
    distance: float  # mean over the images
    worst: float


@dataclass(frozen=True, slots=True)
class Tuning:
    """What `tune` found."""

    full: Trial
    trials: tuple[Trial, ...]  # without the full plan
    prices: Mapping[str, float]  # label of Stats.rows -> what a row costs, the whole denoiser's being 1
    unlike: float | None  # mean distance between the full plan's pictures of different prompts, for comparison
    images: int  # that were drawn
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


def distance(a: Image.Image, b: Image.Image) -> float:
    """(RMSE + (1 − SSIM)/2) / 2 of two pictures, each box-averaged to 32x32; from 0 (equal) to 1.

    RMSE is over RGB in 0..1. SSIM (Wang et al. 2004, K 0.01 and 0.03) is the mean over 7x7 squares of the luma. So one
    half looks at colours and one at shapes, and neither at detail finer than a thirty-second of the picture.
    """
    left, right = (_small(picture) for picture in (a, b))
    rmse = float(np.sqrt(((left - right) ** 2).mean()))
    luma = np.array([0.299, 0.587, 0.114])
    return (rmse + (1 - _ssim(left @ luma, right @ luma)) / 2) / 2


def _small(picture: Image.Image) -> NDArray[np.float64]:
    return np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), np.float64) / 255


def _ssim(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    def squares(x: NDArray[np.float64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = np.lib.stride_tricks.sliding_window_view(x, (WINDOW, WINDOW)).mean((2, 3))
        return found

    mean_a, mean_b = squares(a), squares(b)
    var_a, var_b = squares(a * a) - mean_a**2, squares(b * b) - mean_b**2
    covariance = squares(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((likeness / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def row_counts(plan: Plan, request: Request) -> dict[str, int]:
    """Rows of one image by label, as `Stats.rows` counts denoisers and ControlNets."""
    counts: dict[str, int] = {}
    for step in plan.steps:
        rows = rows_of(step.guidance)
        used = [(f"{step.denoiser}.{step.reuse}" if step.reuse else step.denoiser, rows)]
        for control, scale in zip(request.controls, step.control, strict=True):
            label = f"control/{control.name}" + (".deepcache" if step.reuse == "deepcache" else "")
            used.append((label, 0 if not scale else int(step.guidance != 0.0) if control.guess_mode else rows))
        for label, count in used:
            counts[label] = counts.get(label, 0) + count
    return {label: count for label, count in counts.items() if count}


def prices(engine: Engine, request: Request) -> dict[str, float]:
    """What a row of each network costs on this machine, in rows of the whole denoiser.

    Short requests of each kind, as many images as fill a network call, the fastest of three runs; the seconds of
    each kind of row are then the solution of a system of equations, one for each request.
    """
    probe = replace(request, steps=min(request.steps, PROBE_STEPS), images=max(1, engine.max_rows // 2), preset="")
    kinds = ["", *(reuse for reuse in ("deepcache(5)", "tgate(0.2)") if _has(engine, reuse.partition("(")[0]))]
    sets = [(), *((replace(c, scale=1.0, start=0.0, end=1.0, sigma=None),) for c in request.controls)]
    requests = [replace(probe, reuse=Reuse.parse(kind), controls=controls) for kind, controls in product(kinds, sets)]
    rows, seconds = [], []
    for one in requests:
        results = [engine.generate(one) for _ in range(PROBE_RUNS)]
        rows.append(_denoising(results[0]))
        seconds.append(min(result.stats.seconds["denoise"] for result in results))
    labels = list(dict.fromkeys(label for counts in rows for label in counts))
    matrix = np.array([[counts.get(label, 0) for label in labels] for counts in rows], np.float64)
    solved = np.maximum(np.linalg.lstsq(matrix, np.array(seconds), rcond=None)[0], 0.0)
    found = dict(zip(labels, solved.tolist(), strict=True))
    whole = found[labels[0]]
    return {label: round(value / whole, 3) for label, value in found.items()}


def _denoising(result: Result) -> dict[str, int]:
    rows = result.stats.rows
    networks = {step.denoiser for step in result.plan.steps}
    return {
        label: count
        for label, count in rows.items()
        if label.partition(".")[0] in networks or (label.startswith("control/") and not label.endswith("/hint"))
    }


def _has(engine: Engine, variant: str) -> bool:
    return any(name.startswith("denoiser/") and name.endswith(f".{variant}") for name in engine.bundle.components)


def rungs(engine: Engine, request: Request, parts: Sequence[str] = ()) -> dict[str, tuple[object, ...]]:
    """What each field of a Candidate may be beside its default. parts: names in PARTS; empty: all that the bundle has.

    Raises RequestError for a part that is unknown, or that the bundle or the request does not have.
    """
    have = [name for name in ("tgate", "deepcache") if _has(engine, name)]
    have = ["guidance", *have, *(["control"] if request.controls else [])]
    for part in parts:
        if part not in PARTS:
            raise RequestError(f"{part!r} cannot be tuned; choose of {', '.join(PARTS)}")
        if part not in have:
            why = "the request has no ControlNet" if part == "control" else f"export the bundle with --reuse {part}"
            raise RequestError(f"{part} cannot be tuned: {why}")
    return {name: RUNGS[name] for part in parts or have for name in PARTS[part]}


def candidates(ladder: Mapping[str, Sequence[object]]) -> Iterator[Candidate]:
    """All combinations; guidance windows of at least a tenth of the steps."""
    options = [(getattr(FULL, f.name), *ladder.get(f.name, ())) for f in fields(Candidate)]
    for values in product(*options):
        candidate = Candidate(*values)
        if candidate.guidance_end - candidate.guidance_start >= 0.1:
            yield candidate


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
    scouts = requests[: max(1, (budget - reserve) // (2 * len(singles) * base.images))]
    drawn = 0

    def draw(asked: Sequence[Request]) -> list[Image.Image]:
        nonlocal drawn
        pictures: list[Image.Image] = []
        for future in [engine.submit(request) for request in asked]:
            pictures += future.result().images
            if on_image is not None:
                on_image(drawn + len(pictures))
        drawn += len(pictures)
        return pictures

    def measure(candidate: Candidate, asked: Sequence[Request]) -> list[float]:
        pictures = draw([candidate.apply(request) for request in asked])
        return [distance(a, b) for a, b in zip(wanted[: len(pictures)], pictures, strict=True)]

    worth = prices(engine, base)
    pool = _pool(engine, base, worth, ladder)
    full = Trial(FULL, *pool.pop(FULL), 0.0, 0.0)
    wanted = draw(requests)
    alone = {
        (name, value): float(np.mean(measure(replace(FULL, **{name: value}), scouts)))  # type: ignore[arg-type]
        for name, value in singles
    }
    guess, trials = Guess(alone), list[Trial]()
    targets, idle = cycle(limit * factor for factor in TARGETS), 0
    while idle < len(TARGETS) and drawn + count <= budget:
        target = next(targets)
        best = min((trial.cost for trial in trials if trial.distance <= target), default=full.cost)
        found = next((c for c, (_, cost) in pool.items() if cost < best and guess(c) <= target), None)
        if found is None:
            idle += 1
            continue
        idle = 0
        values = measure(found, requests)
        trials.append(Trial(found, *pool.pop(found), float(np.mean(values)), max(values)))
        guess.learn(found, trials[-1].distance)
    firsts = wanted[:: base.images]
    apart = [distance(a, b) for a, b in pairwise(firsts)]
    return Tuning(full, tuple(trials), worth, float(np.mean(apart)) if apart else None, drawn, limit)


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
        cost = sum(count * worth[label] for label, count in row_counts(plan, request).items())
        plans.setdefault(plan.steps, (candidate, (plan.rows, cost)))
    return dict(sorted(plans.values(), key=lambda entry: entry[1][1]))
