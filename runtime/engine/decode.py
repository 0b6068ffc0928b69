"""Finished latents to pictures, and the pictures of a request to its result."""

from __future__ import annotations

import math
import time

import numpy as np

from stepforge.runtime.backends import Backend
from stepforge.runtime.bundle import VAE_DECODER, Bundle
from stepforge.runtime.engine.state import Job
from stepforge.runtime.engine.trajectory import Trajectory
from stepforge.runtime.errors import GenerationError
from stepforge.runtime.imaging.png import to_pil, to_uint8
from stepforge.runtime.request import Result, Stats


class Decoder:
    """The VAE decoder of a bundle. Only the decoding stage's thread calls it."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self._bundle, self._backend = bundle, backend
        self._graph = backend.open(VAE_DECODER)

    def __call__(self, trajectory: Trajectory) -> None:
        """Decode one image; the last of a request settles it. Never raises: what fails is the request's."""
        job = trajectory.job
        if job.is_over:
            return
        stage = "decoder"
        try:
            self._decode(trajectory)
            if job.is_decoded:
                stage = "assembly of the result"
                job.future.settle(self._result(job))
        except BaseException as error:  # also what ends a thread: its request ends, the stage goes on
            job.fail(stage, error)

    def _decode(self, trajectory: Trajectory) -> None:
        job, index = trajectory.job, trajectory.index
        started = time.perf_counter()
        latents = trajectory.latents()
        pixels = self._graph({"latents": latents[None]})["pixels"]
        if not math.isfinite(float(pixels.sum())):
            raise GenerationError(f"image {index}: the decoded pixels are not finite")
        job.latents[index] = latents
        job.pixels[index] = to_uint8(pixels)[0]
        job.seconds["decode"] += time.perf_counter() - started
        job.count(VAE_DECODER.label, 1)

    def _result(self, job: Job) -> Result:
        request, backend = job.request, self._backend
        return Result(
            request=request,
            images=tuple(to_pil(np.stack([pixels for pixels in job.pixels if pixels is not None]))),
            seeds=tuple(request.seed + index for index in range(request.images)),
            latents=np.stack([latents for latents in job.latents if latents is not None]),
            plan=job.legs[0].plan,
            stats=Stats(
                rows=job.rows,
                calls=job.calls,
                seconds={**job.seconds, "total": time.perf_counter() - job.submitted},
                backend=backend.name,
                precision=backend.precision,
                versions={**backend.versions, "numpy": np.__version__},
            ),
            model=self._bundle.card.name,
            digest=self._bundle.digest,
            adapters={loaded.name: loaded.adapter.sha256 for loaded, _ in job.adapters.parts} if job.adapters else {},
            hints=tuple(job.legs[0].hint_digests),
        )
