"""Text to image with a ControlNet in the first half of the steps, and with an adapter beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from suite.cases import Case, Record
from suite.items import OURS, Context, draw_and_time

TITLE = "ControlNet in the first half of the steps"


def cases(quick: bool, precisions: Sequence[str]) -> list[Case]:
    return [
        Case("control", model, f"{name}{more}", precision)
        for model in (("demo",) if quick else ("demo", "sd15"))
        for more in ((", with LoRA",) if quick else ("", ", with LoRA"))
        for precision in precisions
        for name in ("diffusers", *OURS)
        if precision == "fp32" or name != "stepforge onnxruntime"
    ]


def measure(case: Case, context: Context) -> Record:
    runner, _, more = case.runner.partition(", ")
    workload = replace(context.workload(case), control=0.5, adapters=(("poster", 1.0),) if more else ())
    record = draw_and_time(replace(case, runner=runner), context, [workload], "full")
    record.case = case
    return record
