"""Images whose whole steps run in the backend: which requests qualify, where each image stands, what a step is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepforge.runtime.backends import Arrays, Loop, SideCall, StepTable
from stepforge.runtime.engine.state import Job, Row, Slot
from stepforge.runtime.plan.guiders import Guider

Array = NDArray[np.float32]


def fits(job: Job, rings: tuple[int, int]) -> bool:
    """Whether a job's plan is a table and nothing else: linear guidance of one network, without reuse."""
    steps = job.plan.steps
    return (
        job.guider == Guider()
        and len({step.denoiser for step in steps}) == 1
        and not any(step.reuse for step in steps)
        and max(len(step.keep) for step in steps) <= rings[0]
        and max(len(step.gain) for step in steps) <= rings[1]
    )


def step_table(slot: Slot) -> StepTable:
    steps = slot.job.plan.steps
    adapters = slot.job.adapters
    strength = 0.0 if adapters is None else adapters.strength

    def column(values: Sequence[Any]) -> Array:
        return np.array(values, np.float32)

    return StepTable(
        t=column([step.t for step in steps]),
        scale_in=column([*(step.scale_in for step in steps), 1.0]),
        guidance=column([(step.guidance, 1.0 - step.guidance) for step in steps]),
        table=slot.table,
        adapter_strength=column([strength * step.adapters for step in steps]),
    )


class Places:
    """The images of one loop, by place; those of ended requests make room. has_bank: the network takes LoRA slots."""

    def __init__(self, loop: Loop, *, has_bank: bool) -> None:
        self.loop, self._has_bank = loop, has_bank
        self._images: list[Slot | None] = []
        self._last: tuple[tuple[Slot, bool], ...] = ()
        self._told: tuple[Any, ...] = ()

    def step(self, rows: Sequence[Row], inputs: Arrays, sides: Sequence[SideCall]) -> None:
        """One step of the images that the rows belong to; all their rows are there."""
        key = tuple((row.slot, row.is_cond) for row in rows)
        if key != self._last:
            self._told, self._last = self._tell(rows), key
        places, sources, owners, adapter = self._told
        noise = {self._place(row.slot): z for row in rows if (z := row.slot.draw()) is not None}
        self.loop.step(places, sources, owners, {**inputs, **adapter}, noise, sides)

    def read(self, slot: Slot) -> None:
        """Bring an image's state to the host."""
        slot.state[:-1] = self.loop.get(self._place(slot))

    def _tell(self, rows: Sequence[Row]) -> tuple[Any, ...]:
        slots = list(dict.fromkeys(row.slot for row in rows))
        for slot in slots:
            if slot not in self._images:
                self._put(slot)
        sources = np.zeros((len(slots), 2), np.int32)
        for r, row in enumerate(rows):
            sources[slots.index(row.slot), 0 if row.is_cond else 1] = r
        owners = np.array([self._place(row.slot) for row in rows], np.int32)
        adapter: Mapping[str, NDArray[np.int64]] = {}
        if self._has_bank:
            adapter = {"adapter": np.array([row.slot.job.bank_slot for row in rows], np.int64)}
        return np.array([self._place(slot) for slot in slots], np.int32), sources, owners, adapter

    def _place(self, slot: Slot) -> int:
        return self._images.index(slot)

    def _put(self, slot: Slot) -> None:
        ended = [place for place, image in enumerate(self._images) if image is None or image.has_ended]
        if not ended:
            self._images.append(None)
        place = ended[0] if ended else len(self._images) - 1
        self.loop.put(place, slot.state[:-1], step_table(slot))
        self._images[place] = slot
