"""Pictures in bodies: bytes of an upload, or a data URL. A path or an address is never followed."""

from __future__ import annotations

import base64
import binascii
import re

import numpy as np
from PIL import Image

from stepforge.runtime.checks import shown
from stepforge.runtime.errors import RequestError
from stepforge.runtime.imaging.read import Picture, check_image, image_size, read_image
from stepforge.runtime.serve.http.errors import bad

_DATA_URL = re.compile(r"data:image/(?:png|jpeg|jpg|webp);base64,", re.IGNORECASE)
MASK_MODES = ("alpha", "white")


def picture(where: str, given: object) -> bytes:
    """The bytes of a picture's file, its header checked. Raises ApiError with the field's name."""
    if isinstance(given, str):
        given = _decoded(where, given)
    if not isinstance(given, bytes):
        raise bad(
            f"{where} is {shown(given)}; give a data URL, or an upload in a form", param=where, code="invalid_image"
        )
    if not given:
        raise bad(f"{where} is empty", param=where, code="invalid_image")
    try:
        check_image(given)
    except RequestError as error:
        raise bad(f"{where}: {error}", param=where, code="invalid_image") from None
    return given


def _decoded(where: str, text: str) -> bytes:
    start = _DATA_URL.match(text)
    if start is None:
        raise bad(
            f"{where} is no data URL of a PNG, JPEG or WebP image; this server opens no paths, addresses and file ids: "
            "send the image itself",
            param=where, code="invalid_image",
        )  # fmt: skip
    try:
        return base64.b64decode(text[start.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise bad(f"{where} is not valid base64", param=where, code="invalid_image") from None


def mask_of(given: bytes, image: bytes, mode: str) -> Picture:
    """A mask whose white is drawn anew, as `Init` takes it.

    mode: "alpha", OpenAI's, where what is transparent is drawn anew; "white", A1111's and diffusers', where white is.
    Raises ApiError, RequestError.
    """
    if image_size(given) != image_size(image):
        raise bad("mask has another size than the image", param="mask", code="invalid_image")
    mask = read_image(given)
    if mode == "white":
        return Picture.of(mask)
    if mask.mode != "RGBA":
        raise bad(
            "mask has no transparent part; what is transparent is drawn anew. For white on black give mask_mode: white",
            param="mask", code="invalid_image",
        )  # fmt: skip
    return Picture.of(Image.fromarray(255 - np.asarray(mask.getchannel("A"))))
