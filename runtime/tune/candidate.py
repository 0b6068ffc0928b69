"""Plans that `tune` may try: a `Candidate` narrows windows and lets steps reuse activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product

from stepforge.runtime.engine import Engine
from stepforge.runtime.errors import RequestError
from stepforge.runtime.files import printable
from stepforge.runtime.plan.guidance import parse_guidance
from stepforge.runtime.plan.reuse import Reuse
from stepforge.runtime.request import Request

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


def rungs(engine: Engine, request: Request, parts: Sequence[str] = ()) -> dict[str, tuple[object, ...]]:
    """What each field of a Candidate may be beside its default. parts: names in PARTS; empty: all that the bundle has.

    Raises RequestError for a part that is unknown, or that the bundle or the request does not have.
    """
    have = [name for name in ("tgate", "deepcache") if has_variant(engine, name)]
    have = ["guidance", *have, *(["control"] if request.controls else [])]
    for part in parts:
        if part not in PARTS:
            raise RequestError(f"{printable(part)} cannot be tuned; choose from {', '.join(PARTS)}")
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


def has_variant(engine: Engine, variant: str) -> bool:
    return any(variant in engine.bundle.variants(denoiser) for denoiser in engine.bundle.denoisers)
