"""ONNX Runtime's own API on the graphs of our plain bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from suite.cases import Workload
from suite.models import Model
from suite.runners.plain_loop import PlainLoop


def open_runner(name: str, model: Model, precision: str, like: Sequence[Workload], kind: str) -> PlainLoop:
    import onnxruntime

    def opened(place: str) -> object:
        path = model.bundle() / place / "model.onnx"
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

        def run(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
            return session.run(None, dict(inputs))[0]

        return run

    places = ("text_encoder", "denoiser/unet", "vae_decoder")
    return PlainLoop(model, {place: opened(place) for place in places})
