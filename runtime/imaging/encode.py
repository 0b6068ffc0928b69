"""Pictures as the bytes of a file."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from stepforge.runtime.imaging.png import PNG_LEVEL, text_chunks

FORMATS = {"png": "png", "webp": "webp", "jpeg": "jpg"}  # -> ending of the name


def encode(image: Image.Image, kind: str, *, quality: int = 90, metadata: Mapping[str, Any] | None = None) -> bytes:
    """The same bytes for the same picture. quality: of WebP and JPEG, 1 to 100. metadata: text chunks of a PNG alone, see
    `save_png`."""
    buffer = io.BytesIO()
    if kind == "png":
        chunks = None if metadata is None else text_chunks(metadata)
        image.save(buffer, "PNG", compress_level=PNG_LEVEL, pnginfo=chunks)
    else:
        image.save(buffer, kind.upper(), quality=quality)
    return buffer.getvalue()
