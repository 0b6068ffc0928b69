"""One ControlNet of a request: what it is shown, how strongly, and when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stepforge.runtime.checks import MAX_NAME, clipped, flag, listed, real, shown, text
from stepforge.runtime.errors import RequestError
from stepforge.runtime.imaging.preprocess import Recipe
from stepforge.runtime.imaging.read import Picture
from stepforge.runtime.plan.guidance import MAX_WEIGHTS
from stepforge.runtime.plan.windows import Window

MAX_SCALE = 10.0  # largest scale of residuals

ImageSource = str | Path | bytes | Picture | Image.Image | NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True, init=False)
class Control:
    """One ControlNet of a request; a value: immutable, hashable, compared by what it says.

    It runs in evaluation i of n where start <= i/n and (i + 1)/n <= end, as in diffusers, and, if `sigma` is given, where
    sigma[0] < sigma of the step <= sigma[1]. Elsewhere it is not run.

    image: a path or the bytes of a file, which are read when the request starts; or a PIL image or an array, of which a
    copy is kept (see imaging.read). Raises RequestError for values that no model can run.
    """

    name: str  # ControlNet's name in the bundle
    image: Path | bytes | Picture = field(repr=False)
    preprocessor: Recipe  # see preprocess.py
    scale: float | tuple[float, ...]  # scale of its residuals; one number, or one an evaluation
    start: float
    end: float
    sigma: tuple[float, float] | None
    guess_mode: bool  # conditional rows only, residuals scaled from 0.1 to 1 by depth

    def __init__(
        self,
        *,
        name: str,
        image: ImageSource,
        preprocessor: Recipe | str = "none",
        scale: float | Sequence[float] = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        sigma: Sequence[float] | None = None,
        guess_mode: bool = False,
    ) -> None:
        name = text("the name of a ControlNet", name, MAX_NAME)
        what = f"ControlNet {clipped(name, 60)!r}"
        put = object.__setattr__
        put(self, "name", name)
        put(self, "image", kept_image(image))
        put(self, "preprocessor", Recipe.parse(preprocessor))
        put(self, "scale", _scale(what, scale))
        window = real(start), real(end)
        if window[0] is None or window[1] is None or not 0.0 <= window[0] < window[1] <= 1.0:
            raise RequestError(f"{what} runs from {shown(start)} to {shown(end)}; give 0 <= start < end <= 1")
        put(self, "start", window[0])
        put(self, "end", window[1])
        put(self, "sigma", None if sigma is None else _sigma(what, sigma))
        put(self, "guess_mode", flag(f"guess_mode of {what}", guess_mode))

    @property
    def window(self) -> Window:
        return Window(self.name, self.scale, self.start, self.end, self.sigma)

    def to_dict(self) -> dict[str, Any]:
        """Fields but the image as plain values for JSON; texts are canonical."""
        return {
            "name": self.name,
            "preprocessor": str(self.preprocessor),
            "scale": self.scale,
            "start": self.start,
            "end": self.end,
            **({"sigma": self.sigma} if self.sigma else {}),
            "guess_mode": self.guess_mode,
        }


def controls_of(given: object, most: int) -> tuple[Control, ...]:
    """Controls, or mappings of their fields, or one of them alone. Raises RequestError."""
    if isinstance(given, Control | Mapping):
        given = (given,)
    if isinstance(given, list | tuple) and not given:
        return ()
    return tuple(_control(control) for control in listed("controls", given, most))


def _control(given: object) -> Control:
    if isinstance(given, Control):
        return given
    known = [field.name for field in fields(Control)]
    fault = "has no name or no image"
    if not isinstance(given, Mapping):
        fault = f"is of type {type(given).__name__}"
    elif unknown := [key for key in given if key not in known]:
        fault = f"has no {shown(unknown[0])}"
    elif {"name", "image"} <= given.keys():
        return Control(**given)
    raise RequestError(f"a control {fault}; give name and image, and any of {', '.join(known[2:])}")


def kept_image(source: Any) -> Path | bytes | Picture:
    """An image as values of requests keep it: a path or bytes, or a copy of its pixels. Raises RequestError."""
    if isinstance(source, Picture):
        return source
    if isinstance(source, str | Path):
        return Path(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, Image.Image | np.ndarray):
        return Picture.of(source)
    raise RequestError(f"the image is of type {type(source).__name__}; give a path, bytes, a PIL image or an array")


def _scale(what: str, given: object) -> float | tuple[float, ...]:
    single = real(given)
    try:
        values = (single,) if single is not None else tuple(map(real, listed("scale", given, MAX_WEIGHTS)))
    except RequestError:
        values = (None,)
    checked = tuple(value for value in values if value is not None and abs(value) <= MAX_SCALE)
    if len(checked) != len(values):
        raise RequestError(
            f"the scale of {what} is {shown(given)}; give a number up to ±{MAX_SCALE:g}, or one for each step"
        )
    return checked[0] if single is not None else checked


def _sigma(what: str, given: object) -> tuple[float, float]:
    try:
        low, high = (real(value) for value in listed("sigma", given, 2))
    except ValueError:  # one of them, or RequestError
        low = high = None
    if low is None or high is None or not 0 <= low < high:
        raise RequestError(f"the sigmas of {what} are {shown(given)}; give two, the lower first")
    return low, high
