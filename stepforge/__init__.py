"""stepforge: compile text-to-image diffusion models into bundles of engine graphs, and run them without torch.

    import stepforge

    with stepforge.load("emoji.bundle") as engine:
        engine.generate("cat face on a blue background", seed=1).save("cat.png")

Names load when they are first asked for: `import stepforge` alone reads no engine library, and neither torch nor diffusers
is ever imported by a generation. The links in this folder let editors and type checkers find the rooms in a checkout.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepforge.runtime.bundle import Bundle
    from stepforge.runtime.engine import Engine, EngineStats, Outcome
    from stepforge.runtime.errors import (
        AdapterError,
        BackendError,
        BundleError,
        Cancelled,
        CheckpointError,
        DeadlineExceeded,
        EngineClosed,
        GenerationError,
        QueueFull,
        RequestError,
        StepforgeError,
    )
    from stepforge.runtime.load import load, open_bundle
    from stepforge.runtime.lora.adapter import Adapter
    from stepforge.runtime.request import Control, Init, Progress, Request, Result, Stats, Upscale

    __version__: str

HOMES = {
    "Adapter": "lora.adapter",
    "AdapterError": "errors",
    "BackendError": "errors",
    "Bundle": "bundle",
    "BundleError": "errors",
    "Cancelled": "errors",
    "CheckpointError": "errors",
    "Control": "request",
    "DeadlineExceeded": "errors",
    "Engine": "engine",
    "EngineClosed": "errors",
    "EngineStats": "engine",
    "GenerationError": "errors",
    "Init": "request",
    "Outcome": "engine",
    "Progress": "request",
    "QueueFull": "errors",
    "Request": "request",
    "RequestError": "errors",
    "Result": "request",
    "Stats": "request",
    "StepforgeError": "errors",
    "Upscale": "request",
    "load": "load",
    "open_bundle": "load",
}

__all__ = [
    "Adapter",
    "AdapterError",
    "BackendError",
    "Bundle",
    "BundleError",
    "Cancelled",
    "CheckpointError",
    "Control",
    "DeadlineExceeded",
    "Engine",
    "EngineClosed",
    "EngineStats",
    "GenerationError",
    "Init",
    "Outcome",
    "Progress",
    "QueueFull",
    "Request",
    "RequestError",
    "Result",
    "Stats",
    "StepforgeError",
    "Upscale",
    "__version__",
    "load",
    "open_bundle",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("stepforge")
    if name not in HOMES:
        raise AttributeError(f"stepforge has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"stepforge.runtime.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
