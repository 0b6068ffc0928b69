"""Share of an image's time in which no network runs: ours as the engine counts it, diffusers' by clocks around its networks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from suite.cases import Case, Record
from suite.items import Context

TITLE = "Time outside the networks"


def cases(quick: bool, precisions: Sequence[str]) -> list[Case]:
    models = ("demo",) if quick else ("demo", "sd15")
    return [Case("overhead", model, name) for model in models for name in ("diffusers", "stepforge openvino")]


def measure(case: Case, context: Context) -> Record:
    """seconds: percent, of each run."""
    found = (ours if case.runner.startswith("stepforge") else diffusers)(case, context)
    return Record(case, found, unit="%")


def ours(case: Case, context: Context) -> list[float]:
    from stepforge import load
    from stepforge.runtime.tune.speed import measure as lines
    from suite.runners.ours import request

    model = context.model(case.model)
    with load(model.bundle(), backend="openvino", precision=case.precision) as engine:
        asked = request(context.workload(case), model)
        return [100 * lines(engine, asked, images=1, runs=1)[0].outside for _ in range(context.runs)]


def diffusers(case: Case, context: Context) -> list[float]:
    from suite.runners.diffusers_eager import Diffusers

    workload = context.workload(case)
    runner = Diffusers("diffusers", context.model(case.model), case.precision, [workload], "plain")
    pipe = runner.pipelines[False]
    spent = [0.0]

    def wrapped(forward: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return forward(*arguments, **options)
            finally:
                spent[0] += time.perf_counter() - started

        return run

    pipe.unet.forward, pipe.text_encoder.forward = wrapped(pipe.unet.forward), wrapped(pipe.text_encoder.forward)
    pipe.vae.decode = wrapped(pipe.vae.decode)
    found = []
    for _ in range(context.runs + 1):
        spent[0], started = 0.0, time.perf_counter()
        runner.draw([workload])
        found.append(100 * (1 - spent[0] / (time.perf_counter() - started)))
    return found[1:] or [statistics.fmean(found)]
