"""Where generated images go: one file, a folder, or a pattern of names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stepforge.runtime.errors import RequestError
from stepforge.runtime.files import printable
from stepforge.runtime.imaging.metadata import describe_image
from stepforge.runtime.imaging.png import save_png

if TYPE_CHECKING:
    from stepforge.runtime.request import Result

IN_FOLDER = "{index:05d}-{seed}.png"
OTHER_FORMATS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jxl", ".heic")


def image_paths(out: str | Path, images: Sequence[tuple[int, int]]) -> list[Path]:
    """A path for each image, given as (index, seed).

        cat.png           the file, for one image
        {seed}-cat.png    a pattern for any number of them; {index} and {seed} take format codes, as {index:03d}
        out               a folder: out/00000-7.png, out/00001-8.png, ...

    Raises RequestError for other formats and for several images under one name.
    """
    out = Path(out)
    if out.suffix.lower() in OTHER_FORMATS:
        raise RequestError(f"{printable(out)} does not end in .png; only PNG is written")
    if "{" in str(out):
        return _named(out, images)
    if out.suffix.lower() != ".png":
        return _named(out / IN_FOLDER, images)
    if len(images) > 1:
        raise RequestError(
            f"{printable(out)} is one file, but there are {len(images)} images; give a folder, or a name with {{index}}"
        )
    return [out]


def _named(pattern: Path, images: Sequence[tuple[int, int]]) -> list[Path]:
    try:
        paths = [Path(str(pattern).format(index=index, seed=seed)) for index, seed in images]
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise RequestError(
            f"{printable(pattern)} is not a pattern of names; {{index}} and {{seed}} may stand in it"
        ) from error
    if any(path.suffix.lower() != ".png" for path in paths):
        raise RequestError(f"{printable(pattern)} does not end in .png; only PNG is written")
    if len(set(paths)) < len(paths):
        raise RequestError(f"{printable(pattern)} gives several images one name; put {{index}} or {{seed}} in it")
    return paths


def save_result(result: Result, out: str | Path, *, overwrite: bool = False, metadata: bool = True) -> list[Path]:
    """Write the images of a result as PNG files, each in one atomic step, and return their paths in order.

    out: see `image_paths`; the index counts the images. Missing folders are made. metadata: write the request into each
    file (see `save_png`). Raises RequestError, before anything is written, if a name is refused or taken; OSError.
    """
    paths = image_paths(out, list(enumerate(result.seeds)))
    for path in paths:
        if path.exists() and not overwrite:
            raise RequestError(f"{printable(path)} exists; choose another name or allow overwriting")
    for index, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(result.images[index], path, describe_image(result, index) if metadata else None, overwrite=overwrite)
    return paths
