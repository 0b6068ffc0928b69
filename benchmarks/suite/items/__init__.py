"""What is measured, an item a file: `TITLE`, `cases(quick, precisions)`, and `measure(case, context)`, a process a case."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np

from suite.cases import Case, Record, Workload
from suite.models import Model
from suite.runners import open_runner

# in the order in which they run: first the gate, then what makes the bundles that others read
ITEMS = (
    "parity", "export", "txt2img", "lora", "mixed_adapters", "control", "interval", "batch", "sr", "overhead", "swap",
    "cold_start", "imports", "int8",
)  # fmt: skip
PEERS = ("diffusers", "openvino", "openvino genai", "onnxruntime")
LARGE_RUNS = 2  # counted runs of models of real size, which take half a minute each
OURS = ("stepforge openvino", "stepforge onnxruntime")


@dataclass(frozen=True, slots=True)
class Context:
    work: Path
    image: Path  # where what the case drew goes
    quick: bool
    runs: int

    def model(self, name: str) -> Model:
        return Model(name, self.work)

    def workload(self, case: Case) -> Workload:
        return self.model(case.model).workload(quick=self.quick)


def item(name: str) -> ModuleType:
    return importlib.import_module(f"suite.items.{name}")


def timed(draw: Callable[[], object], runs: int) -> list[float]:
    """Seconds of `runs` calls after one that is not counted."""
    draw()
    found = []
    for _ in range(runs):
        started = time.perf_counter()
        draw()
        found.append(time.perf_counter() - started)
    return found


def draw_and_time(case: Case, context: Context, workloads: Sequence[Workload], kind: str = "plain") -> Record:
    """Open the case's runner, draw with two steps uncounted, then time all workloads together; keeps the images."""
    model = context.model(case.model)
    started = time.perf_counter()
    runner = open_runner(case.runner, model, case.precision, workloads, kind)
    loaded = time.perf_counter() - started
    # the demo is small: one uncounted run of all. Large models: two steps touch all that a run needs
    runner.draw(workloads if case.model == "demo" else [replace(one, steps=2) for one in workloads[:1]])
    seconds, images = [], []
    for _ in range(context.runs if case.model == "demo" else min(context.runs, LARGE_RUNS)):
        started = time.perf_counter()
        images = runner.draw(workloads)
        seconds.append(time.perf_counter() - started)
    np.save(context.image, np.stack(images))
    backing = 1 if case.precision == "fp32" else 0.5
    weights = model.weights(control=any(one.control is not None for one in workloads))
    return Record(case, seconds, load=loaded, weights=int(backing * weights))
