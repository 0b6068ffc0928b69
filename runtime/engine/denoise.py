"""One tick's network calls: rows of many requests to predictions.

Every row carries its own latent, timestep, prompt, LoRA slot, ControlNets and, in a variant that reuses, its image's own kept
activations. ControlNets run first, for the rows that name them; their residuals are inputs of the denoiser.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepforge.runtime.arrays import Float32
from stepforge.runtime.backends import Arrays, Backend, Graph, Kept, LoopingGraph, NetworkCall
from stepforge.runtime.bundle import Bundle, Component, ComponentId, Tensor
from stepforge.runtime.engine.adapters import Adapters, row_inputs
from stepforge.runtime.engine.conditions.controls import Controls, ControlUse, no_residuals
from stepforge.runtime.engine.conditions.text import Condition
from stepforge.runtime.engine.device_loop import DevicePool, can_run_on_device
from stepforge.runtime.engine.state import Leg
from stepforge.runtime.engine.trajectory import Batch, Row, Trajectory

KEPT = re.compile(r"deep|text_\d+")  # inputs of variants; text_embeds is SDXL's pooled prompt
KINDS = ("deep", "text")
MOST_POOLS = 8  # networks times latent shapes whose images a device holds; idle ones go first


class Denoisers:
    """The denoisers of a bundle with their ControlNets. A variant is opened when it is first used."""

    def __init__(self, bundle: Bundle, backend: Backend, adapters: Adapters) -> None:
        self._bundle, self._backend, self._adapters = bundle, backend, adapters
        self.controls = Controls(bundle, backend)
        self._graphs: dict[ComponentId, Graph] = {}
        for network in bundle.denoisers:
            self._open(network)
        self._packed: tuple[tuple[Any, ...], dict[str, Float32], list[Condition]] | None = None
        self._sample: Float32 = np.empty(0, np.float32)
        self._pools: OrderedDict[tuple[str, str, tuple[int, int, int]], DevicePool] = OrderedDict()
        self._zeros = {key: no_residuals(entry) for key, entry in bundle.components.items()}

    def __call__(self, batch: Batch) -> Float32:
        """The raw predictions, [rows, C, h, w]; valid until the next call."""
        rows = batch.rows
        network = batch.network
        entry = self._bundle.components[network]
        inputs = self._inputs(rows)
        if self._adapters.banks(network) is not None:
            strengths = [row.trajectory.adapter_strength for row in rows]
            inputs |= row_inputs([row.trajectory.job.bank_slot for row in rows], strengths)
        zeros = self._zeros[network]
        uses = self.controls.uses(batch) if zeros else []
        calls = self.controls.calls(uses, network.variant)
        inputs |= {**zeros, **self.controls.residuals(calls, inputs, list(zeros))}
        inputs |= _reused(batch, entry)
        known = {tensor.name for tensor in entry.inputs}
        graph = self._open(network)
        outputs = graph({key: value for key, value in inputs.items() if key in known} if known else inputs)
        _count(uses, rows, network.variant)  # after the call: one that fails is repeated
        _keep(batch, outputs)
        return outputs["prediction"]

    def rings(self, leg: Leg) -> tuple[int, int] | None:
        """Latents and predictions of the loop that the leg's steps can run in; None if they run here."""
        names = dict.fromkeys(step.denoiser for step in leg.plan.steps)
        networks = [ComponentId("denoiser", name, stage=leg.stage) for name in names]
        graph = self._open(networks[0])
        entries = [self._bundle.components[network] for network in networks]
        tensors = [tensor for entry in entries for tensor in (*entry.inputs, *entry.outputs)]
        ends = {tensor.shape[1:2] for tensor in tensors if tensor.name in ("sample", "prediction")}
        if not isinstance(graph, LoopingGraph) or len(ends) > 1:  # loops know latents in and latents out
            return None
        return graph.rings if can_run_on_device(leg.plan, graph.rings, all_plans=graph.runs_plans) else None

    def step(self, batch: Batch) -> None:
        """One whole step of the batch's images in their loop."""
        network = batch.network
        zeros = self._zeros[network]
        uses = self.controls.uses(batch) if zeros else []
        inputs = {**self._context(batch.rows), **zeros}
        sides = self.controls.calls(uses, network.variant)
        call = self._network_call(batch) if self._runs_plans(network) else None
        has_bank = self._adapters.banks(network) is not None
        self._pool(batch.trajectories[0]).step(batch, inputs, sides, call, has_bank=has_bank)
        _count(uses, batch.rows, network.variant)
        for trajectory, span in zip(batch.trajectories, batch.spans, strict=True):
            for what in trajectory.leg.recordings[trajectory.k]:
                trajectory.kept_roles[what] = [row.is_cond for row in batch.rows[span]]

    def _network_call(self, batch: Batch) -> NetworkCall:
        """What a step in a loop runs, keeps and reads; as `_keep` and `_reused` do on the host."""
        entry = self._bundle.components[batch.network]
        images = [
            (trajectory, span.stop - span.start)
            for trajectory, span in zip(batch.trajectories, batch.spans, strict=True)
        ]
        keep = []
        for what in sorted({what for trajectory, _ in images for what in trajectory.leg.recordings[trajectory.k]}):
            own = [what in trajectory.leg.recordings[trajectory.k] for trajectory, _ in images]
            keep.append(Kept(_kept(entry.outputs, what), np.repeat(own, [count for _, count in images])))
        read = []
        for what in KINDS:
            if names := _kept(entry.inputs, what):
                mean = [what == "text" and len(trajectory.kept_roles[what]) > count for trajectory, count in images]
                read.append(Kept(names, np.repeat(mean, [count for _, count in images])))
        roles = np.array([not row.is_cond for row in batch.rows], np.int32)
        return NetworkCall(batch.network, self._open(batch.network), roles, keep, read)

    def read(self, trajectory: Trajectory) -> None:
        """Bring the state of an image from its loop."""
        self._pool(trajectory).read(trajectory)

    def _pool(self, trajectory: Trajectory) -> DevicePool:
        leg = trajectory.leg
        network = ComponentId("denoiser", leg.plan.steps[0].denoiser, stage=leg.stage)
        key = leg.stage, "" if self._runs_plans(network) else network.name, trajectory.shape
        if key not in self._pools:
            graph = self._open(network)
            assert isinstance(graph, LoopingGraph)
            idle = [other for other, pool in self._pools.items() if pool.is_idle]
            for other in idle[: max(0, len(self._pools) + 1 - MOST_POOLS)]:
                del self._pools[other]
            self._pools[key] = DevicePool(graph.loop(trajectory.shape))
        self._pools.move_to_end(key)
        return self._pools[key]

    def _runs_plans(self, network: ComponentId) -> bool:
        graph = self._open(network)
        return isinstance(graph, LoopingGraph) and graph.runs_plans

    def _open(self, network: ComponentId) -> Graph:
        if network not in self._graphs:
            banks = self._adapters.banks(network)
            if banks is not None:
                banks = banks.only({tensor.name for tensor in self._bundle.components[network].inputs})
            self._graphs[network] = self._backend.open(network, banks)
        return self._graphs[network]

    def _inputs(self, rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
        first = rows[0].trajectory
        channels, *sides = first.shape
        beside = 0 if first.begin.concat is None else len(first.begin.concat)
        shape = (len(rows), channels + beside, *sides)
        if self._sample.shape != shape:  # kept between ticks: a fresh array of some MB costs its page faults each time
            self._sample = np.empty(shape, np.float32)
        timestep = np.empty(len(rows), np.float32)
        for r, row in enumerate(rows):
            step, begin = row.trajectory.step, row.trajectory.begin
            np.multiply(row.trajectory.x, np.float32(step.scale_in), out=self._sample[r, :channels].reshape(-1))
            if begin.concat is not None:
                self._sample[r, channels:] = begin.concat
            timestep[r] = step.t
        further = {name: np.stack([row.trajectory.begin.inputs[name] for row in rows]) for name in first.begin.inputs}
        return {"sample": self._sample, "timestep": timestep, **further, **self._context(rows)}

    def _time_ids(self, row: Row) -> tuple[float, ...]:
        """SDXL's sizes, crop and, for an expert that reads it, aesthetic score."""
        trajectory = row.trajectory
        size = trajectory.leg.size.height, trajectory.leg.size.width
        expert = None if trajectory.leg.stage else self._bundle.experts.get(trajectory.step.denoiser)
        aesthetic = expert is not None and expert.aesthetic
        return trajectory.job.request.micro.numbers(size, is_cond=row.is_cond, aesthetic=aesthetic)

    def _context(self, rows: Sequence[Row]) -> dict[str, Float32]:
        """Prompt inputs of the rows; kept while the same rows come back, as they do on most steps."""
        key = tuple(
            (id(row.condition), row.trajectory.leg.size, row.is_cond, row.trajectory.job.request.micro) for row in rows
        )
        if self._packed is not None and self._packed[0] == key:
            return self._packed[1]
        conditions = [row.condition for row in rows]
        inputs = {}
        if conditions[0].context.size:
            inputs["encoder_hidden_states"] = np.stack([condition.context for condition in conditions])
        if conditions[0].pooled is not None:
            inputs["text_embeds"] = np.stack([c.pooled for c in conditions if c.pooled is not None])
            inputs["time_ids"] = np.array([self._time_ids(row) for row in rows], np.float32)
        self._packed = (key, inputs, conditions)  # holds the conditions, so that ids stay theirs
        return inputs


def _count(uses: Sequence[ControlUse], rows: Sequence[Row], variant: str) -> None:
    for use in uses:
        label = ComponentId("control_residuals", use.name, variant if variant == "deepcache" else "").label
        rows[use.row].trajectory.job.count(label, 1)


def _kept(tensors: Sequence[Tensor], what: str) -> tuple[str, ...]:
    """Tensors of a kind of what is kept."""
    return tuple(t.name for t in tensors if KEPT.fullmatch(t.name) and t.name.startswith(what))


def _reused(batch: Batch, entry: Component) -> dict[str, Float32]:
    """Kept activations of the rows' images as inputs of a variant."""
    inputs = {}
    for name in (t.name for t in entry.inputs if KEPT.fullmatch(t.name)):
        blocks = [
            trajectory.recall(name, [row.is_cond for row in batch.rows[span]])
            for trajectory, span in zip(batch.trajectories, batch.spans, strict=True)
        ]
        inputs[name] = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
    return inputs


def _keep(batch: Batch, outputs: Arrays) -> None:
    """Let each image keep what its later steps will reuse of this one."""
    for trajectory, span in zip(batch.trajectories, batch.spans, strict=True):
        roles = [row.is_cond for row in batch.rows[span]]
        for what in trajectory.leg.recordings[trajectory.k]:
            for name, value in outputs.items():
                if name == what or (what == "text" and name.startswith("text_")):
                    trajectory.remember(name, roles, value[span])
