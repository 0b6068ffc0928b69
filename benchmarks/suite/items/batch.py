"""Sixteen requests that have nothing in common but the model: steps, guidance, adapters, ControlNets, seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from suite.cases import Case, Record
from suite.items import OURS, Context, draw_and_time

TITLE = "Sixteen mixed requests"


def cases(quick: bool, precisions: Sequence[str]) -> list[Case]:
    return [Case("batch", "demo", name) for name in ("diffusers", *OURS)]


def measure(case: Case, context: Context) -> Record:
    base = context.workload(case)
    sets = ((), (("poster", 1.0),), (("thermal", 0.8),), (("subject", 1.0),))
    # no request has both a ControlNet and a last unguided half: diffusers' recipe for that leaves the hint its two rows
    workloads = [
        replace(
            base, seed=index, steps=(10, 20, 25, 16)[index // 4], guidance=(3.0, 1.0, 5.0)[index % 3],
            adapters=sets[index % 4], control=0.5 if index % 5 == 0 else None, guided=0.5 if index % 6 == 2 else 1.0,
        )
        for index in range(16)
    ]  # fmt: skip
    return draw_and_time(case, replace(context, runs=1) if context.quick else context, workloads, "full")
