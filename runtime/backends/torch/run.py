"""Runs a program, node by node. On the CPU that is all; `cuda` records it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepforge.runtime.backends.torch.ops import function
from stepforge.runtime.backends.torch.program import Program

Value = Any  # torch.Tensor, np.ndarray


class Runner:
    """A program with its operators looked up. Raises BackendError if it has one that is unknown."""

    def __init__(self, program: Program) -> None:
        self.program = program
        last = {name: index for index, node in enumerate(program.nodes) for name in node.inputs}
        kept = {"", *program.constants, *program.inputs, *program.outputs}
        self._steps = []
        for index, node in enumerate(program.nodes):
            done = {name for name in node.inputs if last[name] == index} - kept
            # outputs of Split that nobody reads are let go at once
            done |= {name for name in node.outputs if name not in last} - kept
            self._steps.append((node, function(node), tuple(done)))

    def __call__(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        """Named tensors in, named tensors out."""
        values: dict[str, Value] = {"": None, **self.program.constants, **inputs}
        for node, compute, done in self._steps:
            result = compute(*[values[name] for name in node.inputs])
            if len(node.outputs) == 1:
                values[node.outputs[0]] = result
            else:
                values.update(zip(node.outputs, result, strict=True))
            for name in done:
                del values[name]
        return {name: values[name] for name in self.program.outputs}
