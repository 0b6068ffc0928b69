"""OpenVINO GenAI's Text2ImagePipeline on our graphs, in the layout that it reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from suite.cases import Workload
from suite.models import Model, prepare_genai

HINTS = {"fp32": "f32", "bf16": "bf16"}


class GenAi:
    def __init__(self, model: Model, precision: str) -> None:
        import openvino_genai

        folder = prepare_genai(model)
        self.library = openvino_genai
        self.pipe = openvino_genai.Text2ImagePipeline(folder, "CPU", INFERENCE_PRECISION_HINT=HINTS[precision])
        ddim = openvino_genai.Scheduler.Type.DDIM
        self.pipe.set_scheduler(openvino_genai.Scheduler.from_config(folder / "scheduler/scheduler_config.json", ddim))

    def draw(self, workloads: Sequence[Workload]) -> list[np.ndarray]:
        return [self.one(workload) for workload in workloads]

    def one(self, workload: Workload) -> np.ndarray:
        made = self.pipe.generate(
            workload.prompt, width=workload.size, height=workload.size, num_inference_steps=workload.steps,
            guidance_scale=workload.guidance, generator=self.library.TorchGenerator(workload.seed),
        )  # fmt: skip
        return np.asarray(made.data[0], np.float32) / 255


def open_runner(name: str, model: Model, precision: str, like: Sequence[Workload], kind: str) -> GenAi:
    return GenAi(model, precision)
