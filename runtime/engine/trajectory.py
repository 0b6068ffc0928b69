"""What the networks work on: a `Trajectory` is one image on its way through a leg, a `Batch` one network call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stepforge.runtime.arrays import Float32
from stepforge.runtime.bundle import ComponentId
from stepforge.runtime.engine.conditions.text import Condition
from stepforge.runtime.engine.noise import Generator
from stepforge.runtime.engine.state import Job, Leg
from stepforge.runtime.plan import Step
from stepforge.runtime.plan.sampling.limits import deviation, limited


class Kind(NamedTuple):
    """Trajectories of one kind can share a network call."""

    network: ComponentId
    on_device: bool
    shape: tuple[int, int, int]
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """What inpainting puts back after each step."""

    mask: Float32  # 1 where the image is drawn anew, [1, h, w]
    latents: Float32  # [C, h, w]
    noise: Float32  # [C, h, w], the same in all steps

    def put_back(self, x: Float32, level: tuple[float, float]) -> Float32:
        """Latents whose known part is alpha·latents + sigma·noise."""
        alpha, sigma = map(np.float32, level)
        known = alpha * self.latents + sigma * self.noise if sigma else self.latents
        blended: Float32 = (1 - self.mask) * known + self.mask * x.reshape(known.shape)
        return blended.reshape(-1)


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """What the first step of an image is given."""

    x: Float32  # first latents, [C, h, w]
    generator: Generator  # its stream goes on with the steps' noise
    concat: Float32 | None = None  # [C', h, w], beside the scaled latents in the network's `sample`
    inputs: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # of each of its rows in a network call
    known: Known | None = None

    @property
    def is_plain(self) -> bool:
        """Whether nothing but the first latents sets it apart; loops of backends know no more."""
        return self.concat is None and not self.inputs and self.known is None


class Trajectory:
    """One image of a job on its way through the plan of a leg.

    `state` holds the latents and predictions of the plan's window as rows of one matrix, in ring order, and fresh noise
    in its last row; `table[k]` is step k's keep, gain and noise in that order. So each update is one product.

    rings: the latents and predictions of a backend's loop, in which the image's steps then run whole; `state` is behind
    until it is read from there.
    """

    def __init__(self, job: Job, index: int, leg: Leg, start: Start, rings: tuple[int, int] | None = None) -> None:
        self.job, self.index, self.leg, self.begin = job, index, leg, start
        self.shape: tuple[int, int, int] = start.x.shape
        self.k = 0
        self.on_device = rings is not None
        plan = leg.plan
        # two latents at least: the one before an update stays readable after it
        self.num_x, self.num_p = rings or (
            max(2, *(len(step.keep) for step in plan.steps)),
            max(len(step.gain) for step in plan.steps),
        )
        self.table = np.zeros((len(plan.steps), self.num_x + self.num_p + 1), np.float32)
        for k, step in enumerate(plan.steps):
            for i, coefficient in enumerate(step.keep):
                self.table[k, (k - i) % self.num_x] = coefficient
            for j, coefficient in enumerate(step.gain):
                self.table[k, self.num_x + (k - j) % self.num_p] = coefficient
            self.table[k, -1] = step.noise
        self.guide = leg.guider.start()
        self.preview: Future[Any] | None = None  # the last one asked for
        self._kept: dict[str, tuple[list[bool], Float32]] = {}
        self.kept_roles: dict[str, list[bool]] = {}  # in a loop, which holds what is kept of these rows
        self._means: dict[str, Float32] = {}
        self._drawn = -1  # the evaluation that the noise in `state` is for
        self.state = np.zeros((self.table.shape[1], start.x.size), np.float32)
        self.state[0] = start.x.reshape(-1)

    @property
    def step(self) -> Step:
        """The step of the plan that comes next."""
        return self.leg.plan.steps[self.k]

    @property
    def weight(self) -> float:
        """Guidance weight of the next step: the plan's, unless the guider has found that 1 will do."""
        return self.guide.weight(self.step)

    @property
    def adapter_strength(self) -> float:
        """Strength of the next step's rows."""
        adapters = self.job.adapters
        return 0.0 if adapters is None else adapters.strength * self.step.adapters

    @property
    def kind(self) -> Kind:
        cond, _ = self.leg.text(self.step.denoiser)
        tokens = 0 if cond is None else len(cond.context)
        return Kind(self.network, self.on_device, self.shape, tokens)

    @property
    def network(self) -> ComponentId:
        """What the next step runs."""
        return ComponentId("denoiser", self.step.denoiser, self.step.reuse, self.leg.stage)

    @property
    def pixels(self) -> int:
        """Pixels of the image."""
        return self.leg.pixels

    @property
    def is_done(self) -> bool:
        return self.k == len(self.table)

    @property
    def has_ended(self) -> bool:
        return self.is_done or self.job.is_over

    def rows(self) -> list[Row]:
        """Rows that the next evaluation needs, the conditional one first."""
        leg, w = self.leg, self.weight
        cond, uncond = leg.text(self.step.denoiser)
        wanted = ((cond, True, w != 0.0), (uncond, False, w != 1.0))
        return [Row(self, condition, is_cond) for condition, is_cond, use in wanted if use and condition is not None]

    @property
    def x(self) -> Float32:
        """The current latent, flat."""
        latent: Float32 = self.state[self.k % self.num_x]
        return latent

    @property
    def p(self) -> Float32:
        """Place of the current step's guided prediction, flat."""
        prediction: Float32 = self.state[self.num_x + self.k % self.num_p]
        return prediction

    def draw(self) -> Float32 | None:
        """Fresh noise of the next step, flat, if it wants any; the same if asked again."""
        if not self.table[self.k, -1]:
            return None
        if self._drawn != self.k:
            self.state[-1], self._drawn = self.begin.generator.normal(self.shape).reshape(-1), self.k
        noise: Float32 = self.state[-1]
        return noise

    def advance(self, variance: Float32 | None = None) -> None:
        """x_{k+1} = Σ keep·x + Σ gain·p + noise·z, p and z as plan/sampling/limits.py makes them.

        variance: the network's variance channels, flat.
        """
        step, noise, raw = self.step, self.draw(), None
        if step.threshold is not None:
            raw = self.p.copy()
            a, b = map(np.float32, step.denoised)
            self.p[:] = limited(a * self.x + b * raw, step.threshold)
        if step.variance is not None and noise is not None and variance is not None:
            noise *= deviation(variance, step.variance)
        latent = self.table[self.k] @ self.state
        if raw is not None and step.raw:
            latent += np.float32(step.raw) * raw
        if step.known is not None and self.begin.known is not None:
            latent = self.begin.known.put_back(latent, step.known)
        self.k += 1
        self.x[:] = latent

    def end(self) -> Waypoint:
        """The image behind its leg."""
        done = next(number for number, leg in enumerate(self.job.legs, 1) if leg is self.leg)
        if self.leg.plan.steps[-1].draws_more:
            self.begin.generator.normal(self.shape)
        return Waypoint(self.job, self.index, done, self.begin.generator, self.latents())

    def latents(self) -> Float32:
        """A copy of the current latent, [C, h, w]."""
        return self.x.reshape(self.shape).copy()

    def denoised(self) -> Float32:
        """Estimate of the clean latent that the last step made, [C, h, w]."""
        k = self.k - 1
        step = self.leg.plan.steps[k]
        a, b = step.denoised if step.threshold is None else (0.0, 1.0)
        x, p = self.state[k % self.num_x], self.state[self.num_x + k % self.num_p]
        estimate: Float32 = (np.float32(a) * x + np.float32(b) * p).reshape(self.shape)
        return estimate

    def remember(self, name: str, roles: list[bool], values: Float32) -> None:
        """Keep a copy of activations, [rows, ...], for later steps; roles: whether each row is the conditional one."""
        self._kept[name] = (roles, values.copy())
        self._means.pop(name, None)

    def recall(self, name: str, roles: list[bool]) -> Float32:
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


