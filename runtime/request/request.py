"""A request: what the caller wants, parsed once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

from stepforge.runtime.bundle.scheduler import SAMPLER_NAMES, SCHEDULES, SPACINGS
from stepforge.runtime.checks import MAX_NAME, choice, listed, real, shown, text, whole
from stepforge.runtime.errors import RequestError
from stepforge.runtime.imaging.read import MAX_SIDE
from stepforge.runtime.lora.layers import MAX_STRENGTH
from stepforge.runtime.plan.guidance import MAX_WEIGHTS, Guidance, parse_guidance
from stepforge.runtime.plan.guiders import Guider
from stepforge.runtime.plan.reuse import Reuse
from stepforge.runtime.plan.switch import Switch
from stepforge.runtime.request.control import Control, controls_of
from stepforge.runtime.request.init import Init
from stepforge.runtime.request.micro import Micro
from stepforge.runtime.request.upscale import MAX_PROMPT, MAX_SEED, MAX_STEPS, Upscale, stages_of

MAX_IMAGES = 64
MAX_CONTROLS = 8
MAX_ADAPTERS = 64
MAX_STAGES = 8
PLAIN = Micro()
ALIASES = {  # diffusers' names
    "negative_prompt": "negative",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
}


class Strengths(Mapping[str, float]):
    """Name of an adapter -> strength; immutable and hashable, compared with its order, which decides roundings."""

    __slots__ = ("_strengths",)

    def __init__(self, strengths: Mapping[str, float] | Sequence[tuple[str, float]] = ()) -> None:
        self._strengths = dict(strengths)

    def __getitem__(self, name: str) -> float:
        return self._strengths[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._strengths)

    def __len__(self) -> int:
        return len(self._strengths)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Strengths):
            return tuple(self.items()) == tuple(other.items())
        return self._strengths == other

    def __hash__(self) -> int:
        return hash(tuple(self.items()))

    def __repr__(self) -> str:
        return repr(self._strengths)


@dataclass(frozen=True, slots=True, kw_only=True, init=False)
class Request:
    """One prompt, and how to sample it; a value: immutable, hashable, compared by what it says.

    Texts of guidance, guider, reuse and preprocessors are parsed here, once; `str` of what is kept is canonical text.
    Raises RequestError for any value that cannot be run on any model; what depends on the model (size multiples,
    sampler and prediction type) is checked when the engine compiles the plan.
    """

    prompt: str
    negative: str
    width: int | None  # pixels; None: the model's own size
    height: int | None
    steps: int  # denoising steps; a two-evaluation sampler runs more network evaluations than that
    sampler: str | None  # a name from samplers.SAMPLERS; None: the model's own
    schedule: str | None  # sigma schedule: "normal", "karras", "exponential" or "beta"; None: the model's own
    spacing: str | None  # "linspace", "leading", "trailing"; None: the model's own
    timesteps: tuple[float, ...] | None  # custom timesteps, falling
    sigmas: tuple[float, ...] | None  # custom sigmas, falling
    eta: float | None  # stochasticity of ddim and tcd
    guidance: Guidance  # w in uncond + w·(cond − uncond): a number, one an evaluation, or a curve, see guidance.py
    guider: Guider  # how the rows of a step are combined, see guiders.py
    controls: tuple[Control, ...]  # ControlNets; their residuals add up
    reuse: Reuse  # approximate: steps that reuse earlier activations, see reuse.py
    preset: str  # bundle's preset; it sets guidance, guider, reuse and the ControlNets' windows, see presets.py
    seed: int  # image i uses seed + i
    images: int
    prompt_syntax: str  # "a1111": (word:1.3) weights; "plain": brackets are text, as in diffusers
    adapters: Strengths  # name in `engine.adapters` -> strength
    adapter_schedule: float | tuple[float, ...]  # multiplies the strengths in the denoiser: one number, or one a step
    init: Init | None  # the image that it starts from, see init.py
    experts: Switch | None  # which denoiser runs when, see plan/switch.py; None: as the bundle says
    micro: Micro  # SDXL's sizes, crop and aesthetic score
    upscale: tuple[Upscale, ...]  # super-resolution stages, in the order in which an image passes them

    def __init__(
        self,
        *,
        prompt: str,
        negative: str = "",
        width: int | None = None,
        height: int | None = None,
        steps: int = 20,
        sampler: str | None = None,
        schedule: str | None = None,
        spacing: str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float | None = None,
        guidance: Guidance | str | Sequence[float] = 7.5,
        guider: Guider | str = "cfg",
        controls: Sequence[Control | Mapping[str, Any]] | Control | Mapping[str, Any] = (),
        reuse: Reuse | str = "",
        preset: str = "",
        seed: int = 0,
        images: int = 1,
        prompt_syntax: str = "a1111",
        adapters: Mapping[str, float] | None = None,
        adapter_schedule: float | Sequence[float] = 1.0,
        init: Init | Mapping[str, Any] | None = None,
        experts: Switch | str | None = None,
        micro: Micro | Mapping[str, Any] | None = None,
        upscale: Sequence[Upscale | Mapping[str, Any] | str] | Upscale | Mapping[str, Any] | str = (),
    ) -> None:
        count = whole("images", images, 1, MAX_IMAGES)
        checked = {
            "prompt": text("prompt", prompt, MAX_PROMPT),
            "negative": text("negative", negative, MAX_PROMPT),
            "width": None if width is None else whole("width", width, 8, MAX_SIDE),
            "height": None if height is None else whole("height", height, 8, MAX_SIDE),
            "steps": whole("steps", steps, 1, MAX_STEPS),
            "sampler": None if sampler is None else choice("sampler", sampler, SAMPLER_NAMES),
            "schedule": None if schedule is None else choice("schedule", schedule, SCHEDULES),
            "spacing": None if spacing is None else choice("spacing", spacing, SPACINGS),
            "timesteps": None if timesteps is None else _numbers("timesteps", timesteps, MAX_STEPS),
            "sigmas": None if sigmas is None else _numbers("sigmas", sigmas, MAX_STEPS + 1),  # with the end
            "eta": None if eta is None else _within("eta", eta, 0.0, 1.0),
            "guidance": parse_guidance(guidance),
            "guider": Guider.parse(guider),
            "controls": controls_of(controls, MAX_CONTROLS),
            "reuse": Reuse.parse(reuse),
            "preset": text("preset", preset, MAX_NAME),
            "seed": whole("seed", seed, 0, MAX_SEED - count + 1),
            "images": count,
            "prompt_syntax": choice("prompt_syntax", prompt_syntax, ("a1111", "plain")),
            "adapters": _strengths(adapters),
            "adapter_schedule": _adapter_schedule(adapter_schedule),
            "init": Init.of(init),
            "experts": None if experts is None else Switch.parse(experts),
            "micro": PLAIN if micro is None else Micro.of(micro),
            "upscale": stages_of(upscale, MAX_STAGES),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, asked: Request | str | Mapping[str, Any], /, **options: Any) -> Request:
        """A request as it is; or a prompt, or a mapping such as a line of JSON, with further fields as options.

        Fields go by their names or by diffusers' (`ALIASES`). Raises RequestError also for names that are unknown or
        given twice, and for options beside a request.
        """
        if isinstance(asked, Request):
            if options:
                raise RequestError(f"{next(iter(options))} was given beside a Request; change the request itself")
            return asked
        if not isinstance(asked, str | Mapping):
            raise RequestError(f"a request is a Request, a prompt or a mapping, not {type(asked).__name__}")
        values, more = canonical({"prompt": asked} if isinstance(asked, str) else asked), canonical(options)
        if twice := values.keys() & more.keys():
            raise RequestError(f"{min(twice)} is given twice")
        if "prompt" not in (given := values | more):
            raise RequestError("a request needs a prompt")
        return cls(**given)

    @classmethod
    def list_of(cls, asked: Iterable[Request | str | Mapping[str, Any]], /, **options: Any) -> list[Request]:
        """Requests of several, each as `of`. Raises RequestError, also for one in place of a list."""
        if isinstance(asked, Request | str | Mapping) or not isinstance(asked, Iterable):
            raise RequestError(f"a list of requests is needed, not {type(asked).__name__}")
        return [cls.of(one, **options) for one in asked]

    def to_dict(self) -> dict[str, Any]:
        """Fields as plain values for JSON, the images of ControlNets left out; texts are canonical."""
        guidance = self.guidance if isinstance(self.guidance, float | tuple) else str(self.guidance)
        return {
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "guidance": guidance,
            "guider": str(self.guider),
            "controls": [control.to_dict() for control in self.controls],
            "reuse": str(self.reuse),
            "adapters": dict(self.adapters),
            "init": None if self.init is None else self.init.to_dict(),
            "experts": None if self.experts is None else str(self.experts),
            "micro": self.micro.to_dict(),
            "upscale": [stage.to_dict() for stage in self.upscale],
        }


def canonical(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by the names of the fields. Raises RequestError for unknown names, and for a field that is given twice."""
    known = [field.name for field in fields(Request)]
    found: dict[str, Any] = {}
    for key, value in options.items():
        name = ALIASES.get(key, key) if isinstance(key, str) else key
        if name not in known:
            also = ", ".join(f"{name} (also {alias})" for alias, name in ALIASES.items())
            rest = ", ".join(name for name in known if name not in ALIASES.values())
            raise RequestError(f"a request has no {shown(key)}; it has {rest}, {also}")
        if name in found:
            other = next(alias for alias, field in ALIASES.items() if field == name)
            raise RequestError(f"{name} and {other} are the same; give one")
        found[name] = value
    return found


