"""stepforge: the engine's face, one call for all workloads that are given together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from stepforge import Engine, Request, load
from suite.cases import Workload
from suite.models import HINT, Model


def request(workload: Workload, model: Model) -> Request:
    options: dict[str, object] = {}
    if workload.control is not None:
        image = Image.open(HINT).convert("RGB").resize((workload.size, workload.size))
        options["controls"] = ({"name": model.control_name, "image": image, "end": workload.control},)
    guidance: float | str = workload.guidance
    if workload.guided < 1:
        guidance = f"interval({workload.guidance}, steps=0..{workload.guided})"
    return Request(
        prompt=workload.prompt, width=workload.size, height=workload.size, steps=workload.steps, sampler="ddim",
        guidance=guidance, seed=workload.seed, adapters=dict(workload.adapters), prompt_syntax="plain", **options,
    )  # fmt: skip


class Ours:
    def __init__(self, name: str, model: Model, precision: str, like: Sequence[Workload], kind: str) -> None:
        self.model, self.merged = model, kind == "merged"
        self.engine: Engine = load(model.bundle(kind), backend=name.split()[1], precision=precision)
        if not self.merged:
            for adapter in dict.fromkeys(name for one in like for name, _ in one.adapters):
                self.engine.adapters.load(adapter, model.adapter(adapter))

    def draw(self, workloads: Sequence[Workload]) -> list[np.ndarray]:
        if self.merged:
            from dataclasses import replace

            workloads = [replace(one, adapters=()) for one in workloads]
        results = self.engine.generate([request(one, self.model) for one in workloads])
        return [np.asarray(result.images[0], np.float32) / 255 for result in results]


def open_runner(name: str, model: Model, precision: str, like: Sequence[Workload], kind: str) -> Ours:
    return Ours(name, model, precision, like, kind)
