"""The engine's thread: owns the networks and runs what the scheduler says.

    admit → (prompt, hint once) → pack → control → denoise → guide + update → retire → decode
      ↑                                                                                  │
      └──────────────────────────── the next leg of an image ────────────────────────────┘

A failure stays with its request: whatever one image, callback or result runs into ends that request, and a network call
that fails is repeated in halves until the culprit is alone.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial

from PIL import Image

from stepforge.runtime.arrays import Float32
from stepforge.runtime.backends import Backend, is_out_of_memory
from stepforge.runtime.bundle import VAE_ENCODER, Bundle
from stepforge.runtime.engine.adapters import Adapters
from stepforge.runtime.engine.conditions.text import Conditioner
from stepforge.runtime.engine.denoise import Denoisers
from stepforge.runtime.engine.noise import Generator
from stepforge.runtime.engine.pictures.decode import Decoder, Preview
from stepforge.runtime.engine.pictures.inits import Inits, from_init
from stepforge.runtime.engine.pictures.networks import WHOLE, Pictures, Tiling
from stepforge.runtime.engine.pictures.stages import Stage
from stepforge.runtime.engine.scheduler import CLOSED, Scheduler
from stepforge.runtime.engine.starts import from_noise, from_picture
from stepforge.runtime.engine.state import Job, Leg, failure, stage
from stepforge.runtime.engine.trajectory import Batch, Start, Trajectory, Waypoint
from stepforge.runtime.errors import Cancelled, GenerationError, RequestError
from stepforge.runtime.files import printable
from stepforge.runtime.imaging.read import check_image, read_picture
from stepforge.runtime.request import Progress, Request

log = logging.getLogger(__name__)


class Worker:
    """Everything that runs on the engine's thread."""

    def __init__(
        self, bundle: Bundle, backend: Backend, scheduler: Scheduler, adapters: Adapters, tiling: Tiling = WHOLE
    ) -> None:
        self._bundle, self._backend, self._scheduler, self._adapters = bundle, backend, scheduler, adapters
        self._encoders = Pictures(bundle, backend, tiling)  # the decoder has its own, on another thread
        self._inits = Inits(bundle)
        read = {tensor.name for entry in bundle.components.values() for tensor in entry.inputs}
        self._reads_no_sizes = bool(read) and "time_ids" not in read  # the test model states no inputs
        self.conditioner = Conditioner(bundle, backend, adapters)
        self.denoisers = Denoisers(bundle, backend, adapters)
        self._decoder = Decoder(bundle, backend, scheduler.resume, tiling)
        self.decoding: Stage[Waypoint | Preview] = Stage("stepforge-decode", self._decode)

    def _decode(self, image: Waypoint | Preview) -> None:
        """On the decoding stage's thread."""
        if isinstance(image, Preview):
            if self._decoder.preview(image):
                image.job.statistics.add(previews=1)
            return
        self._decoder(image)
        self._scheduler.returned(image)

    def check(self, request: Request) -> None:
        """Refuse, on the caller's thread, unreadable prompts and images, ControlNets that the bundle lacks, and sizes that no
        network reads."""
        if self._reads_no_sizes and request.micro.to_dict():
            raise RequestError(f"micro is for SDXL; {printable(self._bundle.card.name)} is told no sizes")
        for text in (request.prompt, request.negative):
            self.conditioner.tokenize(text, request.prompt_syntax)
        for upscale in request.upscale:
            if upscale.name in self._bundle.stages:  # others are refused when their plan is made
                for text in upscale.prompts(request):
                    self.conditioner.tokenize(text, request.prompt_syntax, upscale.name)
        self.denoisers.controls.check(request.controls)
        if request.init is not None:
            for image in (request.init.image, request.init.mask):
                if image is not None:
                    check_image(image)

    def check_tiles(self, legs: Sequence[Leg], request: Request) -> None:
        """Refuse pictures that the memory of tiles has no tile for."""
        self._encoders.check(legs, encodes=request.init is not None)

    def run(self) -> None:
        """Until the scheduler is closed or drained. However it ends, every job is settled and no new one is taken."""
        ending: BaseException = Cancelled(CLOSED)
        try:
            while self._scheduler.has_work():
                self.step()
        except BaseException as error:
            log.exception("the engine failed")
            ending = error
        finally:
            self._scheduler.close()
            self._scheduler.abandon(lambda job: job.fail("engine", ending))
            self.decoding.close()

    def step(self) -> None:
        """One tick: at most one network call, repeated in parts if it fails."""
        self._admit()
        batch = self._scheduler.pack()
        if batch is not None:
            self._denoise(batch)
        self._retire()

    def _admit(self) -> None:
        """Start images while rows are free. A job whose adapters find no free bank slot waits, and so do those behind it."""
        while (asked := self._scheduler.admissible()) is not None:
            started = time.perf_counter()
            job = asked if isinstance(asked, Job) else asked.job
            try:
                if isinstance(asked, Job) and not self._has_slot(job):
                    return
                if not job.is_prepared:
                    self._prepare(job)
                self._start(asked)
            except BaseException as error:
                job.fail("start", error)
                self._scheduler.drop(job)
            self._scheduler.took(asked)
            job.add_seconds("prompt", time.perf_counter() - started)

    def _start(self, asked: Waypoint | Job) -> None:
        """Set an image of a job, or one between two legs, on its way."""
        image, job = asked, asked if isinstance(asked, Job) else asked.job
        if isinstance(image, Job):
            index = image.started
            if job.given is None:
                leg = job.legs[0]
                start = self._first(job, leg, job.request.seed + index)
                self._run(job, index, leg, start)
                return
            image = Waypoint(job, index, 0, Generator(job.request.seed + index), picture=read_picture(job.given))
        assert image.next is not None
        if image.next.is_network:
            self._hand_over(image)
        else:
            start = from_picture(image.next, image, partial(self._encoders.encode, go_on=job.go_on))
            self._run(image.job, image.index, image.next, start)

    def _hand_over(self, image: Waypoint) -> None:
        """To the decoding stage."""
        self.decoding.submit(image)
        self._scheduler.lend(image)

    def _first(self, job: Job, leg: Leg, seed: int) -> Start:
        """Start of an image in the base model."""
        card, init = self._bundle.card, job.request.init
        if init is None or job.init is None:
            return from_noise(leg, card.latent_shape(leg.size), seed)
        reads_mask = self._bundle.reads_mask
        return from_init(leg, job.init, init, seed, scaling=card.scaling_factor, reads_mask=reads_mask)

    def _run(self, job: Job, index: int, leg: Leg, start: Start) -> None:
        rings = self.denoisers.rings(leg) if start.is_plain else None
        self._scheduler.start(Trajectory(job, index, leg, start, rings))

    def _has_slot(self, job: Job) -> bool:
        """Find a bank slot for the adapters of a job that starts an image; False if none is free.

        The slot is another one if others have taken it, between two images of the job, for want of an image that ran.
        """
        if job.adapters is not None:
            used = {trajectory.job.bank_slot for trajectory in self._scheduler.running()}
            with stage("prompt"):
                slot = self._adapters.acquire(job.adapters, used)
            if slot is None:
                return False
            job.bank_slot = slot
        return True

    def _prepare(self, job: Job) -> None:
        """What a job needs once: its prompts, its hints, its init image."""
        job.add_seconds("queue", time.perf_counter() - job.submitted)
        job.future.start()
        with stage("prompt"):
            self.conditioner.prepare(job)
        job.go_on()
        with stage("hint encoder"):
            self.denoisers.controls.prepare(job)
        job.go_on()
        if job.request.init is not None:
            encode = partial(self._encoders.encode, go_on=job.go_on)
            with stage("VAE encoder"):
                job.init, runs = self._inits(job.request.init, job.legs[0].size, encode)
            job.count(VAE_ENCODER.label, runs)
        job.is_prepared = True

    def _denoise(self, batch: Batch) -> None:
        """One call of the networks, then guidance and update of every trajectory.

        A backend's loop guides and updates by itself, and may still be at it when the call returns.
        """
        started = time.perf_counter()
        prediction: Float32 | None = None
        try:
            if batch.kind.on_device:
                self.denoisers.step(batch)
            else:
                prediction = self.denoisers(batch)
        except BaseException as error:
            self._divide(batch, error)
            return
        share = (time.perf_counter() - started) / len(batch.rows)
        for trajectory, span in zip(batch.trajectories, batch.spans, strict=True):
            job, rows = trajectory.job, span.stop - span.start
            job.count(batch.network.label, rows)
            job.spend(trajectory.leg, "denoise", share * rows)
            job.calls += 1
            job.statistics.add(steps=1)
        batch.trajectories[0].job.statistics.add(calls=1)
        for trajectory, span in zip(batch.trajectories, batch.spans, strict=True):
            try:
                if prediction is None:
                    trajectory.k += 1
                else:
                    self._update(trajectory, batch, span, prediction[span])
                self._look(trajectory)
            except BaseException as error:
                trajectory.job.fail("update", error)

    def _divide(self, batch: Batch, error: BaseException) -> None:
        """A failed call again, in halves; alone, the failure is the request's."""
        if is_out_of_memory(error):
            self._scheduler.learn_out_of_memory(batch)
        if len(batch.trajectories) == 1:
            batch.trajectories[0].job.fail("denoiser", error)
            return
        for half in batch.halves():
            self._denoise(half)

    def _update(self, trajectory: Trajectory, batch: Batch, span: slice, prediction: Float32) -> None:
        """Guidance, then x_{k+1}. Channels beyond the latents' are a variance; the first row's counts, the conditional one."""
        flat = prediction.reshape(len(prediction), -1)
        size = trajectory.x.size
        given = {row.is_cond: values[:size] for row, values in zip(batch.rows[span], flat, strict=True)}
        trajectory.leg.guider(
            trajectory.guide, trajectory.step, trajectory.weight, trajectory.x, given.get(True), given.get(False),
            trajectory.p,
        )  # fmt: skip
        trajectory.advance(flat[0, size:])

    def _look(self, trajectory: Trajectory) -> None:
        """Check the new latent where it is on the host, and tell the caller of the step."""
        job = trajectory.job
        if trajectory.on_device and trajectory.is_done:
            self.denoisers.read(trajectory)
        if (not trajectory.on_device or trajectory.is_done) and not math.isfinite(float(trajectory.x.sum())):
            raise GenerationError(f"image {trajectory.index}: the latents are not finite after step {trajectory.k}")
        if job.on_step is None or job.is_over:
            return
        k, steps = trajectory.k, len(trajectory.table)
        progress = Progress(
            trajectory.index, k, steps, partial(self._latents, trajectory, k), partial(self._estimate, trajectory, k),
            partial(self._preview, trajectory, k), trajectory.leg.stage,
        )  # fmt: skip
        try:
            job.on_step(progress)
        except Exception as error:  # the caller's own code: its error is the request's
            # StopIteration cannot be raised into an asyncio future
            job.future.settle(failure("callback", error) if isinstance(error, StopIteration) else error)
        except BaseException as error:
            job.future.settle(failure("callback", error))

    def _latents(self, trajectory: Trajectory, k: int) -> Float32:
        self._bring(trajectory, k)
        return trajectory.latents()

    def _estimate(self, trajectory: Trajectory, k: int) -> Float32:
        self._bring(trajectory, k)
        return trajectory.denoised()

    def _preview(self, trajectory: Trajectory, k: int) -> Future[Image.Image]:
        """The clean estimate as a picture, made on the decoding stage. One that was asked for before and is not yet begun is
        cancelled: slow decoders drop previews."""
        preview = Preview(trajectory.job, trajectory.leg, self._estimate(trajectory, k))
        if trajectory.preview is not None:
            trajectory.preview.cancel()
        trajectory.preview = preview.future
        self.decoding.submit(preview)
        return preview.future

    def _bring(self, trajectory: Trajectory, k: int) -> None:
        """The state of step k on the host. Raises RequestError once the trajectory has moved on."""
        if trajectory.k != k:
            raise RequestError("progress is read inside the callback; copy what is needed later")
        if trajectory.on_device:
            self.denoisers.read(trajectory)

    def _retire(self) -> None:
        """Hand finished latents to the decoder, or to the next leg if it reads them as they are."""
        for trajectory in self._scheduler.retire():
            image = trajectory.end()
            try:
                if image.next is not None and image.next.reads_latents:
                    self._scheduler.resume(image)
                else:
                    self._hand_over(image)
            except BaseException as error:  # no thread to be had, or the engine was closed
                trajectory.job.fail("decoder", error)
