"""What the engine keeps of a request while it runs: a `Job`, a `Slot` for each of its images, and a slot's `Row`s."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stepforge.runtime.bundle import Size
from stepforge.runtime.engine.adapters import NONE, AdapterSet
from stepforge.runtime.engine.noise import Generator
from stepforge.runtime.engine.text import Condition
from stepforge.runtime.plan import Plan, Step
from stepforge.runtime.plan.guiders import parse as parse_guider
from stepforge.runtime.plan.reuse import recordings
from stepforge.runtime.request import Progress, Request, Result

Array = NDArray[np.float32]
OnStep = Callable[[Progress], None]


class Job:
    """A submitted request and what has become of it so far."""

    def __init__(
        self,
        request: Request,
        plan: Plan,
        size: Size,
        on_step: OnStep | None,
        adapters: AdapterSet | None = None,
        hint_images: Sequence[Array] = (),
    ) -> None:
        self.request, self.plan, self.size, self.on_step, self.adapters = request, plan, size, on_step, adapters
        self.hint_images = hint_images  # one for each ControlNet, [3, height, width] in 0..1
        self.hints: list[Array] = []  # of the hint encoders, made when the job starts
        self.recordings = recordings(plan.steps)
        self.guider = parse_guider(request.guider)
        self.bank_slot = NONE  # where the adapters stand while the job runs
        self.future: Future[Result] = Future()
        self.cond: Condition | None = None
        self.uncond: Condition | None = None
        self.pending = request.images  # images not decoded yet
        self.latents: list[Array | None] = [None] * request.images
        self.pixels: list[NDArray[np.uint8] | None] = [None] * request.images
        self.rows: dict[str, int] = {}
        self.seconds = {"prompt": 0.0, "denoise": 0.0, "decode": 0.0}
        self.calls = 0
        self.submitted = time.perf_counter()
        self._lock = threading.Lock()  # the decoder's thread and the engine's may both settle a job

    @property
    def is_over(self) -> bool:
        """Cancelled by the caller, or failed: its remaining work is dropped."""
        return self.future.done()

    def settle(self, outcome: Result | BaseException) -> None:
        """Give the caller the first outcome; later ones, and those of a cancelled request, are dropped."""
        with self._lock:
            if self.future.done() or not self.future.set_running_or_notify_cancel():
                return
            if isinstance(outcome, BaseException):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)


class Slot:
    """One image of a job on its way through the plan.

    `state` holds the latents and predictions of the plan's window as rows of one matrix, in ring order, and fresh noise
    in its last row; `table[k]` is step k's keep, gain and noise in that order. So each update is one product.

    rings: the latents and predictions of a backend's loop, in which the image's steps then run whole; `state` is behind
    until it is read from there.
    """

    def __init__(self, job: Job, index: int, shape: tuple[int, int, int], rings: tuple[int, int] | None = None) -> None:
        self.job, self.index, self.shape = job, index, shape
        self.k = 0
        self.in_loop = rings is not None
        plan = job.plan
        self.num_x, self.num_p = rings or (
            max(len(step.keep) for step in plan.steps),
            max(len(step.gain) for step in plan.steps),
        )
        self.table = np.zeros((len(plan.steps), self.num_x + self.num_p + 1), np.float32)
        for k, step in enumerate(plan.steps):
            for i, coefficient in enumerate(step.keep):
                self.table[k, (k - i) % self.num_x] = coefficient
            for j, coefficient in enumerate(step.gain):
                self.table[k, self.num_x + (k - j) % self.num_p] = coefficient
            self.table[k, -1] = step.noise
        self.guide = job.guider.start()
        self._kept: dict[str, tuple[list[bool], Array]] = {}
        self._means: dict[str, Array] = {}
        self.generator = Generator(job.request.seed + index)
        self._drawn = -1  # the evaluation that the noise in `state` is for
        self.state = np.zeros((self.table.shape[1], math.prod(shape)), np.float32)
        self.state[0] = plan.init_noise * self.generator.normal(shape).reshape(-1)

    @property
    def step(self) -> Step:
        """The row of the plan that comes next."""
        return self.job.plan.steps[self.k]

    @property
    def weight(self) -> float:
        """The guidance weight of the next step: the plan's, unless the guider has found that 1 will do."""
        return self.guide.weight(self.step)

    @property
    def adapter_strength(self) -> float:
        """Of the next step's rows."""
        adapters = self.job.adapters
        return 0.0 if adapters is None else adapters.strength * self.step.adapters

    def remember(self, name: str, roles: list[bool], values: Array) -> None:
        """Keep a copy of activations, [rows, ...], for later steps; roles: whether each row is the conditional one."""
        self._kept[name] = (roles, values.copy())
        self._means.pop(name, None)

    def recall(self, name: str, roles: list[bool]) -> Array:
        """Kept activations of the rows that a step runs.

        A step that runs one row of two kept ones takes the mean of cross-attention, as T-GATE does (arXiv:2404.02747), and its
        own row of deep features.
        """
        kept, values = self._kept[name]
        if kept == roles:
            return values
        if name.startswith("text_"):
            if name not in self._means:
                self._means[name] = values.mean(axis=0, keepdims=True, dtype=np.float32)
            return self._means[name]
        return values[[kept.index(role) for role in roles]]

    @property
    def is_done(self) -> bool:
        return self.k == len(self.table)

    @property
    def has_ended(self) -> bool:
        return self.is_done or self.job.is_over

    @property
    def x(self) -> Array:
        """The current latent, flat."""
        latent: Array = self.state[self.k % self.num_x]
        return latent

    @property
    def p(self) -> Array:
        """Where the current step's guided prediction goes, flat."""
        prediction: Array = self.state[self.num_x + self.k % self.num_p]
        return prediction

    def draw(self) -> Array | None:
        """The next step's fresh noise, flat, if it wants any; the same if asked again."""
        if not self.table[self.k, -1]:
            return None
        if self._drawn != self.k:
            self.state[-1], self._drawn = self.generator.normal(self.shape).reshape(-1), self.k
        noise: Array = self.state[-1]
        return noise

    def advance(self) -> None:
        """x_{k+1} = Σ keep·x + Σ gain·p + noise·z."""
        self.draw()
        latent = self.table[self.k] @ self.state
        self.k += 1
        self.x[:] = latent


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a network call. A slot's rows stand together, the conditional one first."""

    slot: Slot
    condition: Condition
    is_cond: bool


def rows_of_slot(slot: Slot) -> list[Row]:
    """The rows that the slot's next evaluation needs."""
    job, w = slot.job, slot.weight
    wanted = ((job.cond, True, w != 0.0), (job.uncond, False, w != 1.0))
    return [Row(slot, condition, is_cond) for condition, is_cond, use in wanted if use and condition is not None]
