"""Guiders: what makes one guided prediction of a conditional and an unconditional one, where a weight is not enough.

A `Guider` is a value, parsed from text such as "apg(eta=0)+adaptive+rescale(0.7)" and printed as one. It works on the raw
outputs of the network (epsilon, v, sample or flow, whatever it predicts), as diffusers' guiders do; only dynamic
thresholding goes through the estimate of the clean image. Its row functions take flat arrays of one image; sums, norms and
projections are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stepforge.runtime.arrays import Float32
from stepforge.runtime.checks import clipped, shown
from stepforge.runtime.errors import RequestError
from stepforge.runtime.grammar import Call, number, plain, read_call, split, text_of
from stepforge.runtime.plan.step import Step, rows_of

GRAMMAR = (
    "cfg, zero_star(zero=1) or apg(momentum=-0.5, norm=15, eta=1), with adaptive(0.991), then rescale(0.7), then "
    "dynamic(p=0.995, max=1.5), joined by +"
)


def cfg(w: float, cond: Float32, uncond: Float32, out: Float32) -> None:
    """uncond + w·(cond − uncond): classifier-free guidance; Ho & Salimans, arXiv:2207.12598, eq. 6 with w = w' + 1."""
    np.subtract(cond, uncond, out=out)
    out *= np.float32(w)
    out += uncond


def zero_star(w: float, cond: Float32, uncond: Float32, out: Float32) -> None:
    """s·uncond + w·(cond − s·uncond) with s = ⟨cond, uncond⟩ / (|uncond|² + 1e-8), CFG-Zero*'s optimised scale.

    Fan et al., arXiv:2503.18886; diffusers, guiders/classifier_free_zero_star_guidance.py.
    """
    scale = dot(cond, uncond) / (dot(uncond, uncond) + 1e-8)
    cfg(w, cond, uncond * np.float32(scale), out)


def apg(w: float, cond: Float32, uncond: Float32, out: Float32, *, change: Float32, norm: float, eta: float) -> None:
    """uncond + w·(d⊥ + eta·d∥), d = change·min(1, norm/|change|) split against cond: adaptive projected guidance.

    change: cond − uncond + momentum·(the change before); norm: 0 for no limit. Sadat et al., arXiv:2410.02416, in the
    form of diffusers' guiders/adaptive_projected_guidance.py; the paper's starts from cond with w − 1, which differs
    once the change is no longer cond − uncond.
    """
    size = math.sqrt(dot(change, change))
    shrunk = change.astype(np.float64) * (norm / size if 0 < norm < size else 1.0)
    along = cond.astype(np.float64) / max(math.sqrt(dot(cond, cond)), 1e-12)
    parallel = float(shrunk @ along)
    np.add(uncond, w * (shrunk + (eta - 1) * parallel * along), out=out, casting="same_kind")


def rescale(guided: Float32, cond: Float32, phi: float) -> None:
    """guided·(phi·std(cond)/std(guided) + 1 − phi), in place; the ratio is the same for either kind of std.

    Lin et al., arXiv:2305.08891, section 3.4; diffusers, guiders/guider_utils.py. A constant prediction stays as it is.
    """
    spread = float(np.std(guided, dtype=np.float64))
    if spread > 0:
        guided *= np.float32(phi * float(np.std(cond, dtype=np.float64)) / spread + 1 - phi)


def threshold(x0: NDArray[np.float64], percentile: float, cap: float) -> NDArray[np.float64]:
    """clip(x0, −s, s)/s with s the percentile of |x0|, held within 1..cap: dynamic thresholding.

    Saharia et al., arXiv:2205.11487, section 2.3; diffusers, DDPMScheduler._threshold_sample. cap 1 would be clipping.
    """
    s = min(max(float(np.quantile(np.abs(x0), percentile)), 1.0), cap)
    return np.clip(x0, -s, s) / s


def dynamic(step: Step, x: Float32, guided: Float32, percentile: float, cap: float) -> None:
    """Thresholds x0 = a·x + b·p of the step, and gives the p that belongs to it, in place.

    Where p says nothing about x0 (b is 0, or there is no signal), the prediction stays as it is.
    """
    a, b = step.denoised
    if b == 0 or not (math.isfinite(a) and math.isfinite(b)):
        return
    known = a * x.astype(np.float64)
    guided[:] = (threshold(known + b * guided, percentile, cap) - known) / b


