"""ControlNets of a request: what they are shown, how strongly, and when. `Controls` runs them for a batch of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepforge.runtime.backends import Arrays, Backend, Graph, SideCall
from stepforge.runtime.bundle import Bundle, Component, ComponentId
from stepforge.runtime.errors import RequestError
from stepforge.runtime.request import Control

Array = NDArray[np.float32]


def no_residuals(denoiser: Component) -> dict[str, Array]:
    """The residual inputs of a denoiser when no row has a ControlNet: [1, C, 1, 1] zeros."""
    return {
        tensor.name: np.zeros((1, int(tensor.shape[1]), 1, 1), np.float32)
        for tensor in denoiser.inputs
        if tensor.name.startswith("residual_")
    }


@dataclass(frozen=True, slots=True)
class Use:
    """One ControlNet in one row of a batch."""

    row: int
    name: str
    turn: int  # of those of this name in the row
    hint: Array  # [C, h, w]
    scale: float
    guess_mode: bool


class Controls:
    """The ControlNets of a bundle; each is opened when it is first used. Only the engine's thread calls it."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self._bundle, self._backend = bundle, backend
        self._graphs: dict[ComponentId, Graph] = {}
        self._hints: dict[tuple[str, int], tuple[list[Array], Array]] = {}

    def check(self, names: Sequence[str]) -> None:
        """Raises RequestError if the bundle lacks one."""
        known = self._bundle.controls
        for name in names:
            if name not in known:
                have = f"it has {', '.join(known)}" if known else "it was exported without any (--control NAME=DIR)"
                raise RequestError(f"the bundle has no ControlNet {name!r}; {have}")

    def cond_only(self, control: Control) -> bool:
        """Whether it runs in conditional rows only: in guess mode, which diffusers' pipelines turn on for pooled residuals."""
        return control.guess_mode or self._bundle.controls[control.name].global_pool

    def hint(self, name: str, image: Array) -> Array:
        """An image [3, height, width] in 0..1 through the hint encoder: [C, h, w]. Runs once for a request."""
        return np.array(self._open(ComponentId("control_hint", name))({"image": image[None]})["hint"][0])

    def calls(self, uses: Sequence[Use], variant: str = "") -> list[SideCall]:
        """What runs for these uses. Each ControlNet is called once for all its rows, and again only for a second use in one
        row. variant: the denoiser's."""
        groups: dict[tuple[str, int], list[Use]] = {}
        for use in uses:
            groups.setdefault((use.name, use.turn), []).append(use)
        calls = []
        for (name, turn), group in groups.items():
            component = ComponentId("control_residuals", name, variant)
            if component not in self._bundle.components:
                component = component.whole
            inputs = {"hint": self._stacked(name, turn, group), "scale": np.stack([self._scale(use) for use in group])}
            rows = np.array([use.row for use in group], np.int32)
            calls.append(SideCall(component, self._open(component), rows, inputs))
        return calls

    def residuals(self, calls: Sequence[SideCall], inputs: Arrays, wanted: Sequence[str]) -> dict[str, Array]:
        """Sum of the residuals of all calls for each row of `inputs`; nothing if there is none.

        inputs: what the denoiser reads, before residuals. wanted: the denoiser's residual inputs.
        """
        rows = len(inputs["sample"])
        totals: dict[str, Array] = {}
        for call in calls:
            outputs = self._run(call, inputs)
            picked = call.rows
            for residual in wanted:
                value = outputs[residual]
                if len(calls) == 1 and len(picked) == rows:
                    totals[residual] = value
                    continue
                if residual not in totals:
                    totals[residual] = np.zeros((rows, *value.shape[1:]), np.float32)
                elif totals[residual].shape[2:] != value.shape[2:]:  # one of the two is pooled
                    shape = np.broadcast_shapes(totals[residual].shape[1:], value.shape[1:])
                    totals[residual] = np.array(np.broadcast_to(totals[residual], (rows, *shape)))
                totals[residual][picked] += value
        return totals

    def _run(self, call: SideCall, inputs: Arrays) -> Mapping[str, Array]:
        every = len(call.rows) == len(inputs["sample"])
        own: dict[str, NDArray[Any]] = dict(call.inputs)
        names = [tensor.name for tensor in self._bundle.components[call.component].inputs]
        for name in names:
            if name not in own:
                own[name] = inputs[name] if every else inputs[name][call.rows]
        return call.graph({name: own[name] for name in names})

    def _stacked(self, name: str, turn: int, group: Sequence[Use]) -> Array:
        """The hints of a call, [rows, C, h, w], some MB a row; the same array while the same hints come back."""
        hints = [use.hint for use in group]
        before, stacked = self._hints.get((name, turn), ([], np.empty(0, np.float32)))
        if len(before) != len(hints) or any(a is not b for a, b in zip(before, hints, strict=True)):
            stacked = np.stack(hints)
            self._hints[name, turn] = hints, stacked
        return stacked

    def _scale(self, use: Use) -> Array:
        """Strength of each residual; guess mode weakens the shallow ones, see diffusers' ControlNetModel.forward."""
        entry = self._bundle.components[ComponentId("control_residuals", use.name)]
        (count,) = (t.shape[1] for t in entry.inputs if t.name == "scale")
        if use.guess_mode and not self._bundle.controls[use.name].global_pool:
            return (np.logspace(-1, 0, int(count)) * use.scale).astype(np.float32)
        return np.full(int(count), use.scale, np.float32)

    def _open(self, component: ComponentId) -> Graph:
        if component not in self._graphs:
            self._graphs[component] = self._backend.open(component)
        return self._graphs[component]
