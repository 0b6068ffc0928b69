"""What runs: a `Job` is a request on its way, a `Leg` one stage of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stepforge.runtime.arrays import Float32
from stepforge.runtime.bundle import Size, StageCard
from stepforge.runtime.engine.adapters import NONE, AdapterSet
from stepforge.runtime.engine.conditions.text import Condition
from stepforge.runtime.engine.jobs.future import RequestFuture
from stepforge.runtime.engine.jobs.statistics import Statistics
from stepforge.runtime.errors import BackendError, Cancelled, GenerationError, StepforgeError
from stepforge.runtime.files import printable
from stepforge.runtime.imaging.read import Picture
from stepforge.runtime.plan import Plan
from stepforge.runtime.plan.reuse import recordings
from stepforge.runtime.request import Progress, Request, Upscale

if TYPE_CHECKING:
    from stepforge.runtime.engine.pictures.inits import Given

Texts = tuple[Condition | None, Condition | None]
OnStep = Callable[[Progress], None]

PRIORITY_SECONDS = 30.0  # of waiting that a level of priority is worth, so that no request waits for ever


class Leg:
    """One stage of a job: a model of the bundle, the plan that it runs, and what its rows are conditioned on.

    size: of the pictures that it makes. stage: name of the super-resolution stage, and card what the bundle says of it;
    empty and None for the base model. upscale: what the request says of the stage. reads_latents: the stage takes the
    latents that the leg before has made, as they are; otherwise its pictures.
    A plan without steps is that of a feed-forward network.
    """

    def __init__(
        self,
        plan: Plan,
        size: Size,
        stage: str = "",
        *,
        card: StageCard | None = None,
        upscale: Upscale | None = None,
        reads_latents: bool = False,
    ) -> None:
        self.plan, self.size, self.stage = plan, size, stage
        self.card, self.upscale, self.reads_latents = card, upscale, reads_latents
        self.prompt = None if upscale is None else upscale.prompt  # None: the request's
        self.negative = None if upscale is None else upscale.negative
        self.guider = plan.guider
        self.recordings = recordings(plan.steps)
        # set when the job is admitted
        self.cond: Condition | None = None
        self.uncond: Condition | None = None
        self.texts: dict[str, Texts] = {}  # of denoisers that read prompts in their own way
        self.hints: Sequence[Float32] = ()  # encoded, one a ControlNet; empty where no step uses it
        self.hint_digests: Sequence[str] = ()

    def text(self, denoiser: str) -> Texts:
        """Conditions of a denoiser's rows: of the prompt, and of the negative one."""
        return self.texts.get(denoiser, (self.cond, self.uncond))

    @property
    def is_network(self) -> bool:
        """Whether it is one pass of a feed-forward network."""
        return not self.plan.steps

    @property
    def pixels(self) -> int:
        """Pixels of one picture."""
        return self.size.width * self.size.height


class Job:
    """A submitted request and what has become of it so far.

    legs: in the order in which its images pass them. priority: levels before others that come at the same time. deadline:
    seconds. statistics: of the engine.
    """

    def __init__(
        self,
        request: Request,
        legs: Sequence[Leg],
        future: RequestFuture,
        *,
        on_step: OnStep | None = None,
        adapters: AdapterSet | None = None,
        priority: int = 0,
        deadline: float | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        # set when the request is submitted
        self.request, self.legs, self.future = request, tuple(legs), future
        self.on_step, self.adapters = on_step, adapters
        self.submitted = time.perf_counter()
        self.rank = self.submitted - PRIORITY_SECONDS * priority  # the lowest is next
        self.deadline = deadline
        self.statistics = statistics or Statistics()
        # set when it is admitted
        self.is_prepared = False
        self.init: Given | None = None  # the request's init image, encoded
        self.bank_slot = NONE
        self.started = 0  # images that have become trajectories
        # filled as images end
        self.latents: list[Float32 | None] = [None] * request.images
        self.pixels: list[NDArray[np.uint8] | None] = [None] * request.images
        self.rows: dict[str, int] = {}
        self.seconds = {"queue": 0.0, "prompt": 0.0, "denoise": 0.0, "decode": 0.0}
        self.seconds |= {f"{leg.stage}/denoise": 0.0 for leg in self.legs if leg.stage and not leg.is_network}
        self.calls = 0

    @property
    def given(self) -> Path | bytes | Picture | None:
        """The image that the first leg enlarges; None if it draws one."""
        return self.request.upscale[0].image if self.request.upscale else None

    @property
    def is_over(self) -> bool:
        """Cancelled by the caller, late, or failed: its remaining work is dropped."""
        return self.future.done()

    def go_on(self) -> None:
        """Between two parts of its work. Raises Cancelled if it is over."""
        if self.is_over:
            raise Cancelled("the request has ended")

    @property
    def is_decoded(self) -> bool:
        return all(pixels is not None for pixels in self.pixels)

    def fail(self, stage: str, error: BaseException) -> None:
        """End the request: with an error of ours as it is, with others as one line that names the stage."""
        self.future.settle(error if _is_final(error) else failure(stage, error))

    def count(self, label: str, rows: int) -> None:
        self.rows[label] = self.rows.get(label, 0) + rows
        self.statistics.count(label, rows)

    def spend(self, leg: Leg, what: str, seconds: float) -> None:
        """Add to the seconds of a leg: "denoise" or "decode" of the base model, "x4/denoise" of a stage."""
        self.add_seconds(f"{leg.stage}/{what}" if leg.stage else what, seconds)

    def add_seconds(self, label: str, seconds: float) -> None:
        self.seconds[label] = self.seconds.get(label, 0.0) + seconds
        self.statistics.spend(label, seconds)


def failure(stage: str, error: BaseException) -> GenerationError:
    """One line without the engine library's trace; the error itself is its cause."""
    if isinstance(error, BackendError):
        found = GenerationError(f"the {stage} failed: {error}")
    else:
        lines = [line for line in str(error).splitlines() if line.strip()]
        found = GenerationError(
            f"the {stage} failed: {type(error).__name__}: {printable(lines[-1], 300) if lines else 'no message'}"
        )
    found.__cause__ = error
    return found


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Errors of the block that are not ours name the stage."""
    try:
        yield
    except BaseException as error:
        if _is_final(error):
            raise
        raise failure(name, error) from error


def _is_final(error: BaseException) -> bool:
    """Whether an error is told to the caller as it is: what an engine library reports of a network gets the stage's name."""
    return isinstance(error, StepforgeError) and not isinstance(error, BackendError)
