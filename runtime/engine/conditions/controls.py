"""ControlNets of a request: what they are shown, how strongly, and when. `Controls` runs them for a batch of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepforge.runtime.arrays import Float32
from stepforge.runtime.backends import Arrays, Backend, Graph, SideCall
from stepforge.runtime.bundle import Bundle, Component, ComponentId
from stepforge.runtime.engine.conditions.hints import Hints
from stepforge.runtime.engine.state import Job
from stepforge.runtime.engine.trajectory import Batch
from stepforge.runtime.errors import RequestError
from stepforge.runtime.imaging.read import check_image
from stepforge.runtime.request import Control


def no_residuals(denoiser: Component) -> dict[str, Float32]:
    """The residual inputs of a denoiser when no row has a ControlNet: [1, C, 1, 1] zeros."""
    return {
        tensor.name: np.zeros((1, int(tensor.shape[1]), 1, 1), np.float32)
        for tensor in denoiser.inputs
        if tensor.name.startswith("residual_")
    }


@dataclass(frozen=True, slots=True)
class ControlUse:
    """One ControlNet in one row of a batch."""

    row: int
    name: str
    occurrence: int  # 0-based, when a row uses one ControlNet several times
    hint: Float32  # [C, h, w]
    scale: float
    guess_mode: bool


class Controls:
    """The ControlNets of a bundle; each is opened when it is first used. Only the engine's thread calls it."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self._bundle, self._backend = bundle, backend
        self._graphs: dict[ComponentId, Graph] = {}
        self._stacks: dict[tuple[str, int], tuple[list[Float32], Float32]] = {}
        self._hints = Hints(self._open)

    def check(self, controls: Sequence[Control]) -> None:
        """Raises RequestError if the bundle lacks one, or its image is none."""
        known = self._bundle.controls
        for control in controls:
            if control.name not in known:
                have = f"it has {', '.join(known)}" if known else "it was exported without any (--control NAME=DIR)"
                raise RequestError(f"the bundle has no ControlNet {control.name!r}; {have}")
            check_image(control.image)

    def cond_only(self, control: Control) -> bool:
        """Whether it runs in conditional rows only: in guess mode, which diffusers' pipelines turn on for pooled residuals."""
        return control.guess_mode or self._bundle.controls[control.name].global_pool

    def prepare(self, job: Job) -> None:
        """A job's hints: each ControlNet that some step uses has its hint encoder run on the image that it is shown."""
        leg = job.legs[0]
        hints, digests = [], []
        for index, control in enumerate(job.request.controls):
            job.go_on()
            if any(step.control[index] for step in leg.plan.steps):
                digest, hint, ran = self._hints.encoded(control, leg.size)
                job.count(ComponentId("control_hint", control.name).label, int(ran))
            else:
                digest, hint = self._hints.digest(control, leg.size), np.empty(0, np.float32)
            hints.append(hint)
            digests.append(digest)
        leg.hints, leg.hint_digests = hints, digests

    def calls(self, uses: Sequence[ControlUse], variant: str = "") -> list[SideCall]:
        """What runs for these uses. Each ControlNet is called once for all its rows, and again only for a second use in one
        row. variant: the denoiser's."""
        groups: dict[tuple[str, int], list[ControlUse]] = {}
        for use in uses:
            groups.setdefault((use.name, use.occurrence), []).append(use)
        calls = []
        for (name, occurrence), group in groups.items():
            component = ComponentId("control_residuals", name, variant)
            if component not in self._bundle.components:
                component = component.whole
            inputs = {
                "hint": self._stacked(name, occurrence, group),
                "scale": np.stack([self._scale(use) for use in group]),
            }
            rows = np.array([use.row for use in group], np.int32)
            calls.append(SideCall(component, self._open(component), rows, inputs))
        return calls

    def uses(self, batch: Batch) -> list[ControlUse]:
        """The ControlNets of all rows in their steps."""
        return [use for r in range(len(batch.rows)) for use in self._uses_of(batch, r)]

    def _uses_of(self, batch: Batch, r: int) -> list[ControlUse]:
        uses: list[ControlUse] = []
        row = batch.rows[r]
        job, step = row.trajectory.job, row.trajectory.step
        if row.trajectory.leg.stage:
            return uses  # ControlNets are the base model's
        for control, hint, scale in zip(job.request.controls, row.trajectory.leg.hints, step.control, strict=True):
            if scale and (row.is_cond or not self.cond_only(control)):
                occurrence = sum(use.name == control.name for use in uses)
                uses.append(ControlUse(r, control.name, occurrence, hint, scale, control.guess_mode))
        return uses

    def residuals(self, calls: Sequence[SideCall], inputs: Arrays, wanted: Sequence[str]) -> dict[str, Float32]:
        """Sum of the residuals of all calls for each row of `inputs`; nothing if there is none.

        inputs: what the denoiser reads, before residuals. wanted: the denoiser's residual inputs.
        """
        rows = len(inputs["sample"])
        totals: dict[str, Float32] = {}
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

    def _run(self, call: SideCall, inputs: Arrays) -> Mapping[str, Float32]:
        every = len(call.rows) == len(inputs["sample"])
        own: dict[str, NDArray[Any]] = dict(call.inputs)
        names = [tensor.name for tensor in self._bundle.components[call.component].inputs]
        for name in names:
            if name not in own:
                own[name] = inputs[name] if every else inputs[name][call.rows]
        return call.graph({name: own[name] for name in names})

    def _stacked(self, name: str, occurrence: int, group: Sequence[ControlUse]) -> Float32:
        """The hints of a call, [rows, C, h, w], some MB a row; the same array while the same hints come back."""
        hints = [use.hint for use in group]
        before, stacked = self._stacks.get((name, occurrence), ([], np.empty(0, np.float32)))
        if len(before) != len(hints) or any(a is not b for a, b in zip(before, hints, strict=True)):
            stacked = np.stack(hints)
            self._stacks[name, occurrence] = hints, stacked
        return stacked

    def _scale(self, use: ControlUse) -> Float32:
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
