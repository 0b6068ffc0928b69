"""Reuse between steps: which evaluations run a variant of the denoiser that takes an earlier one's activations.

    deepcache(3)                   every third evaluation is whole; those between reuse its deep features (arXiv:2312.00858)
    deepcache(3, steps=0.4..1)     in that part of the steps only
    tgate(0.5)                     from half of the steps on, what cross-attention last gave is kept (arXiv:2404.02747)
    deepcache(3)+tgate(0.5)        both; a step that skips by DeepCache does not gate besides

Reuse is approximate, off unless a request asks for it, and needs a bundle exported with `--reuse`. T-GATE here is the kept
cross-attention alone: dropping guidance after the gate, which the paper does with it, is the guidance's business.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from stepforge.runtime.checks import clipped, shown
from stepforge.runtime.errors import RequestError
from stepforge.runtime.grammar import FLOAT, number, plain, read_call, split, text_of
from stepforge.runtime.plan.step import Step

DEEPCACHE, TGATE = "deepcache", "tgate"
GRAMMAR = "deepcache(INTERVAL), deepcache(INTERVAL, steps=FROM..TO), tgate(FROM), or two of them joined by +"
RANGE = re.compile(rf"({FLOAT})\s*\.\.\s*({FLOAT})")
# what each form of the network has in its outputs, and what it reads of earlier ones
MAKES = {"": ("deep", "text"), TGATE: ("deep",), DEEPCACHE: ()}
NEEDS = {"": None, TGATE: "text", DEEPCACHE: "deep"}


@dataclass(frozen=True, slots=True)
class Reuse:
    """Validated settings; an interval of 0 and a gate of 1 are off. False where both are."""

    interval: int = 0
    window: tuple[float, float] = (0.0, 1.0)  # DeepCache's window, in fractions of the steps
    gate: float = 1.0  # fraction of the steps after which cross-attention is kept

    @classmethod
    def parse(cls, text: Reuse | str) -> Reuse:
        """Raises RequestError with the grammar."""
        if isinstance(text, Reuse):
            return text
        try:
            return cls._parse(text_of(text))
        except ValueError as error:
            raise RequestError(f"reuse {shown(text)} is not understood: {clipped(error)}; give {GRAMMAR}") from None

    @classmethod
    def _parse(cls, text: str) -> Reuse:
        interval, window, gate = 0, (0.0, 1.0), 1.0
        seen: set[str] = set()
        for part in split(text, "+") if text.strip() else ():
            call = read_call(part)
            if call is None or call.name not in (DEEPCACHE, TGATE):
                raise ValueError(f"{shown(part)} is unknown")
            if call.name in seen:
                raise ValueError(f"{call.name} is given twice")
            seen.add(call.name)
            if call.name == TGATE:
                gate = number(call.bind(("start",))["start"])
                if not 0.0 < gate < 1.0:
                    raise ValueError(f"the gate is {plain(gate)}; it must lie between 0 and 1")
                continue
            given = {"steps": "0..1", **call.bind(("interval",), ("steps",))}
            every = number(given["interval"])
            if every % 1 != 0 or not 2 <= every <= 100:
                raise ValueError(f"the interval is {plain(every)}; it must be a whole number from 2 to 100")
            interval = int(every)
            match = RANGE.fullmatch(given["steps"])
            window = (-1.0, -1.0) if match is None else (float(match[1]), float(match[2]))
            if not 0.0 <= window[0] < window[1] <= 1.0:
                raise ValueError(f"{shown(given['steps'])} is not a part of the steps such as 0.4..1")
        return cls(interval, window, gate)

    def __bool__(self) -> bool:
        return self.interval > 0 or self.gate < 1.0

    def __str__(self) -> str:
        """Canonical text: `Reuse.parse` gives an equal value."""
        window = "" if self.window == (0.0, 1.0) else f", steps={plain(self.window[0])}..{plain(self.window[1])}"
        parts = [f"{DEEPCACHE}({self.interval}{window})"] if self.interval else []
        return "+".join([*parts, f"{TGATE}({plain(self.gate)})"] if self.gate < 1.0 else parts)


def variants(reuse: Reuse, steps: Sequence[Step]) -> tuple[str, ...]:
    """The variant that each evaluation runs, "" for the whole network.

    An evaluation whose rows were not all run by the last one that its variant would reuse is whole as well; so is one
    that would reuse what another denoiser made.
    """
    count = len(steps)
    first, last = int(reuse.window[0] * count), int(reuse.window[1] * count)
    gate = max(1, int(reuse.gate * count))
    chosen: list[str] = []
    made: dict[str, frozenset[str]] = {}
    for k, step in enumerate(steps):
        if k and step.denoiser != steps[k - 1].denoiser:
            made.clear()
        skips = reuse.interval and first <= k < last and (k - first) % reuse.interval
        variant = DEEPCACHE if skips else TGATE if reuse.gate < 1.0 and k >= gate else ""
        need, rows = NEEDS[variant], roles(step.guidance)
        if need is not None and not rows <= made.get(need, frozenset()):
            variant = ""
        made.update(dict.fromkeys(MAKES[variant], rows))
        chosen.append(variant)
    return tuple(chosen)


def roles(guidance: float) -> frozenset[str]:
    """The rows that a guidance weight needs."""
    return frozenset(role for role, unused in (("cond", 0.0), ("uncond", 1.0)) if guidance != unused)


def recordings(steps: Sequence[Step]) -> tuple[frozenset[str], ...]:
    """What must be kept of each evaluation: "deep", "text", both or nothing."""
    kept: list[frozenset[str]] = []
    wanted: set[str] = set()
    for step in reversed(steps):
        kept.append(frozenset(wanted & set(MAKES[step.reuse])))
        wanted -= kept[-1]
        if (need := NEEDS[step.reuse]) is not None:
            wanted.add(need)
    return tuple(reversed(kept))
