"""Pixels to pictures: rounding, PNG files with their metadata, contact sheets."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from stepforge.runtime.errors import GenerationError, RequestError

A1111_SAMPLERS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "deis": "DEIS",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m": "DPM++ 3M",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "kdpm2": "DPM2",
    "lcm": "LCM",
    "lms": "LMS",
    "pndm": "PLMS",
    "tcd": "TCD",
    "unipc": "UniPC",
}
MAX_SHEET = 80_000_000  # pixels of a contact sheet; Pillow warns when it opens more than 89 million
LABEL_LINES = 2
GAP = 4  # pixels around each cell of a contact sheet


def to_uint8(decoded: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Decoded pixels in [−1, 1], [n, 3, h, w], to bytes, [n, h, w, 3]; beyond the range they are clipped.

    Rounds as diffusers' VaeImageProcessor does: half to even, in float32. Raises GenerationError for NaN.
    """
    unit = np.clip(np.asarray(decoded, np.float32) * np.float32(0.5) + np.float32(0.5), 0, 1)
    if np.isnan(unit.max(initial=0)):
        raise GenerationError("the decoded image contains NaN; run the model in a higher precision")
    return np.ascontiguousarray(np.rint(unit * np.float32(255)).astype(np.uint8).transpose(0, 2, 3, 1))


def to_pil(pixels: NDArray[np.uint8]) -> list[Image.Image]:
    """Bytes, [n, h, w, 3], to RGB pictures."""
    return [Image.fromarray(image) for image in pixels]


