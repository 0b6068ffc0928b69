"""What SDXL is told of a picture beside the prompt: sizes, crop and aesthetic score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from stepforge.runtime.checks import listed, real, shown, whole
from stepforge.runtime.errors import RequestError

MOST_PIXELS = 1 << 16
AESTHETIC, NEGATIVE_AESTHETIC = 6.0, 2.5  # defaults of diffusers' SDXL pipelines
MOST_AESTHETIC = 100.0

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True, init=False)
class Micro:
    """SDXL's micro-conditioning (Podell et al., arXiv:2307.01952); a value, with diffusers' names, but one crop.

        Request(prompt="a cat", micro=Micro(original_size=(512, 768), crop=(0, 64)))

    Sizes are (height, width), crops (top, left), all in pixels; a size of None is the picture's. They are numbers for the
    network and change no picture's size. The negative ones are of unconditional rows. The base model reads them only where both
    negative sizes are given; the refiner, which reads no target size, has the positive size where there is no negative one.
    Raises RequestError for values that are no sizes, and for a negative crop or size that the base model would not read.
    """

    original_size: Pair | None
    crop: Pair
    target_size: Pair | None
    negative_original_size: Pair | None
    negative_crop: Pair
    negative_target_size: Pair | None
    aesthetic_score: float  # the refiner's
    negative_aesthetic_score: float

    def __init__(
        self,
        *,
        original_size: Pair | None = None,
        crop: Pair = (0, 0),
        target_size: Pair | None = None,
        negative_original_size: Pair | None = None,
        negative_crop: Pair = (0, 0),
        negative_target_size: Pair | None = None,
        aesthetic_score: float = AESTHETIC,
        negative_aesthetic_score: float = NEGATIVE_AESTHETIC,
    ) -> None:
        given = dict(locals())
        values: dict[str, Any] = {
            name: None if given[name] is None else _pair(name, given[name], 1)
            for name in ("original_size", "target_size", "negative_original_size", "negative_target_size")
        }
        values |= {name: _pair(name, given[name], 0) for name in ("crop", "negative_crop")}
        values |= {name: _score(name, given[name]) for name in ("aesthetic_score", "negative_aesthetic_score")}
        sizes = values["negative_original_size"], values["negative_target_size"]
        if None in sizes and (sizes != (None, None) or values["negative_crop"] != (0, 0)):
            raise RequestError(
                "negative_original_size and negative_target_size are given together, and negative_crop with them"
            )
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, given: Micro | Mapping[str, Any]) -> Micro:
        """A Micro, or a mapping of its fields. Raises RequestError."""
        if isinstance(given, cls):
            return given
        known = [option.name for option in fields(cls)]
        if not isinstance(given, Mapping):
            raise RequestError(f"micro is {shown(given)}; give a Micro, or a mapping of {', '.join(known)}")
        if unknown := [name for name in given if name not in known]:
            raise RequestError(f"micro has no {shown(unknown[0])}; it has {', '.join(known)}")
        return cls(**given)

    def numbers(self, size: Pair, *, is_cond: bool, aesthetic: bool) -> tuple[float, ...]:
        """time_ids of a row: 6 numbers, or 5 with an aesthetic score. size: of the picture, (height, width)."""
        original = self.original_size or size
        if aesthetic:
            if is_cond:
                return (*original, *self.crop, self.aesthetic_score)
            return (*(self.negative_original_size or original), *self.negative_crop, self.negative_aesthetic_score)
        if is_cond or self.negative_original_size is None or self.negative_target_size is None:
            return (*original, *self.crop, *(self.target_size or size))
        return (*self.negative_original_size, *self.negative_crop, *self.negative_target_size)

    def to_dict(self) -> dict[str, Any]:
        """What is not a default, as plain values for JSON."""
        plain = Micro()
        stated = {option.name: getattr(self, option.name) for option in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in stated.items()
            if value != getattr(plain, name)
        }


def _pair(name: str, given: object, least: int) -> Pair:
    values = listed(name, given, 2)
    if len(values) != 2:
        raise RequestError(f"{name} is {shown(given)}; give two numbers, the vertical one first")
    first, second = (whole(name, value, least, MOST_PIXELS) for value in values)
    return first, second


def _score(name: str, given: object) -> float:
    value = real(given)
    if value is None or not 0 <= value <= MOST_AESTHETIC:
        raise RequestError(f"{name} is {shown(given)}; it lies between 0 and {MOST_AESTHETIC:g}")
    return value
