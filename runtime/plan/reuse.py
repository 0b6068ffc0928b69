"""Reuse between steps: which evaluations run a variant of the denoiser that takes an earlier one's activations.

    deepcache(3)                   every third evaluation is whole; those between reuse its deep features (arXiv:2312.00858)
    deepcache(3, steps=0.4..1)     in that part of the steps only
    tgate(0.5)                     from half of the steps on, what cross-attention last gave is kept (arXiv:2404.02747)
    deepcache(3)+tgate(0.5)        both; a step that skips by DeepCache does not gate besides

Reuse is approximate, off unless a request asks for it, and needs a bundle exported with `--reuse`. T-GATE here is the kept
cross-attention alone: dropping guidance after the gate, which the paper does with it, is the guidance's business.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from stepforge.runtime.errors import RequestError
from stepforge.runtime.plan import Step

DEEPCACHE, TGATE = "deepcache", "tgate"
GRAMMAR = "deepcache(INTERVAL), deepcache(INTERVAL, steps=FROM..TO), tgate(FROM), or two of them joined by +"
PART = re.compile(r"(deepcache|tgate)\(([^()]*)\)")
RANGE = re.compile(r"steps=([0-9.]+)\.\.([0-9.]+)")
# what each form of the network has in its outputs, and what it reads of earlier ones
MAKES = {"": ("deep", "text"), TGATE: ("deep",), DEEPCACHE: ()}
NEEDS = {"": None, TGATE: "text", DEEPCACHE: "deep"}


@dataclass(frozen=True, slots=True)
class Reuse:
    """Validated settings; 0 and 1.0 stand for off."""

    interval: int = 0
    window: tuple[float, float] = (0.0, 1.0)  # of DeepCache, in fractions of the steps
    gate: float = 1.0  # fraction of the steps after which cross-attention is kept


def parse(text: str) -> Reuse:
    """Raises RequestError with the grammar."""
    found: dict[str, str] = {}
    for part in text.split("+") if text.strip() else ():
        match = PART.fullmatch(part.strip())
        if match is None or match[1] in found:
            raise RequestError(f"reuse {text!r} is not understood; give {GRAMMAR}")
        found[match[1]] = match[2].replace(" ", "")
    interval, window, gate = 0, (0.0, 1.0), 1.0
    if DEEPCACHE in found:
        count, _, steps = found[DEEPCACHE].partition(",")
        if not count.isdigit() or not 2 <= int(count) <= 100:
            raise RequestError(f"deepcache's interval is {count!r}; give a whole number from 2 to 100")
        interval = int(count)
        if steps:
            match = RANGE.fullmatch(steps)
            window = (-1.0, -1.0) if match is None else (_fraction(match[1]), _fraction(match[2]))
            if not 0.0 <= window[0] < window[1] <= 1.0:
                raise RequestError(f"deepcache's {steps!r} is not a part of the steps such as steps=0.4..1")
    if TGATE in found:
        gate = _fraction(found[TGATE])
        if not 0.0 < gate < 1.0:
            raise RequestError(f"tgate's gate is {found[TGATE]!r}; give a fraction of the steps between 0 and 1")
    return Reuse(interval, window, gate)


def _fraction(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def variants(reuse: Reuse, steps: Sequence[Step]) -> tuple[str, ...]:
    """The variant that each evaluation runs, "" for the whole network.

    An evaluation whose rows were not all run by the last one that its variant would reuse is whole as well.
    """
    count = len(steps)
    first, last = int(reuse.window[0] * count), int(reuse.window[1] * count)
    gate = max(1, int(reuse.gate * count))
    chosen: list[str] = []
    made: dict[str, frozenset[str]] = {}
    for k, step in enumerate(steps):
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
