"""The engine: continuous batching of requests that each run their own plan.

    admit → (hint once) → pack → control → denoise → guide + update → retire → decode

One scheduler thread owns the networks. Requests join and leave between steps; rows of one network call may come from
requests with different samplers, step counts, guidance and seeds. Decoding runs on a thread of its own and overlaps
with the denoising of what is still running.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import overload

import numpy as np
from numpy.typing import NDArray

from stepforge.runtime.backends import Backend
from stepforge.runtime.bundle import VAE_DECODER, Bundle, ComponentId
from stepforge.runtime.engine.adapters import Adapters
from stepforge.runtime.engine.denoise import Denoisers
from stepforge.runtime.engine.state import Job, OnStep, Row, Slot, rows_of_slot
from stepforge.runtime.engine.text import Conditioner
from stepforge.runtime.errors import Cancelled, GenerationError, RequestError, StepforgeError
from stepforge.runtime.imaging.png import to_pil, to_uint8
from stepforge.runtime.imaging.preprocess import hint_of
from stepforge.runtime.plan import Plan
from stepforge.runtime.plan.compile import Rows, check_variants, compile_plan
from stepforge.runtime.plan.schedules import SchedulerCard
from stepforge.runtime.presets import resolve
from stepforge.runtime.request import Progress, Request, Result, Stats

log = logging.getLogger(__name__)
Array = NDArray[np.float32]
MAX_ROWS = 8  # denoiser rows in one call; on a CPU more rows cost memory and gain nothing (reference: measured.md)


class Engine:
    """Runs requests on a bundle. Safe to use from many threads; close it, or use it as a context manager."""

    def __init__(self, bundle: Bundle, backend: Backend, *, max_rows: int = MAX_ROWS) -> None:
        if max_rows < 2:
            raise RequestError(f"max_rows is {max_rows}; a guided step needs at least 2")
        self.bundle, self.backend, self.max_rows = bundle, backend, max_rows
        self.scheduler = SchedulerCard.from_dict(bundle.scheduler)
        self.adapters = Adapters(bundle, backend)
        self._conditioner = Conditioner(bundle, backend, self.adapters)
        self._denoisers = Denoisers(bundle, backend, self.adapters)
        self._decoder = backend.open(VAE_DECODER)
        self._waiting: deque[Job] = deque()
        self._running: list[Slot] = []
        self._wake = threading.Condition()
        self._closed = False
        self._decoding = ThreadPoolExecutor(1, thread_name_prefix="stepforge-decode")
        self._thread = threading.Thread(target=self._loop, name="stepforge-engine", daemon=True)
        self._thread.start()

    def plan(self, request: Request) -> Plan:
        """The plan that `generate` would run. Raises RequestError."""
        return self._plan(resolve(request, self.bundle), None)

    def _plan(self, request: Request, rows: Rows | None) -> Plan:
        plan = compile_plan(request, self.scheduler, rows)
        check_variants(plan, self.bundle)
        return plan

    def submit(self, request: Request, *, on_step: OnStep | None = None, rows: Rows | None = None) -> Future[Result]:
        """Queue a request; cancel its future to stop it at the next step. Raises RequestError at once if it is bad.

        rows: steps of the caller's own in place of the request's sampler, see `planner.compile_plan`.
        """
        request = resolve(request, self.bundle)
        size = self.bundle.card.size(request.width, request.height)
        chosen = self.adapters.choose(request.adapters)
        self._denoisers.controls.check([control.name for control in request.controls])
        plan = self._plan(request, rows)
        hints = [hint_of(c.image, c.preprocessor, size.width, size.height) for c in request.controls]
        job = Job(request, plan, size, on_step, chosen, hints)
        for text in (request.prompt, request.negative):
            self._conditioner.tokenize(text, request.prompt_syntax)  # refuse unreadable prompts here
        with self._wake:
            if self._closed:
                raise RequestError("this engine is closed")
            self._waiting.append(job)
            self._wake.notify()
        return job.future

    @overload
    def generate(self, request: Request, *, on_step: OnStep | None = None) -> Result: ...
    @overload
    def generate(self, request: Sequence[Request], *, on_step: OnStep | None = None) -> list[Result]: ...
    def generate(self, request: Request | Sequence[Request], *, on_step: OnStep | None = None) -> Result | list[Result]:
        """Run one request, or several together. Raises RequestError, Cancelled or GenerationError."""
        if isinstance(request, Request):
            return self.submit(request, on_step=on_step).result()
        futures = [self.submit(one, on_step=on_step) for one in request]
        return [future.result() for future in futures]

    async def agenerate(self, request: Request, *, on_step: OnStep | None = None) -> Result:
        """`generate` for asyncio; cancelling the task cancels the request."""
        return await asyncio.wrap_future(self.submit(request, on_step=on_step))

    def close(self) -> None:
        """Stop after the current step; what is unfinished fails with Cancelled."""
        with self._wake:
            if self._closed:
                return
            self._closed = True
            self._wake.notify()
        self._thread.join()
        self._decoding.shutdown(wait=True)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._running or self._closed):
                    self._wake.wait()
                if self._closed:
                    break
            try:
                self.step()
            except Exception as error:  # a defect of ours must not hang the callers
                log.exception("the engine failed")
                for slot in self._running:
                    slot.job.settle(GenerationError(f"the engine failed: {type(error).__name__}: {error}"))
                self._running.clear()
        for job in (*self._waiting, *(slot.job for slot in self._running)):
            job.settle(Cancelled("the engine was closed"))

    def step(self) -> None:
        """One tick: at most one network call."""
        self._admit()
        slots = self._pack()
        self._denoise(slots)
        self._retire()

    def _admit(self) -> None:
        """Start waiting jobs while rows are free, oldest first; a job whose adapters find no free slot waits, and so do
        those behind it."""
        while len(self._running) < self.max_rows:
            with self._wake:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
            if job.is_over:
                continue
            started, stage = time.perf_counter(), "prompt"
            try:
                if job.adapters is not None:
                    bank_slot = self.adapters.acquire(job.adapters, {slot.job.bank_slot for slot in self._running})
                    if bank_slot is None:
                        with self._wake:
                            self._waiting.appendleft(job)
                        return
                    job.bank_slot = bank_slot
                negative = None
                if any(step.guidance != 1.0 for step in job.plan.steps):
                    negative = job.request.negative
                before = self._conditioner.rows
                request = job.request
                job.cond, job.uncond = self._conditioner(
                    request.prompt, negative, request.prompt_syntax, job.adapters, job.bank_slot
                )
                job.rows["text_encoder"] = self._conditioner.rows - before
                stage = "hint encoder"
                self._make_hints(job)
                shape = self.bundle.card.latent_shape(job.size)
                rings = self._denoisers.rings(job)
                self._running += [Slot(job, index, shape, rings) for index in range(job.request.images)]
            except Exception as error:
                job.settle(error if isinstance(error, StepforgeError) else GenerationError(_reason(stage, error)))
            job.seconds["prompt"] += time.perf_counter() - started

    def _make_hints(self, job: Job) -> None:
        """Run the hint encoder of each ControlNet that some step uses."""
        for index, (control, image) in enumerate(zip(job.request.controls, job.hint_images, strict=True)):
            used = any(step.control[index] for step in job.plan.steps)
            job.hints.append(self._denoisers.controls.hint(control.name, image) if used else np.empty(0, np.float32))
            if used:
                label = ComponentId("control_hint", control.name).label
                job.rows[label] = job.rows.get(label, 0) + 1

    def _pack(self) -> list[Slot]:
        """The oldest slot and all others that fit in one call with it: same network, latent size and prompt length."""
        self._running = [slot for slot in self._running if not slot.job.is_over]
        if not self._running:
            return []
        kind, rows, chosen = _kind(self._running[0]), 0, []
        for slot in self._running:
            need = len(rows_of_slot(slot))
            if _kind(slot) == kind and rows + need <= self.max_rows:
                chosen.append(slot)
                rows += need
        return chosen

    def _denoise(self, slots: list[Slot]) -> None:
        """One call of the networks, then guidance and update of every slot. A failing call is retried slot by slot.

        The backend's loop guides and updates by itself, and may still be at it when the call returns.
        """
        if not slots:
            return
        started = time.perf_counter()
        rows = [row for slot in slots for row in rows_of_slot(slot)]
        prediction: Array | None = None
        try:
            if slots[0].in_loop:
                self._denoisers.step(rows)
            else:
                prediction = self._denoisers(rows)
        except Exception as error:
            if len(slots) == 1:
                reason = error if isinstance(error, StepforgeError) else GenerationError(_reason("denoiser", error))
                slots[0].job.settle(reason)
            else:
                for slot in slots:
                    self._denoise([slot])
            return
        owners: dict[Slot, int] = {}
        row = 0
        for slot in slots:
            own = rows[row : row + 2] if row + 1 < len(rows) and rows[row + 1].slot is slot else rows[row : row + 1]
            if prediction is not None:
                self._guide(slot, own, prediction[row : row + len(own)].reshape(len(own), -1))
            self._advance(slot)
            row += len(own)
            owners[slot] = len(own)
        share = (time.perf_counter() - started) / row
        for slot, need in owners.items():
            job, step = slot.job, slot.job.plan.steps[slot.k - 1]
            name = ComponentId("denoiser", step.denoiser, step.reuse).label
            job.rows[name] = job.rows.get(name, 0) + need
            job.seconds["denoise"] += share * need
            job.calls += 1

    def _advance(self, slot: Slot) -> None:
        """Move a guided slot, or follow one that its loop has moved; read it from there if somebody looks at it."""
        seen = not slot.in_loop or slot.job.on_step is not None or slot.k + 1 == len(slot.table)
        if slot.in_loop and seen:
            self._denoisers.read(slot)
        denoised = self._denoised(slot) if slot.job.on_step else None
        if slot.in_loop:
            slot.k += 1
        else:
            slot.advance()
        if seen and not math.isfinite(float(slot.x.sum())):
            slot.job.settle(GenerationError(f"image {slot.index}: the latents are not finite after step {slot.k}"))
        elif denoised is not None:
            self._report(slot, denoised)

    def _guide(self, slot: Slot, rows: list[Row], prediction: Array) -> None:
        """The guided prediction of a slot's rows, [rows, C·h·w], into the slot."""
        given = {row.is_cond: values for row, values in zip(rows, prediction, strict=True)}
        slot.job.guider(slot.guide, slot.step, slot.weight, slot.x, given.get(True), given.get(False), slot.p)

    def _denoised(self, slot: Slot) -> Array:
        a, b = slot.job.plan.steps[slot.k].denoised
        return (np.float32(a) * slot.x + np.float32(b) * slot.p).reshape(slot.shape)

    def _report(self, slot: Slot, denoised: Array) -> None:
        assert slot.job.on_step is not None
        try:
            latents = slot.x.reshape(slot.shape)
            slot.job.on_step(Progress(slot.index, slot.k, len(slot.table), latents.copy, lambda: denoised))
        except Exception as error:  # the caller's own code: it may fail its request, not the engine
            slot.job.settle(error)

    def _retire(self) -> None:
        """Send finished latents to the decoder."""
        done = [slot for slot in self._running if slot.is_done]
        self._running = [slot for slot in self._running if not slot.is_done]
        for slot in done:
            self._decoding.submit(self._decode, slot)

    def _decode(self, slot: Slot) -> None:
        job = slot.job
        if job.is_over:
            return
        started = time.perf_counter()
        try:
            latents = slot.x.reshape(1, *slot.shape).copy()
            pixels = self._decoder({"latents": latents})["pixels"]
            if not math.isfinite(float(pixels.sum())):
                raise GenerationError(f"image {slot.index}: the decoded pixels are not finite")
            job.latents[slot.index] = latents[0]
            job.pixels[slot.index] = to_uint8(pixels)[0]
        except Exception as error:
            job.settle(error if isinstance(error, StepforgeError) else GenerationError(_reason("decoder", error)))
            return
        job.seconds["decode"] += time.perf_counter() - started
        job.rows["vae_decoder"] = job.rows.get("vae_decoder", 0) + 1
        job.pending -= 1
        if not job.pending:
            job.settle(self._result(job))

    def _result(self, job: Job) -> Result:
        request = job.request
        return Result(
            request=request,
            images=tuple(to_pil(np.stack([pixels for pixels in job.pixels if pixels is not None]))),
            seeds=tuple(request.seed + index for index in range(request.images)),
            latents=np.stack([latents for latents in job.latents if latents is not None]),
            plan=job.plan,
            stats=Stats(
                rows=job.rows,
                calls=job.calls,
                seconds={**job.seconds, "total": time.perf_counter() - job.submitted},
                backend=self.backend.name,
                precision=self.backend.precision,
                versions={**self.backend.versions, "numpy": np.__version__},
            ),
            model=self.bundle.card.name,
            digest=self.bundle.digest,
            adapters={loaded.name: loaded.adapter.sha256 for loaded, _ in job.adapters.parts} if job.adapters else {},
            hints=tuple(hashlib.sha256(hint.tobytes()).hexdigest() for hint in job.hint_images),
        )


def _kind(slot: Slot) -> tuple[str, str, bool, tuple[int, ...], int]:
    """Slots of one kind can share a network call."""
    assert slot.job.cond is not None
    return slot.step.denoiser, slot.step.reuse, slot.in_loop, slot.shape, len(slot.job.cond.context)


def _reason(stage: str, error: Exception) -> str:
    """One line without the engine library's trace."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"the {stage} failed: {type(error).__name__}: {lines[-1].strip() if lines else 'no message'}"
