"""The networks between latents and pictures, and between pictures: in one piece, or in tiles within a memory budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from stepforge.runtime.arrays import Float32
from stepforge.runtime.backends import Backend, Graph
from stepforge.runtime.bundle import VAE_DECODER, VAE_ENCODER, Bundle, ComponentId, Footprint
from stepforge.runtime.engine.pictures.tiles import Ratio, Tile, as_diffusers, even
from stepforge.runtime.errors import BundleError, GenerationError, RequestError

if TYPE_CHECKING:
    from stepforge.runtime.engine.state import Leg

GoOn = Callable[[], None]

TILINGS = ("even", "diffusers")
LEAST_TILE = 32  # positions a side; smaller tiles would be overlap alone
OVERLAP = 16  # positions that neighbours share, at least; a quarter of larger tiles, as diffusers has it


@dataclass(frozen=True, slots=True)
class Tiling:
    """How large pictures pass a VAE and a feed-forward network.

    memory: bytes that the values inside a network may take in one call (`Footprint`); None: pictures pass in one piece.
    kind: "even": tiles that keep the budget; "diffusers": VAEs as diffusers' enable_tiling, whatever they take.
    Raises RequestError.
    """

    memory: int | None = None
    kind: str = "even"

    def __post_init__(self) -> None:
        if self.kind not in TILINGS:
            raise RequestError(f"tiling {self.kind!r} is unknown; choose one of {', '.join(TILINGS)}")
        memory = self.memory
        if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int) or memory < 1):
            raise RequestError(f"tile_memory is {memory!r}; it must be a whole number of bytes")

    def tile(self, footprint: Footprint, height: int, width: int, multiple: int, what: str) -> Tile | None:
        """The largest tile that keeps the budget; None: the whole picture does. Raises RequestError if none does."""
        if self.memory is None or footprint(height * width) <= self.memory:
            return None
        least = math.ceil(LEAST_TILE / multiple) * multiple
        positions = _positions(footprint, self.memory)
        side = math.isqrt(positions) // multiple * multiple
        smallest = min(least, height, width)
        if side < smallest:
            needed = math.ceil(footprint(smallest**2))
            raise RequestError(f"tile_memory is {self.memory} bytes; {what} needs at least {needed}")
        rows = min(side, height)
        columns = min(positions // rows // multiple * multiple, width)
        rows = min(positions // columns // multiple * multiple, height)
        shortest = min(side for side, length in ((rows, height), (columns, width)) if side < length)
        return Tile(rows, columns, min(max(OVERLAP, shortest // 4), shortest - 1))


def _positions(footprint: Footprint, memory: int) -> int:
    """Most positions whose footprint is within the memory."""
    b, a = footprint.bytes, footprint.squared
    root = memory / b if a == 0 else 2 * memory / (b + math.sqrt(b * b + 4 * a * memory))
    return int(root)


WHOLE = Tiling()


class Pictures:
    """A bundle's VAEs and feed-forward networks. One thread at a time calls it.

    Pictures are [3, H, W] in -1..1, or in 0..1 for `upscale`. What is returned is the caller's for good: images wait for their
    next leg, and a graph's own outputs last until its next call. go_on: called before each network call; what it raises ends
    the work. Raises GenerationError for what is not finite.
    """

    def __init__(self, bundle: Bundle, backend: Backend, tiling: Tiling = WHOLE) -> None:
        self._bundle, self._backend, self._tiling = bundle, backend, tiling
        self._graphs: dict[ComponentId, Graph] = {}
        if tiling != WHOLE:
            for key, entry in bundle.components.items():
                if key.role in ("vae_decoder", "vae_encoder", "upscaler") and entry.footprint is None:
                    raise BundleError(f"the bundle does not say what memory {key} takes, so that it cannot be tiled")

    def decode(self, latents: Float32, stage: str = "", *, go_on: GoOn = lambda: None) -> Float32:
        """Latents [C, h, w], as the sampler leaves them, to a picture."""
        key, ratio = replace(VAE_DECODER, stage=stage), Ratio(up=self._scale(stage))
        return self._run(key, latents, "latents", "pixels", ratio, go_on)

    def encode(self, picture: Float32, stage: str = "", *, go_on: GoOn = lambda: None) -> Float32:
        """A picture to the moments of its latents, [2C, h, w]. Tiles blend moments, as diffusers does."""
        key, ratio = replace(VAE_ENCODER, stage=stage), Ratio(down=self._scale(stage))
        return self._run(key, picture, "pixels", "moments", ratio, go_on)

    def upscale(self, image: Float32, stage: str, *, go_on: GoOn = lambda: None) -> Float32:
        """An image in 0..1 through a feed-forward network, clipped to 0..1."""
        card = self._bundle.stages[stage]
        height, width = image.shape[1:]
        padded = pad(image, card.size_multiple, card.least)
        key = ComponentId("upscaler", "upscaler", stage=stage)
        made = self._run(key, padded, "image", "pixels", Ratio(up=card.scale), go_on, card.size_multiple)
        found: Float32 = np.clip(made[:, : height * card.scale, : width * card.scale], 0.0, 1.0)
        return found

    def check(self, legs: Sequence[Leg], *, encodes: bool) -> None:
        """Refuse a request whose pictures the budget has no tile for. encodes: its first leg reads an init image.

        Raises RequestError."""
        if self._tiling.memory is None:
            return
        for leg, follower in zip(legs, (*legs[1:], None), strict=True):
            model, scale = self._bundle.model(leg.stage), 1 if leg.card is None else leg.card.scale
            height, width = leg.size.height // scale, leg.size.width // scale  # of what it reads
            if leg.is_network:
                assert leg.card is not None
                multiple, least = leg.card.size_multiple, leg.card.least
                height, width = _padded(height, multiple, least), _padded(width, multiple, least)
                self._tile(ComponentId("upscaler", "upscaler", stage=leg.stage), height, width, multiple)
                continue
            assert model is not None
            if encodes or (leg.card is not None and leg.card.kind == "x2" and not leg.reads_latents):
                self._tile(replace(VAE_ENCODER, stage=leg.stage), height, width, model.vae_scale)
            if follower is None or not follower.reads_latents:
                _, rows, columns = model.latent_shape(leg.size)
                self._tile(replace(VAE_DECODER, stage=leg.stage), rows, columns)
            encodes = False

    def open(self, key: ComponentId) -> Graph:
        """A network, loaded when it is first used."""
        if key not in self._graphs:
            self._graphs[key] = self._backend.open(key)
        return self._graphs[key]

    def _scale(self, stage: str) -> int:
        model = self._bundle.model(stage)
        assert model is not None
        return model.vae_scale

    def _run(
        self, key: ComponentId, values: Float32, reads: str, makes: str, ratio: Ratio, go_on: GoOn, multiple: int = 1
    ) -> Float32:
        graph = self.open(key)
        height, width = values.shape[1:]

        def run(part: Float32) -> Float32:
            go_on()
            made: Float32 = graph({reads: np.ascontiguousarray(part[None], np.float32)})[makes][0].copy()
            return made

        made = self._tiled(run, key, values, height, width, ratio, math.lcm(multiple, ratio.down))
        if not math.isfinite(float(made.sum())):
            half = f"; in {self._backend.precision} its values may exceed the range" * (
                self._backend.precision == "fp16"
            )
            raise GenerationError(f"what {key} made is not finite{half}")
        return made

    def _tiled(
        self, run: Callable[[Float32], Float32], key: ComponentId, values: Float32, height: int, width: int,
        ratio: Ratio, multiple: int,
    ) -> Float32:  # fmt: skip
        footprint = self._bundle.components[key].footprint
        if self._tiling.kind == "diffusers" and footprint is not None and footprint.tile:
            return as_diffusers(run, values, footprint.tile, ratio)
        tile = self._tile(key, height, width, multiple)
        return run(values) if tile is None else even(run, values, tile, ratio, multiple)

    def _tile(self, key: ComponentId, height: int, width: int, multiple: int = 1) -> Tile | None:
        """None: the picture passes in one piece. Raises RequestError."""
        component = self._bundle.components.get(key)
        if component is None or component.footprint is None:
            return None
        if self._tiling.kind == "diffusers" and component.footprint.tile:
            return None  # diffusers' tiles, whatever they take
        return self._tiling.tile(component.footprint, height, width, multiple, str(key))


def _padded(length: int, multiple: int, least: int) -> int:
    return math.ceil(max(length, least) / multiple) * multiple


def pad(image: Float32, multiple: int, least: int) -> Float32:
    """Right and bottom by reflection to multiples of a size and a least one, as spandrel's `pad_tensor`; what lies beyond the
    picture's reflection repeats the last row or column."""
    for axis in (1, 2):
        length = image.shape[axis]
        more = _padded(length, multiple, least) - length
        mirrored = min(more, length - 1)
        for count, mode in ((mirrored, "reflect"), (more - mirrored, "edge")):
            spread = [(0, 0)] * 3
            spread[axis] = (0, count)
            image = np.pad(image, spread, mode=mode) if count else image  # type: ignore[call-overload]
    return image
