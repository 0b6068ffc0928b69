"""Hints of ControlNets: what each is shown is drawn and encoded once while it is remembered, by the digest of its image."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from stepforge.runtime.arrays import Float32
from stepforge.runtime.backends import Graph
from stepforge.runtime.bundle import ComponentId, Size
from stepforge.runtime.errors import GenerationError, RequestError
from stepforge.runtime.files import printable
from stepforge.runtime.imaging.preprocess import Recipe, hint_of
from stepforge.runtime.imaging.read import Picture
from stepforge.runtime.request import Control

CACHED_BYTES = 64 << 20  # encoded hints, LRU
CACHED_DIGESTS = 1024  # LRU

Drawing = tuple[str, Recipe, Size]  # digest of an image's file or pixels, and what is drawn of it


class Hints:
    """open_graph: a hint encoder by its component. Only the engine's thread calls it."""

    def __init__(self, open_graph: Callable[[ComponentId], Graph]) -> None:
        self._open = open_graph
        self._digests: OrderedDict[Drawing, str] = OrderedDict()
        self._encoded: OrderedDict[tuple[str, Drawing], Float32] = OrderedDict()

    def digest(self, control: Control, size: Size) -> str:
        """sha256 of the hint image, float32 [3, height, width]. Raises RequestError if the image cannot be read."""
        drawing = _drawing(control, size)
        if drawing not in self._digests:
            self._draw(control, drawing)
        return self._digests[drawing]

    def encoded(self, control: Control, size: Size) -> tuple[str, Float32, bool]:
        """The hint image's digest, the encoded hint [C, h, w], and whether the encoder ran for it."""
        drawing = _drawing(control, size)
        key = control.name, drawing
        if key in self._encoded and drawing in self._digests:
            self._encoded.move_to_end(key)
            self._digests.move_to_end(drawing)
            return self._digests[drawing], self._encoded[key], False
        image = self._draw(control, drawing)
        hint = np.array(self._open(ComponentId("control_hint", control.name))({"image": image[None]})["hint"][0])
        if not math.isfinite(float(hint.sum())):  # never kept: the next request may fare better
            raise GenerationError(f"what the hint encoder of {control.name} made is not finite")
        self._encoded[key] = hint
        while sum(hint.nbytes for hint in self._encoded.values()) > CACHED_BYTES:
            self._encoded.popitem(last=False)
        return self._digests[drawing], hint, True

    def _draw(self, control: Control, drawing: Drawing) -> Float32:
        _, recipe, size = drawing
        image = hint_of(control.image, recipe, size.width, size.height)
        self._digests[drawing] = hashlib.sha256(image.tobytes()).hexdigest()
        if len(self._digests) > CACHED_DIGESTS:
            self._digests.popitem(last=False)
        return image


def _drawing(control: Control, size: Size) -> Drawing:
    return image_digest(control.image), control.preprocessor, size


def image_digest(image: Path | bytes | Picture) -> str:
    """sha256 of an image's file or pixels. Raises RequestError if it cannot be read."""
    if isinstance(image, Path):
        try:
            with image.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
        except OSError as error:
            raise RequestError(f"image {printable(image)} cannot be read: {error.strerror}") from error
    elif isinstance(image, Picture):
        digest = hashlib.sha256(f"{image.mode} {image.width} {image.height} ".encode() + image.pixels)
    else:
        digest = hashlib.sha256(image)
    return digest.hexdigest()
