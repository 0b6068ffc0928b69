"""Outputs of a network, held to what the manifest states of it: names, shapes and types, at every call.

The manifest's own statements were held to the model card when it was read (`bundle/fit.py`), so a decoder of four channels, or
of another scale, or a text encoder of another width is an error before anything is computed from what it gave.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from stepforge.runtime.bundle import Bundle, ComponentId
from stepforge.runtime.errors import BackendError

SIZE = re.compile(r"(?:(\d+)\*)?([A-Za-z_]\w*)(?:/(\d+))?")  # "8*height", "height/2"

FLOATS = ("float32", "torch.float32", "torch.bfloat16", "torch.float16")  # the torch backend converts what leaves it
Size = int | tuple[str, int, int]  # a number, or the name of an input's size, times one number, divided by another


class Signature:
    """Compares names, shapes and types, no values. Components without statements are not checked. outputs: those that are asked
    for; None: all."""

    def __init__(self, bundle: Bundle, component: ComponentId, outputs: Collection[str] | None = None) -> None:
        entry = bundle.components[component]
        self._component = component
        self._inputs = {
            tensor.name: [(axis, size) for axis, size in enumerate(tensor.shape) if isinstance(size, str)]
            for tensor in entry.inputs
            if ".lora_" not in tensor.name and not tensor.name.startswith("residual_")  # [1, C, 1, 1] where all are 0
        }
        # means over height and width
        pooled = component.role == "control_residuals" and bundle.controls[component.name].global_pool
        self._outputs: dict[str, list[Size]] = {}
        for tensor in entry.outputs:
            if outputs is not None and tensor.name not in outputs:
                continue
            sizes = [_size(size) for size in tensor.shape]
            self._outputs[tensor.name] = [*sizes[:2], 1, 1] if pooled else sizes

    def check(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """inputs, outputs: arrays or tensors. Raises BackendError for the first output that is not as stated."""
        sizes: dict[str, int] = {}
        for name, axes in self._inputs.items():
            if name in inputs:
                shape = inputs[name].shape
                sizes |= {symbol: shape[axis] for axis, symbol in axes}
        for name, stated in self._outputs.items():
            if name not in outputs:
                raise BackendError(f"{self._component} gave no {name}")
            found = tuple(outputs[name].shape)
            wanted = tuple(_resolved(size, sizes) for size in stated)
            if len(found) != len(wanted) or any(b is not None and a != b for a, b in zip(found, wanted, strict=True)):
                text = ", ".join("any" if size is None else str(size) for size in wanted)
                raise BackendError(f"{self._component} gave {name} of shape {list(found)}; the bundle states [{text}]")
            if str(outputs[name].dtype) not in FLOATS:
                raise BackendError(f"{self._component} gave {name} as {outputs[name].dtype}; bundles have float32")


def _size(stated: int | str) -> Size:
    if isinstance(stated, int):
        return stated
    match = SIZE.fullmatch(stated)
    assert match is not None, "the manifest was checked"
    return match[2], int(match[1] or 1), int(match[3] or 1)


def _resolved(size: Size, sizes: Mapping[str, int]) -> int | None:
    """None: no input has that size."""
    if isinstance(size, int):
        return size
    name, times, by = size
    return -(-sizes[name] * times // by) if name in sizes else None
