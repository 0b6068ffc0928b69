"""Another adapter for the next image, in a pipeline that runs: its file is read, and it takes the place of one before it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from suite.cases import Case, Record
from suite.items import Context
from suite.runners import open_runner

TITLE = "Adapter swap: file read, adapter in place"
SWAPS = 7


def cases(quick: bool, precisions: Sequence[str]) -> list[Case]:
    models = ("demo",) if quick else ("demo", "sd15")
    return [Case("swap", model, name) for model in models for name in ("diffusers", "stepforge openvino")]


def measure(case: Case, context: Context) -> Record:
    workload = context.workload(case)
    model = context.model(case.model)
    path = model.adapter("poster")
    runner = open_runner(case.runner, model, case.precision, [workload], "full")
    runner.draw([workload])
    seconds = []
    for index in range(SWAPS):
        started = time.perf_counter()
        if case.runner == "diffusers":
            from suite.runners.diffusers_eager import load_adapter

            pipe = runner.pipelines[False]  # type: ignore[attr-defined]
            load_adapter(pipe, path, str(index))
            pipe.set_adapters([str(index)], [1.0])
            if index:
                pipe.delete_adapters(str(index - 1))
        else:
            adapters = runner.engine.adapters  # type: ignore[attr-defined]
            adapters.load(str(index), path)
            adapters.acquire(adapters.choose({str(index): 1.0}), ())
        seconds.append(time.perf_counter() - started)
    return Record(case, seconds[1:])
