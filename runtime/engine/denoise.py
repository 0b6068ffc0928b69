"""One tick's network calls: rows of many requests to predictions.

Every row carries its own latent, timestep, prompt, LoRA slot, ControlNets and, in a variant that reuses, its image's own kept
activations. ControlNets run first, for the rows that name them; their residuals are inputs of the denoiser.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepforge.runtime.backends import Arrays, Backend, Graph, LoopingGraph
from stepforge.runtime.bundle import Bundle, Component, ComponentId, Size
from stepforge.runtime.engine.adapters import Adapters, row_inputs
from stepforge.runtime.engine.controls import Controls, Use, no_residuals
from stepforge.runtime.engine.device_loop import Places, fits
from stepforge.runtime.engine.state import Job, Row, Slot
from stepforge.runtime.engine.text import Condition

Array = NDArray[np.float32]
KEPT = re.compile(r"deep|text_\d+")  # inputs of variants; text_embeds is SDXL's pooled prompt


class Denoisers:
    """The denoisers of a bundle with their ControlNets. A variant is opened when it is first used."""

    def __init__(self, bundle: Bundle, backend: Backend, adapters: Adapters) -> None:
        self._bundle, self._backend, self._adapters = bundle, backend, adapters
        self.controls = Controls(bundle, backend)
        self._graphs: dict[ComponentId, Graph] = {}
        for network in bundle.denoisers:
            self._open(network)
        self._packed: tuple[tuple[tuple[int, Size], ...], dict[str, Array], list[Condition]] | None = None
        self._sample: Array = np.empty(0, np.float32)
        self._loops: dict[tuple[ComponentId, tuple[int, int, int]], Places] = {}
        self._zeros = {key: no_residuals(entry) for key, entry in bundle.components.items()}

    def __call__(self, rows: Sequence[Row]) -> Array:
        """The raw predictions, [rows, C, h, w]; valid until the next call. All rows must be of one kind, see `engine._kind`."""
        step = rows[0].slot.step
        network = _network(rows[0].slot)
        entry = self._bundle.components[network]
        inputs = self._inputs(rows)
        if self._adapters.banks(network) is not None:
            inputs |= row_inputs([row.slot.job.bank_slot for row in rows], [row.slot.adapter_strength for row in rows])
        zeros, uses = self._zeros[network], self._uses(network, rows)
        calls = self.controls.calls(uses, step.reuse)
        inputs |= {**zeros, **self.controls.residuals(calls, inputs, list(zeros))}
        inputs |= _reused(rows, entry)
        known = {tensor.name for tensor in entry.inputs}
        graph = self._open(network)
        outputs = graph({key: value for key, value in inputs.items() if key in known} if known else inputs)
        _count(uses, rows, step.reuse)  # after the call: one that fails is repeated
        _keep(rows, outputs)
        return outputs["prediction"]

    def rings(self, job: Job) -> tuple[int, int] | None:
        """Latents and predictions of the loop that the job's steps can run in; None if they run here."""
        graph = self._open(ComponentId("denoiser", job.plan.steps[0].denoiser))
        return graph.rings if isinstance(graph, LoopingGraph) and fits(job, graph.rings) else None

    def step(self, rows: Sequence[Row]) -> None:
        """One whole step of the rows' slots in their loop."""
        slot = rows[0].slot
        network = _network(slot)
        uses = self._uses(network, rows)
        self._places(slot).step(rows, {**self._context(rows), **self._zeros[network]}, self.controls.calls(uses))
        _count(uses, rows, "")

    def read(self, slot: Slot) -> None:
        """Bring the state of a slot from its loop."""
        self._places(slot).read(slot)

    def _places(self, slot: Slot) -> Places:
        network = _network(slot)
        key = network, slot.shape
        if key not in self._loops:
            graph = self._open(network)
            assert isinstance(graph, LoopingGraph)
            self._loops[key] = Places(graph.loop(slot.shape), has_bank=self._adapters.banks(network) is not None)
        return self._loops[key]

    def _open(self, network: ComponentId) -> Graph:
        if network not in self._graphs:
            banks = self._adapters.banks(network)
            if banks is not None:
                banks = banks.only({tensor.name for tensor in self._bundle.components[network].inputs})
            self._graphs[network] = self._backend.open(network, banks)
        return self._graphs[network]

    def _inputs(self, rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
        shape = (len(rows), *rows[0].slot.shape)
        if self._sample.shape != shape:  # kept between ticks: a fresh array of some MB costs its page faults each time
            self._sample = np.empty(shape, np.float32)
        timestep = np.empty(len(rows), np.float32)
        for r, row in enumerate(rows):
            step = row.slot.step
            np.multiply(row.slot.x, np.float32(step.scale_in), out=self._sample[r].reshape(-1))
            timestep[r] = step.t
        return {"sample": self._sample, "timestep": timestep, **self._context(rows)}

    def _context(self, rows: Sequence[Row]) -> dict[str, Array]:
        """Prompt inputs of the rows; kept while the same rows come back, as they do on most steps."""
        key = tuple((id(row.condition), row.slot.job.size) for row in rows)
        if self._packed is not None and self._packed[0] == key:
            return self._packed[1]
        conditions = [row.condition for row in rows]
        inputs = {"encoder_hidden_states": np.stack([condition.context for condition in conditions])}
        if conditions[0].pooled is not None:
            inputs["text_embeds"] = np.stack([c.pooled for c in conditions if c.pooled is not None])
            sizes = [(row.slot.job.size.height, row.slot.job.size.width) for row in rows]
            inputs["time_ids"] = np.array([[h, w, 0, 0, h, w] for h, w in sizes], np.float32)
        self._packed = (key, inputs, conditions)  # holds the conditions, so that ids stay theirs
        return inputs

    def _uses(self, network: ComponentId, rows: Sequence[Row]) -> list[Use]:
        """The ControlNets of all rows, if the network takes residuals."""
        return [use for r, row in enumerate(rows) for use in self._uses_of(r, row)] if self._zeros[network] else []

    def _uses_of(self, r: int, row: Row) -> list[Use]:
        """The ControlNets of one row in its step."""
        uses: list[Use] = []
        job = row.slot.job
        for control, hint, scale in zip(job.request.controls, job.hints, row.slot.step.control, strict=True):
            if scale and (row.is_cond or not self.controls.cond_only(control)):
                turn = sum(use.name == control.name for use in uses)
                uses.append(Use(r, control.name, turn, hint, scale, control.guess_mode))
        return uses


def _network(slot: Slot) -> ComponentId:
    """What the slot's next step runs."""
    return ComponentId("denoiser", slot.step.denoiser, slot.step.reuse)


def _count(uses: Sequence[Use], rows: Sequence[Row], variant: str) -> None:
    for use in uses:
        counted = rows[use.row].slot.job.rows
        label = ComponentId("control_residuals", use.name, variant if variant == "deepcache" else "").label
        counted[label] = counted.get(label, 0) + 1


def _reused(rows: Sequence[Row], entry: Component) -> dict[str, Array]:
    """Kept activations of the rows' images as inputs of a variant."""
    names = [t.name for t in entry.inputs if KEPT.fullmatch(t.name)]
    if not names:
        return {}
    roles: dict[Slot, list[bool]] = {}
    for row in rows:
        roles.setdefault(row.slot, []).append(row.is_cond)
    inputs = {}
    for name in names:
        blocks = [slot.recall(name, wanted) for slot, wanted in roles.items()]
        inputs[name] = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
    return inputs


def _keep(rows: Sequence[Row], outputs: Arrays) -> None:
    """Let each image keep what its later steps will reuse of this one."""
    first = 0
    while first < len(rows):
        slot = rows[first].slot
        last = first + sum(row.slot is slot for row in rows[first : first + 2])
        for what in slot.job.recordings[slot.k]:
            roles = [row.is_cond for row in rows[first:last]]
            for name, value in outputs.items():
                if name == what or (what == "text" and name.startswith("text_")):
                    slot.remember(name, roles, value[first:last])
        first = last
