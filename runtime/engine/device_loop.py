"""Images whose whole steps run in the backend: which requests qualify, where each image lies, what a step is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stepforge.runtime.arrays import Float32
from stepforge.runtime.backends import Arrays, Loop, NetworkCall, SideCall, StepTable
from stepforge.runtime.engine.trajectory import Batch, Trajectory
from stepforge.runtime.plan import Plan
from stepforge.runtime.plan.guiders import Guider


def can_run_on_device(plan: Plan, rings: tuple[int, int], *, all_plans: bool = False) -> bool:
    """Whether a plan is a table and nothing else: plain guidance of one network. all_plans: or of several, with any guider but
    an adaptive one, which decides by what it sees which rows run."""
    steps = plan.steps
    plain = (
        plan.guider == Guider()
        and len({step.denoiser for step in steps}) == 1
        and not any(step.reuse for step in steps)
    )
    return (
        (plain or (all_plans and plan.guider.adaptive is None))
        and not any(step.threshold or step.variance for step in steps)
        and max(len(step.keep) for step in steps) <= rings[0]
        and max(len(step.gain) for step in steps) <= rings[1]
    )


def step_table(trajectory: Trajectory) -> StepTable:
    steps, guider = trajectory.leg.plan.steps, trajectory.leg.guider
    adapters = trajectory.job.adapters
    strength = 0.0 if adapters is None else adapters.strength

    def column(values: Sequence[Any]) -> Float32:
        return np.array(values, np.float32)

    return StepTable(
        t=column([step.t for step in steps]),
        scale_in=column([*(step.scale_in for step in steps), 1.0]),
        guidance=column([(0, 0) if guider.is_zeroed(step) else (step.guidance, 1.0 - step.guidance) for step in steps]),
        table=trajectory.table,
        adapter_strength=column([strength * step.adapters for step in steps]),
        guider=guider,
        denoised=np.array(
            [step.denoised if np.isfinite(step.denoised).all() else (0, 0) for step in steps], np.float64
        ),
    )


class DevicePool:
    """The images of one loop, by place; those of ended requests make room."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self._images: list[Trajectory] = []
        self._last: tuple[tuple[Trajectory, bool], ...] = ()
        self._told: tuple[Any, ...] = ()

    @property
    def is_idle(self) -> bool:
        """No image of the pool has steps left."""
        return all(image.has_ended for image in self._images)

    def step(
        self, batch: Batch, inputs: Arrays, sides: Sequence[SideCall], call: NetworkCall | None, *, has_bank: bool
    ) -> None:
        """One step of the batch's images. has_bank: the network takes LoRA slots."""
        key = tuple((row.trajectory, row.is_cond) for row in batch.rows)
        if key != self._last:
            self._told, self._last = self._tell(batch), key
        places, sources, owners, slots = self._told
        adapter = {"adapter": slots} if has_bank else {}
        noise = {self._place(image): z for image in batch.trajectories if (z := image.draw()) is not None}
        self.loop.step(places, sources, owners, {**inputs, **adapter}, noise, sides, call)

    def read(self, image: Trajectory) -> None:
        """Bring an image's state to the host."""
        image.state[:-1] = self.loop.get(self._place(image))

    def _tell(self, batch: Batch) -> tuple[Any, ...]:
        for image in batch.trajectories:
            if image not in self._images:
                self._put(image)
        sources = np.zeros((len(batch.trajectories), 2), np.int32)
        for i, span in enumerate(batch.spans):
            for r in range(span.start, span.stop):
                sources[i, 0 if batch.rows[r].is_cond else 1] = r
        places = np.array([self._place(image) for image in batch.trajectories], np.int32)
        counts = [span.stop - span.start for span in batch.spans]
        slots = np.array([row.trajectory.job.bank_slot for row in batch.rows], np.int64)
        return places, sources, np.repeat(places, counts), slots

    def _place(self, image: Trajectory) -> int:
        return self._images.index(image)

    def _put(self, image: Trajectory) -> None:
        place = next((place for place, other in enumerate(self._images) if other.has_ended), len(self._images))
        self.loop.put(place, image.state[:-1], step_table(image))
        self._images[place : place + 1] = [image]
