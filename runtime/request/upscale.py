"""One super-resolution stage of a request: which, and how it samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepforge.runtime.bundle.scheduler import SAMPLER_NAMES, SCHEDULES
from stepforge.runtime.checks import MAX_NAME, choice, clipped, listed, shown, text, whole
from stepforge.runtime.errors import RequestError
from stepforge.runtime.imaging.read import Picture
from stepforge.runtime.plan.guidance import Guidance, parse_guidance
from stepforge.runtime.request.control import ImageSource, kept_image

if TYPE_CHECKING:
    from stepforge.runtime.request.request import Request

MAX_STEPS = 1000
MAX_LEVEL = 100_000  # highest noise level that any stage could have; a stage's own limit stands in its card
MAX_SEED = 2**64 - 1
MAX_PROMPT = 20_000  # characters


@dataclass(frozen=True, slots=True, kw_only=True, init=False)
class Upscale:
    """One super-resolution stage of a request; a value: immutable, hashable, compared by what it says.

        Request(prompt="a cat", upscale=Upscale(name="x4", steps=20))
        Request(prompt="a cat", upscale=("x2", Upscale(name="x4", guidance=1.0)))    first x2, then x4

        Request(prompt="a cat", upscale=Upscale(name="x4", image="cat.png"))         x4 alone, of a given picture

    What is None is the stage's own (`StageCard`), prompts are then the request's. image: what the first stage enlarges in
    place of an image of the request's own: the base model is not run. A path or the bytes of a file, which are read when
    the request starts, or a PIL image or an array, of which a copy is kept. seed: None continues the stream of
    random numbers of the stage before, as diffusers' pipelines do that share a generator; a number starts one of the
    stage's own, image i with seed + i. Feed-forward networks take none of these.
    Raises RequestError for values that no stage can run.
    """

    name: str  # stage's name in the bundle
    prompt: str | None
    negative: str | None
    steps: int | None
    sampler: str | None
    schedule: str | None
    noise_level: int | None  # noise on the low-resolution image, a timestep of the stage's own schedule for it
    guidance: Guidance | None  # 0: the unconditional row alone
    seed: int | None
    image: Path | bytes | Picture | None = field(repr=False)

    def __init__(
        self,
        *,
        name: str,
        prompt: str | None = None,
        negative: str | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        schedule: str | None = None,
        noise_level: int | None = None,
        guidance: Guidance | str | list[float] | None = None,
        seed: int | None = None,
        image: ImageSource | None = None,
    ) -> None:
        name = text("the name of a stage", name, MAX_NAME)
        of = f"of stage {clipped(name, 60)!r}"
        checked = {
            "name": name,
            "prompt": None if prompt is None else text(f"prompt {of}", prompt, MAX_PROMPT),
            "negative": None if negative is None else text(f"negative {of}", negative, MAX_PROMPT),
            "steps": None if steps is None else whole(f"steps {of}", steps, 1, MAX_STEPS),
            "sampler": None if sampler is None else choice(f"sampler {of}", sampler, SAMPLER_NAMES),
            "schedule": None if schedule is None else choice(f"schedule {of}", schedule, SCHEDULES),
            "noise_level": None if noise_level is None else whole(f"noise_level {of}", noise_level, 0, MAX_LEVEL),
            "guidance": None if guidance is None else parse_guidance(guidance),
            "seed": None if seed is None else whole(f"seed {of}", seed, 0, MAX_SEED),
            "image": None if image is None else kept_image(image),
        }
        for option, value in checked.items():
            object.__setattr__(self, option, value)

    def prompts(self, request: Request) -> tuple[str, str]:
        """Prompt and negative prompt of the stage."""
        prompt = request.prompt if self.prompt is None else self.prompt
        return prompt, request.negative if self.negative is None else self.negative

    def to_dict(self) -> dict[str, Any]:
        """What is stated but the image, as plain values for JSON; texts are canonical."""
        stated = {option.name: getattr(self, option.name) for option in fields(self) if option.name != "image"}
        if self.guidance is not None and not isinstance(self.guidance, float | tuple):
            stated["guidance"] = str(self.guidance)
        return {name: value for name, value in stated.items() if value is not None}


def stages_of(given: object, most: int) -> tuple[Upscale, ...]:
    """Stages in the order in which an image passes them: each an Upscale, its name, or a mapping of its fields; or one of
    these alone. Raises RequestError."""
    if isinstance(given, Upscale | Mapping | str):
        given = (given,)
    if isinstance(given, list | tuple) and not given:
        return ()
    stages = tuple(_stage(stage) for stage in listed("upscale", given, most))
    if any(stage.image is not None for stage in stages[1:]):
        raise RequestError(
            "only the first upscale stage can be given an image; the others enlarge what comes before them"
        )
    return stages


def _stage(given: object) -> Upscale:
    if isinstance(given, Upscale):
        return given
    if isinstance(given, str):
        return Upscale(name=given)
    known = [option.name for option in fields(Upscale)]
    fault = "has no name"
    if not isinstance(given, Mapping):
        fault = f"is {shown(given)}"
    elif unknown := [key for key in given if key not in known]:
        fault = f"has no {shown(unknown[0])}"
    elif "name" in given:
        return Upscale(**given)
    raise RequestError(f"an upscale stage {fault}; give its name, or name and any of {', '.join(known[1:])}")