@dataclass(frozen=True, slots=True, eq=False)
class Waypoint:
    """One image of a job between two legs, or behind the last."""

    job: Job
    index: int
    done: int  # legs behind it; 0: its picture was given
    generator: Generator  # its stream goes on in the next leg
    latents: Float32 | None = None  # that the last denoiser behind it made, [C, h, w]
    picture: Float32 | None = None  # in [-1, 1], [3, height, width]; None: latents are not decoded

    @property
    def next(self) -> Leg | None:
        """The leg that comes next; None behind the last."""
        return self.job.legs[self.done] if self.done < len(self.job.legs) else None


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a network call."""

    trajectory: Trajectory
    condition: Condition
    is_cond: bool


@dataclass(frozen=True)
class Batch:
    """Trajectories of one kind, and their rows in one network call."""

    trajectories: tuple[Trajectory, ...]
    rows: tuple[Row, ...]
    spans: tuple[slice, ...]  # rows of each trajectory

    @classmethod
    def of(cls, trajectories: Iterable[Trajectory]) -> Batch:
        chosen = tuple(trajectories)
        rows: list[Row] = []
        spans = []
        for trajectory in chosen:
            own = trajectory.rows()
            spans.append(slice(len(rows), len(rows) + len(own)))
            rows += own
        return cls(chosen, tuple(rows), tuple(spans))

    @cached_property
    def kind(self) -> Kind:
        return self.trajectories[0].kind

    @property
    def network(self) -> ComponentId:
        """What the call runs."""
        return self.kind.network

    @property
    def pixels(self) -> int:
        """Pixels of all rows."""
        return len(self.rows) * self.trajectories[0].pixels

    def halves(self) -> tuple[Batch, Batch]:
        """Two batches of about as many trajectories."""
        middle = (len(self.trajectories) + 1) // 2
        return Batch.of(self.trajectories[:middle]), Batch.of(self.trajectories[middle:])
