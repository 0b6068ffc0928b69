"""Which layers of a network become integers: as many as keep its output near the float network's at every noise level.

Each group of layers (a residual block, an attention, a feed-forward part) is quantised alone, and the change of the network's
output is measured: its sensitivity. Groups are then given up in the order of squared sensitivity for each multiplication
saved, as few as bring the worst call's error under the limit; squares, because errors of different layers are nearly
independent, so that their squares add up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# A residual block's shortcut reads the sum of all before it, which no norm has tamed, and is a group of its own.
GROUP = re.compile(r"(.*\.resnets\.\d+)\.conv[12]|(.*\.transformer_blocks\.\d+\.(?:attn1|attn2|ff))\..*")
LEAST_WORK = 1e-3  # share of a network's multiplications below which a group stays float: nothing would be won

Errors = Callable[[NDArray[np.bool_]], NDArray[np.float64]]  # switches of the layers -> error of each call


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that are quantised, or not, together."""

    name: str
    paths: tuple[str, ...]
    work: float  # share of the network's multiplications
    sensitivity: float  # worst error of the network's output with this group alone in integers


@dataclass(frozen=True, slots=True)
class Chosen:
    """A network's choice."""

    groups: tuple[Group, ...]  # in integers
    kept: tuple[Group, ...]  # in float, the first given up first
    error: float  # worst call's

    @property
    def paths(self) -> frozenset[str]:
        return frozenset(path for group in self.groups for path in group.paths)

    @property
    def work(self) -> float:
        """Share of the network's multiplications that are integers'."""
        return sum(group.work for group in self.groups)


def choose(paths: Sequence[str], work: Mapping[str, float], errors: Errors, limit: float) -> Chosen | None:
    """paths: layers in the order of `errors`' switches; work: multiplications of each. None: not one group keeps the limit."""
    everything = np.ones(len(paths), np.bool_)
    names = [match[match.lastindex or 0] if (match := GROUP.fullmatch(path)) else path for path in paths]
    total = sum(work.values())

    def switches(groups: Sequence[str]) -> NDArray[np.bool_]:
        return np.array([name in groups for name in names])

    whole = float(errors(everything).max())
    found = []
    for name in dict.fromkeys(names):
        own = tuple(path for path, group in zip(paths, names, strict=True) if group == name)
        share = sum(work[path] for path in own) / total
        worst = float(errors(switches([name])).max()) if whole > limit and share >= LEAST_WORK else 0.0
        found.append(Group(name, own, share, worst))
    small = tuple(group for group in found if group.work < LEAST_WORK)
    order = sorted((g for g in found if g.work >= LEAST_WORK), key=lambda g: g.sensitivity**2 / g.work, reverse=True)

    def error(dropped: int) -> float:
        """With as many groups given up."""
        return float(errors(switches([group.name for group in order[dropped:]])).max())

    low, high, best = 0, len(order), None  # dropping `high` keeps the limit: nothing is quantised then
    while low < high:
        middle = (low + high) // 2
        if (value := error(middle)) <= limit:
            high, best = middle, value
        else:
            low = middle + 1
    if best is None or high == len(order):
        return None
    return Chosen(tuple(order[high:]), (*order[:high], *small), best)
