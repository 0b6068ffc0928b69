"""A request: what the caller wants, frozen and validated once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stepforge.runtime.errors import RequestError
from stepforge.runtime.imaging import preprocess
from stepforge.runtime.imaging.read import MAX_SIDE
from stepforge.runtime.imaging.save import save_result
from stepforge.runtime.lora.layers import MAX_STRENGTH
from stepforge.runtime.plan import Plan, guiders, reuse
from stepforge.runtime.plan.guidance import Guidance, parse

MAX_STEPS = 1000
MAX_IMAGES = 64
MAX_SEED = 2**64 - 1
MAX_SCALE = 10.0  # of ControlNet residuals


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """One ControlNet of a request. Raises RequestError for values that no model can run.

    It runs in evaluation i of n where start <= i/n and (i + 1)/n <= end, as in diffusers, and, if `sigma` is given, where
    sigma[0] < sigma of the step <= sigma[1]. Elsewhere it is not run.
    """

    name: str  # of a ControlNet in the bundle
    image: Any  # path, bytes, PIL image or array: see imaging.read
    preprocessor: str = "none"  # see preprocess.py
    scale: float | tuple[float, ...] = 1.0  # of its residuals; a list gives one number an evaluation
    start: float = 0.0
    end: float = 1.0
    sigma: tuple[float, float] | None = None
    guess_mode: bool = False  # conditional rows only, residuals scaled from 0.1 to 1 by depth

    def __post_init__(self) -> None:
        what = f"ControlNet {self.name!r}"
        if not isinstance(self.name, str):
            raise RequestError(f"the name of a ControlNet is {self.name!r}; give text")
        preprocess.parse(self.preprocessor)
        if not isinstance(self.scale, int | float):
            object.__setattr__(self, "scale", _listed(self.scale))
        scales = self.scale if isinstance(self.scale, tuple) else (self.scale,)
        if not scales or not all(_is_number(value) and abs(value) <= MAX_SCALE for value in scales):
            raise RequestError(
                f"the scale of {what} is {self.scale!r}; give a number up to ±{MAX_SCALE:g}, or one a step"
            )
        if not (_is_number(self.start) and _is_number(self.end) and 0.0 <= self.start < self.end <= 1.0):
            raise RequestError(f"{what} runs from {self.start!r} to {self.end!r}; give 0 <= start < end <= 1")
        if self.sigma is not None:
            object.__setattr__(self, "sigma", _listed(self.sigma))
            window: Any = self.sigma
            if len(window) != 2 or not all(_is_number(value) for value in window) or not 0 <= window[0] < window[1]:
                raise RequestError(f"the sigmas of {what} are {window!r}; give two, the lower first")
        if not isinstance(self.guess_mode, bool):
            raise RequestError(f"guess_mode of {what} is {self.guess_mode!r}; give true or false")


def _listed(given: Any) -> tuple[Any, ...]:
    """A sequence as a tuple; what is none as a tuple of one, for the checks to refuse."""
    return tuple(given) if isinstance(given, Sequence | np.ndarray) and not isinstance(given, str) else (given,)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt, and how to sample it.

    Raises RequestError for any value that cannot be run on any model; what depends on the model (size multiples,
    sampler and prediction type) is checked when the engine compiles the plan.
    """

    prompt: str
    negative: str = ""
    width: int | None = None  # pixels; None: the model's own size
    height: int | None = None
    steps: int = 20  # denoising steps; a two-evaluation sampler runs more network evaluations than that
    sampler: str | None = None  # a name from samplers.SAMPLERS; None: the model's own
    schedule: str | None = None  # "normal", "karras", "exponential" or "beta"; None: the model's own
    spacing: str | None = None  # "linspace", "leading", "trailing"; None: the model's own
    timesteps: tuple[int, ...] | None = None  # custom timesteps, falling
    sigmas: tuple[float, ...] | None = None  # custom sigmas, falling
    eta: float | None = None  # stochasticity of ddim and tcd
    guidance: Guidance = (
        7.5  # w in uncond + w·(cond − uncond): a number, a list (one w a step), or text, see guidance.py
    )
    guider: str = "cfg"  # how the rows of a step are combined, see guiders.py
    controls: tuple[Control, ...] = ()  # ControlNets; mappings of Control's fields are taken too
    reuse: str = ""  # approximate: steps that reuse earlier activations, see reuse.py
    preset: str = ""  # of the bundle; it sets guidance, guider, reuse and the ControlNets' windows, see presets.py
    seed: int = 0  # image i uses seed + i
    images: int = 1
    prompt_syntax: str = "a1111"  # "a1111": (word:1.3) weights; "plain": brackets are text, as in diffusers
    adapters: Mapping[str, float] = field(default_factory=dict)  # name in `engine.adapters` -> strength
    adapter_schedule: float | tuple[float, ...] = (
        1.0  # multiplies the strengths in the denoiser; a list gives one a step
    )

    def __post_init__(self) -> None:
        for name in ("prompt", "negative"):
            if not isinstance(getattr(self, name), str):
                raise RequestError(f"{name} must be text, not {type(getattr(self, name)).__name__}")
        _whole("steps", self.steps, 1, MAX_STEPS)
        _whole("images", self.images, 1, MAX_IMAGES)
        _whole("seed", self.seed, 0, MAX_SEED - self.images + 1)
        for name in ("width", "height"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 8, MAX_SIDE)
        if self.prompt_syntax not in ("a1111", "plain"):
            raise RequestError(f"prompt_syntax is {self.prompt_syntax!r}; choose a1111 or plain")
        if self.eta is not None and not 0.0 <= self.eta <= 1.0:
            raise RequestError(f"eta is {self.eta}; it lies between 0 and 1")
        for name in ("timesteps", "sigmas"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "guidance", parse(self.guidance))
        guiders.parse(self.guider)
        reuse.parse(self.reuse)
        object.__setattr__(self, "controls", _controls(self.controls))
        object.__setattr__(self, "adapters", _strengths(self.adapters))
        if not isinstance(self.adapter_schedule, int | float):
            object.__setattr__(self, "adapter_schedule", tuple(self.adapter_schedule))
        scales = self.adapter_schedule if isinstance(self.adapter_schedule, tuple) else (self.adapter_schedule,)
        if not scales or not all(_is_strength(scale) for scale in scales):
            raise RequestError(f"adapter_schedule is {self.adapter_schedule!r}; give a number, or one for each step")


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")