def save_png(
    image: Image.Image, path: str | Path, metadata: Mapping[str, Any] | None = None, *, overwrite: bool = False
) -> None:
    """Write a PNG in one atomic step: whoever looks sees no file, the old file, or the whole new one.

    metadata (see `a1111_parameters` for the keys that are read) goes into two text chunks: `parameters`, for A1111 and
    what reads its pictures, and `stepforge`, all of it as JSON. None writes neither.
    Raises RequestError if the path does not end in .png, its folder is missing, or it exists and overwrite is False.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise RequestError(f"{path} does not end in .png; only PNG is written")
    if not path.parent.is_dir():
        raise RequestError(f"{path.parent} is not a folder; create it first")
    if path.is_dir():
        raise RequestError(f"{path} is a folder; name a file")
    if path.exists() and not overwrite:
        raise _exists(path)
    chunks = None if metadata is None else _chunks(metadata)
    # compression level 1: 115 ms for a noisy 1024² picture; level 6 takes 346 ms and saves 15 % (reference: engines.md)
    partial = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with partial.open("xb") as file:
            image.save(file, "PNG", compress_level=1, pnginfo=chunks)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            partial.replace(path)
        else:
            _publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _publish(partial: Path, path: Path) -> None:
    """Give the file its name unless another process took it meanwhile."""
    try:
        path.hardlink_to(partial)
    except FileExistsError:
        raise _exists(path) from None
    except OSError:  # a file system without hard links: the check made before writing is all there is
        partial.replace(path)


def _exists(path: Path) -> RequestError:
    return RequestError(f"{path} exists; choose another name or allow overwriting")


def _chunks(metadata: Mapping[str, Any]) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    try:
        chunks.add_text("parameters", a1111_parameters(metadata))  # tEXt if it is Latin-1, else iTXt
        chunks.add_text("stepforge", json.dumps(metadata))
    except (TypeError, ValueError) as error:
        raise RequestError(f"metadata cannot be written as text and JSON: {error}") from error
    return chunks


def a1111_parameters(metadata: Mapping[str, Any]) -> str:
    """The `parameters` text of A1111, from the keys prompt, negative, steps, sampler, schedule, guidance, seed, width,
    height and model. What is absent, and guidance that is not one number, is left out."""
    guidance = metadata.get("guidance")
    schedule = metadata.get("schedule")
    sampler = metadata.get("sampler")
    facts = {
        "Steps": metadata.get("steps"),
        "Sampler": A1111_SAMPLERS.get(sampler, sampler) if isinstance(sampler, str) else None,
        "Schedule type": schedule.title() if isinstance(schedule, str) else None,
        "CFG scale": f"{guidance:g}" if isinstance(guidance, (int, float)) else None,
        "Seed": metadata.get("seed"),
        "Size": f"{metadata['width']}x{metadata['height']}" if {"width", "height"} <= metadata.keys() else None,
        "Model": metadata.get("model"),
    }
    lines = [str(metadata.get("prompt", ""))]
    if metadata.get("negative"):
        lines.append(f"Negative prompt: {metadata['negative']}")
    lines.append(", ".join(f"{name}: {_quote(str(fact))}" for name, fact in facts.items() if fact is not None))
    return "\n".join(lines)


def _quote(fact: str) -> str:
    """A1111 quotes a value that holds one of its separators."""
    return json.dumps(fact, ensure_ascii=False) if any(mark in fact for mark in ",:\n") else fact


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The text chunks of a PNG, without decoding its pixels; `stepforge` is parsed from JSON.

    Raises RequestError if the file is no PNG, is damaged, or its `stepforge` chunk is no JSON object.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            found: dict[str, Any] = {str(key): str(text) for key, text in image.info.items() if isinstance(text, str)}
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RequestError(f"{path} cannot be read as a PNG: {error}") from error
    if "stepforge" not in found:
        return found
    try:
        ours = json.loads(found["stepforge"])
    except (ValueError, RecursionError):
        ours = None
    if not isinstance(ours, dict):
        raise RequestError(f"{path} has a stepforge chunk that is not a JSON object; the file was changed")
    return {**found, "stepforge": ours}


def contact_sheet(
    images: Sequence[Image.Image],
    *,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    upscale: int = 1,
) -> Image.Image:
    """All pictures on one white sheet, row by row, each in a cell of the largest size, with its label below.

    columns: None makes the sheet about square. upscale: a whole factor, by nearest neighbour. Labels are wrapped to two
    lines and cut with "..."; Pillow's own font has Latin letters only. Raises RequestError for a sheet that cannot be.
    """
    if not images:
        raise RequestError("a contact sheet needs at least one picture")
    if labels is not None and len(labels) != len(images):
        raise RequestError(f"{len(labels)} labels for {len(images)} pictures; give one for each")
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1 or upscale < 1:
        raise RequestError(f"columns is {columns} and upscale {upscale}; both must be 1 or more")
    columns = min(columns, len(images))
    font = ImageFont.load_default(12)
    line = math.ceil(sum(font.getmetrics())) if isinstance(font, ImageFont.FreeTypeFont) else 12
    cell_width = upscale * max(image.width for image in images)
    cell_height = upscale * max(image.height for image in images)
    pitch = (cell_width + GAP, cell_height + GAP + (LABEL_LINES * line if labels else 0))
    size = (columns * pitch[0] + GAP, math.ceil(len(images) / columns) * pitch[1] + GAP)
    if size[0] * size[1] > MAX_SHEET:
        raise RequestError(f"the contact sheet would be {size[0]}x{size[1]}; at most {MAX_SHEET} pixels are allowed")
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        left = GAP + index % columns * pitch[0]
        top = GAP + index // columns * pitch[1]
        scaled = image.convert("RGB").resize((image.width * upscale, image.height * upscale), Image.Resampling.NEAREST)
        sheet.paste(scaled, (left + (cell_width - scaled.width) // 2, top + (cell_height - scaled.height) // 2))
        for row, text in enumerate(_wrap(labels[index], font, cell_width) if labels else ()):
            draw.text((left, top + cell_height + row * line), text, "black", font)
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """`text` in at most LABEL_LINES lines that are no wider than `width` pixels."""
    rest = " ".join(text[:1000].encode("utf-8", "replace").decode().split())
    lines: list[str] = []
    while rest and len(lines) < LABEL_LINES:
        fit = _fitting(rest, font, width)
        if fit < len(rest) and len(lines) == LABEL_LINES - 1:
            lines.append(rest[: _fitting(rest, font, width - math.ceil(font.getlength("...")))].rstrip() + "...")
            break
        space = rest.rfind(" ", 0, fit + 1) if fit < len(rest) else fit
        end = space if space > 0 else max(fit, 1)
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    return lines


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> int:
    """How many leading characters of `text` are no wider than `width` pixels."""
    return next((end - 1 for end in range(1, len(text) + 1) if font.getlength(text[:end]) > width), len(text))