def _within(what: str, given: object, low: float, high: float) -> float:
    value = real(given)
    if value is None or not low <= value <= high:
        raise RequestError(f"{what} is {shown(given)}; it lies between {low:g} and {high:g}")
    return value


def _numbers(what: str, given: object, most: int) -> tuple[float, ...]:
    """Finite and falling; whole numbers stay ints."""
    found = []
    for element in listed(what, given, most):
        value = real(element)
        if value is None or math.isinf(value):
            raise RequestError(f"{what} must be a list of finite numbers, got {shown(given)}")
        found.append(int(value) if isinstance(element, Integral) else value)
    return tuple(found)


def _strengths(given: object) -> Strengths:
    if given is None:
        return Strengths()
    if not isinstance(given, Mapping):
        raise RequestError(f"adapters is {shown(given)}; give names and strengths such as {{'style': 0.8}}")
    if len(given) > MAX_ADAPTERS:
        raise RequestError(f"adapters has {len(given)} entries; at most {MAX_ADAPTERS} are allowed")
    found = []
    for key, strength in given.items():
        value = real(strength)
        if not isinstance(key, str) or value is None or abs(value) > MAX_STRENGTH:
            raise RequestError(
                f"the strength of adapter {shown(key)} is {shown(strength)}; "
                f"give a number from -{MAX_STRENGTH:g} to {MAX_STRENGTH:g}"
            )
        found.append((text("the name of an adapter", key, MAX_NAME), value))
    return Strengths(found)


def _adapter_schedule(given: object) -> float | tuple[float, ...]:
    single = real(given)
    try:
        values = (single,) if single is not None else tuple(map(real, listed("adapter_schedule", given, MAX_WEIGHTS)))
    except RequestError:
        values = (None,)
    checked = tuple(value for value in values if value is not None and abs(value) <= MAX_STRENGTH)
    if len(checked) != len(values):
        raise RequestError(f"adapter_schedule is {shown(given)}; give a number, or one for each step")
    return checked[0] if single is not None else checked