def _controls(given: Any) -> tuple[Control, ...]:
    known = [name.name for name in fields(Control)]
    found = []
    for control in given if isinstance(given, list | tuple) else (given,):
        if isinstance(control, Mapping) and control.keys() <= set(known) and {"name", "image"} <= control.keys():
            control = Control(**control)
        if not isinstance(control, Control):
            raise RequestError(
                f"a control {_fault(control, known)}; give name and image, and any of {', '.join(known[2:])}"
            )
        found.append(control)
    return tuple(found)


def _fault(control: Any, known: list[str]) -> str:
    """In one line, which the text of an image's array would not be."""
    if not isinstance(control, Mapping):
        return f"is of type {type(control).__name__}"
    unknown = [str(key) for key in control if key not in known]
    return f"has no {unknown[0]!r}" if unknown else "has no name or no image"


def _strengths(adapters: Any) -> dict[str, float]:
    if not isinstance(adapters, Mapping):
        raise RequestError(f"adapters is {adapters!r}; give names and strengths such as {{'style': 0.8}}")
    for name, strength in adapters.items():
        if not isinstance(name, str) or not _is_strength(strength):
            raise RequestError(f"the strength of adapter {name!r} is {strength!r}; give a number from -100 to 100")
    return {name: float(strength) for name, strength in adapters.items()}


def _is_strength(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_STRENGTH


@dataclass(frozen=True, slots=True)
class Progress:
    """What `on_step` is told after each network evaluation."""

    image: int  # index within the request
    step: int  # network evaluations done
    steps: int  # network evaluations in all
    latents: Callable[[], NDArray[np.float32]]  # x_{k+1}, [C, h, w]; call it inside the callback
    denoised: Callable[[], NDArray[np.float32]]  # estimate of the clean latents so far, [C, h, w]


@dataclass(frozen=True, slots=True)
class Stats:
    """What a request cost. Shared calls are counted by this request's own rows."""

    rows: dict[str, int]  # network -> rows run
    calls: int  # engine ticks that this request took part in
    seconds: dict[str, float]  # stage -> seconds; denoise is shared out by rows
    backend: str
    precision: str
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class Result:
    """The images of one request."""

    request: Request
    images: tuple[Image.Image, ...]
    seeds: tuple[int, ...]
    latents: NDArray[np.float32]  # final latents, [n, C, h, w]
    plan: Plan
    stats: Stats
    model: str
    digest: str  # of the bundle
    adapters: Mapping[str, str] = field(default_factory=dict)  # name -> sha256 of its file
    hints: tuple[str, ...] = ()  # sha256 of each ControlNet's hint image, float32 [3, height, width]

    def save(self, path: str | Path, *, overwrite: bool = False, metadata: bool = True) -> list[Path]:
        """Write the images as PNG files, each in one atomic step, and return their paths.

            result.save("cat.png")          one image
            result.save("out")              a folder: out/00000-7.png, out/00001-8.png, ... (index and seed)
            result.save("cat-{seed}.png")   a pattern; {index} and {seed} take format codes such as {index:03d}

        Missing folders are made. metadata: write the request into each file, so that it can be drawn again.
        Raises RequestError, before anything is written, if a name is refused or taken; OSError if writing fails.
        """
        return save_result(self, path, overwrite=overwrite, metadata=metadata)
