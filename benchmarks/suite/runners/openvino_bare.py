"""OpenVINO's own API on the graphs of our plain bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from suite.cases import Workload
from suite.models import Model
from suite.runners.plain_loop import PlainLoop

HINTS = {"fp32": "f32", "bf16": "bf16"}


def open_runner(name: str, model: Model, precision: str, like: Sequence[Workload], kind: str) -> PlainLoop:
    import openvino

    core = openvino.Core()

    def opened(place: str) -> object:
        hint = "f32" if place == "vae_decoder" else HINTS[precision]
        path = model.bundle() / place / "model.onnx"
        compiled = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": hint})

        def run(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
            return compiled(dict(inputs))[0]

        return run

    places = ("text_encoder", "denoiser/unet", "vae_decoder")
    return PlainLoop(model, {place: opened(place) for place in places})
