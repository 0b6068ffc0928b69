"""Who draws: each opens a model once and draws workloads by its library's own API. Images are float [side, side, 3] in 0..1."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from suite.cases import Workload
from suite.models import Model

# name -> (module of this package, library that must be there)
RUNNERS = {
    "diffusers": ("diffusers_eager", "diffusers"),
    "diffusers torch.compile": ("diffusers_eager", "diffusers"),
    "openvino": ("openvino_bare", "openvino"),
    "openvino genai": ("genai", "openvino_genai"),
    "onnxruntime": ("onnxruntime_bare", "onnxruntime"),
    "stable-diffusion.cpp": ("sdcpp", "stable_diffusion_cpp"),
    "stepforge openvino": ("ours", "openvino"),
    "stepforge onnxruntime": ("ours", "onnxruntime"),
}


class Runner(Protocol):
    def draw(self, workloads: Sequence[Workload]) -> list[np.ndarray]: ...


def missing(name: str) -> str:
    """Why a runner cannot run here; empty if it can."""
    library = RUNNERS[name][1]
    return "" if importlib.util.find_spec(library) else f"{library} is not installed"


def open_runner(name: str, model: Model, precision: str, like: Sequence[Workload], kind: str = "plain") -> Runner:
    """like: workloads to come, which say what is opened; kind: of our bundle."""
    module = importlib.import_module(f"suite.runners.{RUNNERS[name][0]}")
    return module.open_runner(name, model, precision, like, kind)  # type: ignore[no-any-return]