def alignment(cond: Float32, uncond: Float32) -> float:
    """Cosine of the angle between the two predictions; 0 where one of them is 0."""
    size = math.sqrt(dot(cond, cond) * dot(uncond, uncond))
    return dot(cond, uncond) / size if size else 0.0


def dot(a: Float32, b: Float32) -> float:
    return float(np.einsum("i,i->", a, b, dtype=np.float64))


@dataclass(frozen=True, slots=True)
class ZeroStar:
    """CFG-Zero*: predictions of the sampler's first `zero` steps are 0, whatever their weight, as in diffusers."""

    zero: int

    def __str__(self) -> str:
        return f"zero_star(zero={self.zero})"


@dataclass(frozen=True, slots=True)
class Projected:
    """APG; momentum 0 keeps no memory."""

    momentum: float
    norm: float
    eta: float

    def __str__(self) -> str:
        return f"apg(momentum={plain(self.momentum)}, norm={plain(self.norm)}, eta={plain(self.eta)})"


@dataclass(frozen=True, slots=True)
class Dynamic:
    """Dynamic thresholding."""

    percentile: float
    cap: float

    def __str__(self) -> str:
        return f"dynamic(p={plain(self.percentile)}, max={plain(self.cap)})"


@dataclass(frozen=True, slots=True)
class Guider:
    """A validated choice of parts. What it remembers of one image is in the `State`."""

    combiner: ZeroStar | Projected | None = None  # None: plain classifier-free guidance
    adaptive: float | None = None
    rescale: float | None = None
    dynamic: Dynamic | None = None

    @classmethod
    def parse(cls, text: Guider | str) -> Guider:
        """Raises RequestError with the grammar."""
        if isinstance(text, Guider):
            return text
        try:
            parts = _parts(text_of(text))
        except ValueError as error:
            raise RequestError(f"guider {shown(text)} is not understood: {clipped(error)}; give {GRAMMAR}") from None
        combiner: ZeroStar | Projected | None = None
        if "zero_star" in parts:
            combiner = ZeroStar(int(parts["zero_star"][0]))
        if "apg" in parts:
            combiner = Projected(*parts["apg"])
        return cls(
            combiner=combiner,
            adaptive=parts["adaptive"][0] if "adaptive" in parts else None,
            rescale=parts["rescale"][0] if "rescale" in parts else None,
            dynamic=Dynamic(*parts["dynamic"]) if "dynamic" in parts else None,
        )

    def __str__(self) -> str:
        """Canonical text: `Guider.parse` gives an equal guider."""
        parts = [
            "" if self.combiner is None else str(self.combiner),
            "" if self.adaptive is None else f"adaptive({plain(self.adaptive)})",
            "" if self.rescale is None else f"rescale({plain(self.rescale)})",
            "" if self.dynamic is None else str(self.dynamic),
        ]
        return "+".join(filter(None, parts)) or "cfg"

    def start(self) -> State:
        """The state of one image, before its first step."""
        return State(self)

    def __call__(
        self, state: State, step: Step, w: float, x: Float32, cond: Float32 | None, uncond: Float32 | None, out: Float32
    ) -> None:
        """Writes the guided prediction of one image into `out`.

        w: what `state.weight(step)` said. x: the latents x_k, before scale_in. cond, uncond: None where that row did
        not run. All arrays are flat float32 of one length; `out` shares no memory with the others.
        """
        if self.is_zeroed(step):
            out[:] = 0.0
        elif cond is None or uncond is None:
            ran = uncond if cond is None else cond
            assert ran is not None
            out[:] = ran
        else:
            self._combine(state, w, cond, uncond, out)
            if self.adaptive is not None and state.aligned is None and alignment(cond, uncond) > self.adaptive:
                state.aligned = step.index
            if self.rescale is not None:
                rescale(out, cond, self.rescale)
        if self.dynamic is not None:
            dynamic(step, x, out, self.dynamic.percentile, self.dynamic.cap)

    def _combine(self, state: State, w: float, cond: Float32, uncond: Float32, out: Float32) -> None:
        match self.combiner:
            case None:
                cfg(w, cond, uncond, out)
            case ZeroStar():
                zero_star(w, cond, uncond, out)
            case Projected(momentum, norm, eta):
                change = cond - uncond
                if momentum:
                    if state.change is not None:
                        change += np.float32(momentum) * state.change
                    state.change = change
                apg(w, cond, uncond, out, change=change, norm=norm, eta=eta)

    def is_zeroed(self, step: Step) -> bool:
        return isinstance(self.combiner, ZeroStar) and step.index < self.combiner.zero


