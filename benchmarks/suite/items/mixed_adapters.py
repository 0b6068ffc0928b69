"""Four images with four sets of adapters: one batch here, one image after the other where a pipeline has one set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from suite.cases import Case, Record
from suite.items import OURS, Context, draw_and_time

TITLE = "Four images, four adapter sets"
SETS = (
    (("poster", 1.0),),
    (("thermal", 1.0),),
    (("subject", 1.0),),
    (("poster", 0.5), ("subject", 0.5)),
)


def cases(quick: bool, precisions: Sequence[str]) -> list[Case]:
    return [
        Case("mixed_adapters", model, name)
        for model in (("demo",) if quick else ("demo", "sd15"))
        for name in ("diffusers", *OURS)
    ]


def measure(case: Case, context: Context) -> Record:
    base = context.workload(case)
    workloads = [replace(base, seed=seed, adapters=adapters) for seed, adapters in enumerate(SETS)]
    return draw_and_time(case, context, workloads, "full")
