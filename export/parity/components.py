"""Each network of a bundle against the reference's on the same inputs: relative error of its outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from stepforge.export.parity.measures import relative_error
from stepforge.export.parity.recorder import Arrays, Call
from stepforge.runtime.backends import Backend
from stepforge.runtime.bundle import Bundle
from stepforge.runtime.engine.adapters import no_adapter
from stepforge.runtime.engine.conditions.controls import no_residuals


def component_errors(bundle: Bundle, calls: Sequence[Call], backend: Backend) -> Iterator[tuple[str, float]]:
    """Name and error of each output of each call; residuals of a ControlNet count as one output.

    Infinite where the bundle has no such network, or it takes other inputs, or makes other outputs.
    """
    for call in calls:
        entry = bundle.components.get(call.component)
        if entry is None:
            yield f"{call.name}: not in the bundle", math.inf
            continue
        rows = len(next(iter(call.inputs.values())))
        inputs = dict(call.inputs) | (no_adapter(rows) if entry.bank is not None else {})
        if call.component.role == "denoiser":
            inputs |= no_residuals(entry)
        if odd := {tensor.name for tensor in entry.inputs if ".lora_" not in tensor.name} ^ inputs.keys():
            yield f"{call.name}: {min(odd)} is an input of one alone", math.inf
            continue
        outputs = backend.open(call.component)(inputs)
        if call.component.role == "control_residuals":
            yield call.name, _error(_joined(outputs, call.outputs), _joined(call.outputs, call.outputs))
            continue
        for name, expected in call.outputs.items():
            what = f"{call.name} pooled" if name == "pooled" else call.name
            yield what, _error(np.asarray(outputs[name]), expected) if name in outputs else math.inf


def _error(ours: np.ndarray, reference: np.ndarray) -> float:  # type: ignore[type-arg, unused-ignore]
    return relative_error(ours, reference) if ours.shape == reference.shape else math.inf


def _joined(arrays: Arrays, names: Arrays) -> np.ndarray:  # type: ignore[type-arg, unused-ignore]
    return np.concatenate([np.asarray(arrays[name]).ravel() for name in names if name in arrays])
