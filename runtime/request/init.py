"""The image that a request starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from stepforge.runtime.checks import flag, real, shown
from stepforge.runtime.errors import RequestError
from stepforge.runtime.imaging.read import Picture
from stepforge.runtime.request.control import ImageSource, kept_image

STRENGTH, MASKED_STRENGTH = 0.8, 1.0  # defaults of diffusers' img2img and inpainting pipelines


@dataclass(frozen=True, slots=True, kw_only=True, init=False)
class Init:
    """An image to start from; a value: immutable, hashable, compared by what it says.

        Request(prompt="a cat", init=Init(image="dog.png", strength=0.6))
        Request(prompt="a cat", init=Init(image="dog.png", mask="head.png"))    white of the mask is drawn anew

    strength: share of the steps that run, above 0; 0.8 by default, and 1 with a mask. At 1 with a mask the masked part
    starts from noise alone. image, mask: a path or the bytes of a file, which are read when the request starts; or a PIL
    image or an array, of which a copy is kept. The picture has the image's size, down to the model's multiple, unless the
    request says width and height; both are resized to it as diffusers does (Lanczos).
    overlay: put the image's own pixels back where the mask is black; diffusers leaves there what the VAE makes of them.
    Raises RequestError for values that no model can run.
    """

    image: Path | bytes | Picture = field(repr=False)
    mask: Path | bytes | Picture | None = field(repr=False)
    strength: float
    overlay: bool

    def __init__(
        self,
        *,
        image: ImageSource,
        mask: ImageSource | None = None,
        strength: float | None = None,
        overlay: bool = False,
    ) -> None:
        default = STRENGTH if mask is None else MASKED_STRENGTH
        value = default if strength is None else real(strength)
        if value is None or not 0.0 < value <= 1.0:
            raise RequestError(f"strength is {shown(strength)}; it lies above 0 and up to 1")
        if flag("overlay", overlay) and mask is None:
            raise RequestError("overlay puts back what a mask keeps; give a mask")
        put = object.__setattr__
        put(self, "image", kept_image(image))
        put(self, "mask", None if mask is None else kept_image(mask))
        put(self, "strength", value)
        put(self, "overlay", overlay)

    @classmethod
    def of(cls, given: object) -> Init | None:
        """An Init, a mapping of its fields, or None as they are. Raises RequestError."""
        if given is None or isinstance(given, Init):
            return given
        known = [option.name for option in fields(cls)]
        if not isinstance(given, Mapping) or "image" not in given:
            raise RequestError(f"init is {shown(given)}; give an Init, or an image and any of {', '.join(known[1:])}")
        if unknown := [key for key in given if key not in known]:
            raise RequestError(f"init has no {shown(unknown[0])}; it has {', '.join(known)}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """What is stated but the pictures, as plain values for JSON."""
        return {"strength": self.strength, **({"overlay": True} if self.overlay else {})}
