"""Finished latents to pictures, through feed-forward networks to larger ones, and the pictures of a request to its result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from stepforge.runtime.arrays import Float32
from stepforge.runtime.backends import Backend
from stepforge.runtime.bundle import VAE_DECODER, Bundle, ComponentId
from stepforge.runtime.engine.pictures.networks import WHOLE, Pictures, Tiling
from stepforge.runtime.engine.state import Job, Leg, failure
from stepforge.runtime.engine.trajectory import Waypoint
from stepforge.runtime.errors import Cancelled
from stepforge.runtime.imaging.masks import sized_mask, sized_picture
from stepforge.runtime.imaging.png import to_pil, to_uint8
from stepforge.runtime.request import Result, Stats

PREVIEW = 32 * 32  # latents of a preview at most; more are averaged


@dataclass(frozen=True, slots=True, eq=False)
class Preview:
    """The clean estimate of a running image, to be decoded. latents: [C, h, w], of the leg that makes them."""

    job: Job
    leg: Leg
    latents: Float32
    future: Future[Image.Image] = field(default_factory=Future)


class Decoder:
    """The VAE decoders and feed-forward networks of a bundle. Only the decoding stage's thread calls it.

    resume: takes images whose next leg denoises.
    """

    def __init__(
        self, bundle: Bundle, backend: Backend, resume: Callable[[Waypoint], None], tiling: Tiling = WHOLE
    ) -> None:
        self._bundle, self._backend, self._resume = bundle, backend, resume
        self._networks = Pictures(bundle, backend, tiling)
        if VAE_DECODER in bundle.components:
            self._networks.open(VAE_DECODER)  # those of stages when they are first used

    def __call__(self, image: Waypoint) -> None:
        """Decode one image and send it on; the last of a request settles it. Never raises: what fails is the request's."""
        job = image.job
        stage = "decoder"
        try:
            job.go_on()
            if image.picture is None:
                image = self._decoded(image)
            while image.next is not None and image.next.is_network:
                stage = f"stage {image.next.stage}"
                image = self._enlarged(image, image.next)
            if image.next is not None:
                self._resume(image)
                return
            self._finish(image)
            if job.is_decoded:
                stage = "assembly of the result"
                job.future.settle(self._result(job))
        except BaseException as error:  # also what ends a thread: its request ends, the stage goes on
            job.fail(stage, error)

    def preview(self, preview: Preview) -> bool:
        """Settle a preview; False if it was cancelled, or its request is over. Never raises."""
        job, future = preview.job, preview.future
        if job.is_over:
            future.cancel()
        if not future.set_running_or_notify_cancel():
            return False
        try:
            picture = _fewer(preview.latents)
            if replace(VAE_DECODER, stage=preview.leg.stage) in self._bundle.components:
                picture = self._networks.decode(picture, preview.leg.stage, go_on=job.go_on)
            future.set_result(to_pil(to_uint8(picture[None]))[0])
        except BaseException as error:
            future.set_exception(error if isinstance(error, Cancelled) else failure("preview", error))
        return True

    def _decoded(self, image: Waypoint) -> Waypoint:
        """The image with its picture, by the decoder of the leg behind it."""
        job, leg, latents = image.job, image.job.legs[image.done - 1], image.latents
        assert latents is not None
        key = replace(VAE_DECODER, stage=leg.stage)
        if key not in self._bundle.components:  # a model of pixels
            return replace(image, picture=latents)
        started = time.perf_counter()
        picture = self._networks.decode(latents, leg.stage, go_on=job.go_on)
        if (init := job.request.init) is not None and init.overlay and not leg.stage:
            assert init.mask is not None
            width, height = leg.size.width, leg.size.height
            is_new = sized_mask(init.mask, width, height) > 0
            picture = np.where(is_new, picture, sized_picture(init.image, width, height))
        job.spend(leg, "decode", time.perf_counter() - started)
        job.count(key.label, 1)
        return replace(image, picture=picture)

    def _enlarged(self, image: Waypoint, leg: Leg) -> Waypoint:
        """The image behind its next leg, a feed-forward network, which reads and makes values in 0..1."""
        assert image.picture is not None
        started = time.perf_counter()
        key = ComponentId("upscaler", "upscaler", stage=leg.stage)
        values = np.clip(image.picture * 0.5 + 0.5, 0, 1).astype(np.float32)
        pixels = self._networks.upscale(values, leg.stage, go_on=image.job.go_on)
        image.job.spend(leg, "upscale", time.perf_counter() - started)
        image.job.count(key.label, 1)
        return replace(image, done=image.done + 1, picture=pixels * np.float32(2) - np.float32(1))

    def _finish(self, image: Waypoint) -> None:
        job = image.job
        assert image.picture is not None
        job.latents[image.index] = np.empty((0, 0, 0), np.float32) if image.latents is None else image.latents
        job.pixels[image.index] = to_uint8(image.picture[None])[0]

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
            init=() if job.init is None else job.init.digests,
            stages=tuple((leg.stage, leg.plan) for leg in job.legs if leg.stage),
        )


def _fewer(latents: Float32) -> Float32:
    """Latents, [C, h, w], averaged over squares, so that at most `PREVIEW` positions are left."""
    channels, height, width = latents.shape
    side = max(1, math.ceil(math.sqrt(height * width / PREVIEW)))
    side = min(side, height, width)
    h, w = height // side, width // side
    squares = latents[:, : h * side, : w * side].reshape(channels, h, side, w, side)
    averaged: Float32 = squares.mean(axis=(2, 4), dtype=np.float32)
    return averaged