class State:
    """What a guider remembers of one image."""

    __slots__ = ("aligned", "change", "guider")

    def __init__(self, guider: Guider) -> None:
        self.guider = guider
        self.aligned: int | None = None  # index of the step at which adaptive guidance found the predictions aligned
        self.change: Float32 | None = None  # APG's running change

    def weight(self, step: Step) -> float:
        """The step's weight, or 1.0 where the unconditional row is not needed after all.

        That is after the step at which adaptive guidance latched (Castillo et al., arXiv:2312.12487: the unconditional
        row is left out once the cosine of the two predictions exceeds the threshold; both evaluations of a step get the
        same weight), and where the prediction is zeroed anyway.
        """
        latched = self.aligned is not None and step.index > self.aligned
        spared = latched or self.guider.is_zeroed(step)
        return 1.0 if spared and rows_of(step.guidance) == 2 else step.guidance


@dataclass(frozen=True, slots=True)
class Argument:
    name: str
    default: float
    fits: Callable[[float], bool]
    rule: str


PARTS: dict[str, tuple[Argument, ...]] = {
    "cfg": (),
    "zero_star": (Argument("zero", 1, lambda v: v % 1 == 0 and 0 <= v <= 1000, "a whole number from 0 to 1000"),),
    "apg": (
        Argument("momentum", -0.5, lambda v: -1 < v < 1, "between -1 and 1"),
        Argument("norm", 15.0, lambda v: 0 <= v < math.inf, "0 (no limit) or more"),
        Argument("eta", 1.0, lambda v: -10 <= v <= 10, "from -10 to 10"),
    ),
    "adaptive": (Argument("threshold", 0.991, lambda v: -1 <= v <= 1, "a cosine, from -1 to 1"),),
    "rescale": (Argument("phi", 0.7, lambda v: 0 <= v <= 1, "from 0 to 1"),),
    "dynamic": (
        Argument("p", 0.995, lambda v: 0 < v <= 1, "above 0 and up to 1"),
        Argument("max", 1.5, lambda v: 1 < v <= 1000, "above 1, which would be plain clipping, and up to 1000"),
    ),
}
COMBINERS = ("cfg", "zero_star", "apg")
ORDER = {"rescale": 1, "dynamic": 2}  # after the others


def _parts(text: str) -> dict[str, list[float]]:
    """Arguments of each part, by its name. Raises ValueError."""
    parts: dict[str, list[float]] = {}
    for part in split(text, "+"):
        name, values = _part(part)
        if name in parts:
            raise ValueError(f"{name} is given twice")
        parts[name] = values
    if sum(name in COMBINERS for name in parts) > 1:
        raise ValueError(f"only one of {', '.join(COMBINERS)} can combine the predictions")
    order = [ORDER.get(name, 0) for name in parts]
    if order != sorted(order):
        raise ValueError("rescale comes after guidance, and dynamic comes last")
    return parts


def _part(text: str) -> tuple[str, list[float]]:
    """Name and arguments, in the order of `PARTS`. Raises ValueError."""
    call = read_call(text) or Call(text, (), ())
    if call.name not in PARTS:
        raise ValueError(f"{shown(call.name)} is unknown")
    arguments = PARTS[call.name]
    given = call.bind(tuple(argument.name for argument in arguments), needed=False)
    values = []
    for argument in arguments:
        value = number(given[argument.name]) if argument.name in given else argument.default
        if not argument.fits(value):
            raise ValueError(f"{argument.name} of {call.name} is {value:g}; it must be {argument.rule}")
        values.append(value)
    return call.name, values
