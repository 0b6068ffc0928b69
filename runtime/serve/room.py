"""Room of a batch: what jobs may hold between manifest and disk, in images, and in bytes where memory is limited.

A job is counted with what it holds at its most, until its images are on disk: for each image its largest picture as float32
(rounded, encoded and compressed it takes no more), and its largest latents as often as a sampler keeps them; for each given
picture its pixels as float32, and what a ControlNet's hint encoder makes of it. What one call of the largest VAE or
feed-forward network takes (`Footprint`, or the budget of its tiles) comes on top, once for the thread that decodes and once
for the one that encodes. Networks, and the denoiser's own calls, which --max-rows bounds, are not in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from stepforge.runtime.bundle import VAE_DECODER, VAE_ENCODER, Bundle, ComponentId, ModelCard, Size
from stepforge.runtime.errors import RequestError
from stepforge.runtime.imaging.read import image_size
from stepforge.runtime.request import Request

PICTURE = 12  # bytes a pixel: three float32
ROUNDING = 24  # bytes a pixel of what a network has made, while it is blended and rounded
STATES = 12 * 4  # bytes a latent: predictions and latents of the longest sampler, the first latents, inpainting's
HINT = 20  # bytes a pixel: 320 channels at an eighth of the side


@dataclass(frozen=True, slots=True)
class Need:
    """What a job holds: images, their bytes, and those of the largest call of a network between latents and pictures."""

    images: int
    held: int = 0
    call: int = 0


class Room:
    """images: most that jobs may have, unless one job alone has more; limit: most bytes, see above."""

    def __init__(self, images: int, bundle: Bundle | None = None, limit: int | None = None, tile: int | None = None):
        self._images, self._bundle, self._limit, self._tile = images, bundle, limit, tile
        self._inside: list[Need] = []
        self._changed = threading.Condition()

    def need(self, request: Request) -> Need:
        """Raises RequestError for a request that the limit has no room for, however few others there are."""
        if self._limit is None or self._bundle is None:
            return Need(request.images)
        need = counted(request, self._bundle, self._tile)
        if need.held + need.call > self._limit:
            raise RequestError(
                f"the job is counted with {need.held + need.call} bytes, {need.held} of its pictures and {need.call} of a "
                f"network's call; --limit-memory is {self._limit}"
            )
        return need

    def fits(self, need: Need) -> bool:
        """Whether there is room; always where nothing is inside."""
        after = [*self._inside, need]
        return not self._inside or (
            sum(one.images for one in after) <= self._images
            and (self._limit is None or sum(one.held for one in after) + max(one.call for one in after) <= self._limit)
        )

    def enter(self, need: Need) -> None:
        with self._changed:
            self._inside.append(need)

    def leave(self, needs: Iterable[Need]) -> None:
        with self._changed:
            for need in needs:
                self._inside.remove(need)
            self._changed.notify()

    @property
    def is_empty(self) -> bool:
        return not self._inside

    def wait_for(self, ready: Callable[[], bool], seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(ready, seconds)


def counted(request: Request, bundle: Bundle, tile: int | None) -> Need:
    """What a request holds. tile: bytes of a call in tiles. Raises RequestError for pictures that cannot be read."""
    given = request.upscale[0].image if request.upscale else None
    sources = [source for source in (given,) if source is not None]
    if request.init is not None:
        sources += [source for source in (request.init.image, request.init.mask) if source is not None]
    sources += [control.image for control in request.controls]
    sides = [image_size(source) for source in sources]
    pixels = latents = call = 0
    if given is not None:
        size = Size(*sides[0])
        pixels = size.width * size.height
    else:
        width, height = request.width, request.height
        if request.init is not None:
            multiple = bundle.card.size_multiple
            width, height = width or sides[0][0] // multiple * multiple, height or sides[0][1] // multiple * multiple
        size = bundle.card.size(width, height)
        pixels, latents, call = _leg(bundle, bundle.card, "", size, tile)
    hints = len(request.controls) * size.width * size.height * (PICTURE + HINT)
    for upscale in request.upscale:
        if (card := bundle.stages.get(upscale.name)) is None:
            continue  # refused when it is submitted
        read, size = size, Size(size.width * card.scale, size.height * card.scale)
        found = _leg(bundle, card.model, upscale.name, size, tile, read)
        pixels, latents, call = (max(pair) for pair in zip((pixels, latents, call), found, strict=True))
    held = request.images * (pixels * PICTURE + latents * STATES)
    return Need(request.images, held + hints + PICTURE * sum(width * height for width, height in sides), call)


def _leg(
    bundle: Bundle, model: ModelCard | None, stage: str, size: Size, tile: int | None, read: Size | None = None
) -> tuple[int, int, int]:
    """Pixels and latents of a leg's image, and bytes of its largest call. model: None of a feed-forward network."""
    pixels, latents, call = size.width * size.height, 0, 0
    positions = {ComponentId("upscaler", "upscaler"): 0 if read is None else read.width * read.height}
    if model is not None:
        channels, height, width = model.latent_shape(size)
        latents = channels * height * width
        positions = {VAE_DECODER: height * width, VAE_ENCODER: pixels}
    for key, count in positions.items():
        component = bundle.components.get(replace(key, stage=stage))
        if component is not None and component.footprint is not None:
            whole = int(component.footprint(count))
            call += whole if tile is None else min(whole, tile)
    return pixels, latents, call + ROUNDING * pixels
