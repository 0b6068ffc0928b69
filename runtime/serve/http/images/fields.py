"""Fields of `/v1/images/generations` and `/v1/images/edits`: OpenAI's and ours, read into a `Request` of the engine."""

from __future__ import annotations

import difflib
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepforge.runtime.checks import choice, clipped, flag, listed, real, shown, text, whole
from stepforge.runtime.errors import RequestError
from stepforge.runtime.imaging.encode import FORMATS
from stepforge.runtime.request import Request, canonical
from stepforge.runtime.serve.http.errors import ApiError, bad
from stepforge.runtime.serve.http.images.pictures import MASK_MODES, mask_of, picture
from stepforge.runtime.serve.http.settings import Settings

# Steps that a quality stands for, where a request names none; "auto" and what is absent are "medium"
QUALITY = {"low": 12, "medium": 20, "high": 30, "xhigh": 50, "max": 100, "standard": 20, "hd": 30}
MOST_PARTIALS = 3
LONGEST_USER = 512
RANDOM_BITS = 32  # of a seed that the server chooses

SHARED = {  # OpenAI's, of both endpoints
    "prompt": "What the image shows.",
    "model": "A name of `/v1/models`.",
    "n": "Images.",
    "size": "WIDTHxHEIGHT, or auto: the model's own, in edits the image's.",
    "quality": "Steps where `steps` is absent.",
    "background": "auto or opaque.",
    "output_format": "png, webp or jpeg.",
    "output_compression": "Quality of webp and jpeg, 0 to 100.",
    "response_format": "b64_json.",
    "stream": "Server-sent events.",
    "partial_images": "Previews of each image of a stream, 0 to 3.",
    "user": "Without effect.",
    "safety_identifier": "Without effect.",
    "moderation": "auto or low; without effect: nothing is filtered.",
}
GENERATIONS = {**SHARED, "style": "vivid or natural; without effect."}
EDITS = {
    **SHARED,
    "image": "The image to start from: an upload or a data URL.",
    "images": "The same as OpenAI's JSON has it: [{image_url: data URL}].",
    "mask": "A PNG of the image's size; what is transparent is drawn anew.",
    "mask_mode": "alpha; or white, where white is drawn anew.",
    "strength": "Share of the steps that run, above 0 and up to 1.",
    "overlay": "Put the image's own pixels back where the mask keeps them.",
}
OURS = {  # of both endpoints, at top level of the body: `extra_body` of OpenAI's client
    "negative_prompt": "What it does not show (also `negative`).",
    "width": "Pixels; in place of `size`.",
    "height": "Pixels; in place of `size`.",
    "steps": "Denoising steps (also `num_inference_steps`).",
    "sampler": "ddim, euler, dpmpp_2m, ...",
    "schedule": "normal, karras, exponential or beta.",
    "spacing": "linspace, leading or trailing.",
    "timesteps": "Custom timesteps, falling.",
    "sigmas": "Custom sigmas, falling.",
    "eta": "Stochasticity of ddim and tcd.",
    "guidance": "A number, one a step, or a plan such as interval(7.5, sigma=0.28..5.42) (also `guidance_scale`).",
    "guider": "cfg, rescale(0.7), apg, ...",
    "reuse": "Approximate: deepcache(3), tgate(0.5).",
    "preset": "A preset of the bundle.",
    "experts": "Which denoiser runs when.",
    "micro": "SDXL's size conditioning.",
    "seed": "Image i uses seed + i; chosen at random where absent.",
    "prompt_syntax": "a1111 or plain.",
    "adapters": "{name: strength} of loaded adapters.",
    "adapter_schedule": "A number, or one a step, that multiplies the strengths.",
    "controls": "[{name, image, scale, start, end, preprocessor, ...}] of the bundle's ControlNets.",
    "upscale": "Super-resolution stages: [{name, steps, ...}] or names.",
    "priority": "-10 to 10, higher first; above 0 with an admin's key only.",
    "deadline": "Seconds, at most the server's own limit.",
    "progress": "Also an event for each step of a stream.",
}
REFUSED = {
    "complexity": "", "frame_count": "", "frame_duration_ms": "", "svg": "", "markup": "", "file_id": "",
    "input_fidelity": "; `strength` says how much of the image stays",
    "images_per_prompt": "; give n", "batch_size": "; give n", "init": "; post the image to /v1/images/edits",
    "extra_body": "; its fields stand beside the others",
}  # fmt: skip
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
# Fields that `Request` takes as they are, by its names
PASSED = (
    "width", "height", "sampler", "schedule", "spacing", "timesteps", "sigmas", "eta", "guidance", "guider", "reuse",
    "preset", "experts", "micro", "prompt_syntax", "adapters", "adapter_schedule",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """What a body asks for."""

    request: Request
    model: str | None
    mode: str  # "text2img", "img2img" or "inpaint"
    quality: str
    format: str  # of the images, see `imaging.encode`
    compression: int
    stream: bool
    partials: int
    progress: bool
    priority: int
    deadline: float


def read_fields(values: Mapping[str, Any], settings: Settings, *, edit: bool) -> Asked:
    """Raises ApiError, in one line."""
    known = {**(EDITS if edit else GENERATIONS), **OURS}
    try:
        return _read(values, known, settings, edit=edit)
    except RequestError as error:
        name = str(error).split(" ", 1)[0]
        if name in ("width", "height") and values.get("size") is not None:
            name = "size"
        raise bad(str(error), param=name if name in known else None) from None


def _read(values: Mapping[str, Any], known: Mapping[str, str], settings: Settings, *, edit: bool) -> Asked:
    """Raises ApiError and RequestError, which begins with the field's name."""
    values = {name: value for name, value in _named(values, known).items() if value is not None}
    if "prompt" not in values:
        raise bad("a request needs a prompt", param="prompt", code="missing_required_parameter")
    for name in ("prompt", "negative"):
        if "\x00" in text(name, values.get(name, ""), settings.max_prompt):
            raise bad(f"{name} holds a NUL character", param=name)
    inputs = _Inputs(settings.max_inputs)
    count = whole("n", values.get("n", 1), 1, settings.max_images)
    stream = flag("stream", values.get("stream", False))
    progress = flag("progress", values.get("progress", False))
    if progress and not stream:
        raise bad("progress is for streams; give stream: true", param="progress")
    fields: dict[str, Any] = {name: values[name] for name in PASSED if name in values}
    fields |= {"prompt": values["prompt"], "negative": values.get("negative", ""), "images": count}
    fields |= _size(values)
    quality, fields["steps"] = _steps(values, settings)
    # 32 bits are enough for a seed that nobody chose, and survive clients that read numbers as floats
    fields["seed"] = values["seed"] if "seed" in values else secrets.randbits(RANDOM_BITS)
    fields["controls"] = _controls(values.get("controls", ()), inputs)
    fields["upscale"] = _stages(values.get("upscale", ()), inputs, settings)
    mode = "text2img"
    if edit:
        mode, fields["init"] = _init(values, inputs)
    kind = choice("output_format", values.get("output_format", "png"), tuple(FORMATS))
    _check_openai(values)
    request = Request(**fields)
    _check_pictures(request)
    return Asked(
        request=request,
        model=None if values.get("model") is None else text("model", values["model"], 200),
        mode=mode,
        quality=quality,
        format=kind,
        compression=_compression(values, kind),
        stream=stream,
        partials=whole("partial_images", values.get("partial_images", 0), 0, MOST_PARTIALS),
        progress=progress,
        priority=whole("priority", values.get("priority", 0), -10, 10),
        deadline=_deadline(values, settings),
    )


def _named(values: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, Any]:
    """Fields by our names. Raises ApiError for unknown ones, with those that are near."""
    taken = {**dict.fromkeys(known, ""), "negative": "", "num_inference_steps": "", "guidance_scale": ""}
    for name in values:
        if name in REFUSED:
            raise bad(f"{name} is not supported{REFUSED[name]}", param=name, code="unsupported_parameter")
        if name not in taken:
            near = difflib.get_close_matches(name[:60], taken, n=3)
            hint = f"do you mean {' or '.join(near)}?" if near else "the API's description is at /openapi.json"
            raise bad(f"there is no field {shown(name)}; {hint}", param=clipped(name, 60), code="unknown_parameter")
    aliased = {
        name: value for name, value in values.items() if name in ("negative", "negative_prompt", *_STEPS, *_WEIGHTS)
    }
    try:
        return {**{name: value for name, value in values.items() if name not in aliased}, **canonical(aliased)}
    except RequestError as error:
        raise bad(str(error)) from None


_STEPS, _WEIGHTS = ("steps", "num_inference_steps"), ("guidance", "guidance_scale")


def _size(values: Mapping[str, Any]) -> dict[str, int]:
    size = values.get("size", "auto")
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if size == "auto":
        return {}
    if match is None:
        raise bad(f"size is {shown(size)}; give WIDTHxHEIGHT, such as 512x512, or auto", param="size")
    if "width" in values or "height" in values:
        raise bad("give either size, or width and height", param="size")
    return {"width": int(match[1]), "height": int(match[2])}


def _steps(values: Mapping[str, Any], settings: Settings) -> tuple[str, int]:
    """Quality as told to the client, and steps."""
    quality = choice("quality", values.get("quality", "auto"), ("auto", *QUALITY))
    if "steps" in values:
        return quality, whole("steps", values["steps"], 1, settings.max_steps)
    for name in ("timesteps", "sigmas"):
        if name in values:
            return quality, len(listed(name, values[name], settings.max_steps))
    quality = "medium" if quality == "auto" else quality
    return quality, min(QUALITY[quality], settings.max_steps)


def _check_openai(values: Mapping[str, Any]) -> None:
    """OpenAI's fields that have one meaning here, or none."""
    if values.get("response_format", "b64_json") != "b64_json":
        raise bad("response_format is b64_json here: no image is kept to be fetched", param="response_format")
    choice("background", values.get("background", "auto"), ("auto", "opaque"))
    choice("moderation", values.get("moderation", "auto"), ("auto", "low"))
    choice("style", values.get("style", "vivid"), ("vivid", "natural"))
    for name in ("user", "safety_identifier"):
        text(name, values.get(name, ""), LONGEST_USER)


def _compression(values: Mapping[str, Any], kind: str) -> int:
    if kind == "png" and values.get("output_compression", 100) != 100:
        raise bad("output_compression is for webp and jpeg", param="output_compression")
    return whole("output_compression", values.get("output_compression", 100), 0, 100)


def _deadline(values: Mapping[str, Any], settings: Settings) -> float:
    seconds = real(values.get("deadline", settings.deadline))
    if seconds is None or not 0 < seconds <= settings.deadline:
        raise bad(
            f"deadline is {shown(values['deadline'])}; give seconds up to {settings.deadline:g}", param="deadline"
        )
    return seconds


class _Inputs:
    """Pictures of one body, counted."""

    def __init__(self, most: int) -> None:
        self._most, self._count = most, 0

    def take(self, where: str, given: object) -> bytes:
        self._count += 1
        if self._count > self._most:
            raise bad(f"the body has more than {self._most} pictures", param=where, code="too_many_images")
        return picture(where, given)


def _entries(given: object) -> Sequence[Any]:
    return tuple(given) if isinstance(given, list | tuple) else (given,)


def _controls(given: object, inputs: _Inputs) -> list[Any]:
    found = []
    for index, entry in enumerate(_entries(given)):
        if not isinstance(entry, Mapping):
            raise bad(f"controls[{index}] is {shown(entry)}; give name and image", param=f"controls[{index}]")
        where = f"controls[{index}][image]"
        found.append({**entry, "image": inputs.take(where, entry.get("image"))})
    return found


def _stages(given: object, inputs: _Inputs, settings: Settings) -> list[Any]:
    found = []
    for index, entry in enumerate(_entries(given)):
        if isinstance(entry, Mapping):
            if entry.get("steps") is not None:
                whole(f"steps of upscale[{index}]", entry["steps"], 1, settings.max_steps)
            if entry.get("image") is not None:
                entry = {**entry, "image": inputs.take(f"upscale[{index}][image]", entry["image"])}
        found.append(entry)
    return found


def _init(values: Mapping[str, Any], inputs: _Inputs) -> tuple[str, dict[str, Any]]:
    """Mode of an edit, and the fields of `Init`."""
    if "image" in values and "images" in values:
        raise bad("give either image or images", param="image")
    name = "images" if "images" in values else "image"
    given = _entries(values.get(name, ()))
    if not given:
        raise bad("an edit needs an image", param="image", code="missing_required_parameter")
    if len(given) > 1:
        raise bad("one image can be edited at a time; others can be `controls`", param=name, code="too_many_images")
    image = inputs.take(name, _referenced(name, given[0]))
    init: dict[str, Any] = {"image": image}
    init |= {name: values[name] for name in ("strength", "overlay") if name in values}
    mode = choice("mask_mode", values.get("mask_mode", "alpha"), MASK_MODES)
    if "mask" not in values:
        return "img2img", init
    init["mask"] = mask_of(inputs.take("mask", _referenced("mask", values["mask"])), image, mode)
    return "inpaint", init


def _referenced(name: str, given: object) -> object:
    """What OpenAI's JSON wraps: {"image_url": data URL}."""
    if not isinstance(given, Mapping):
        return given
    if set(given) != {"image_url"}:
        raise bad(f"{name} is {shown(given)}; give {{image_url: data URL}}", param=name, code="invalid_image")
    return given["image_url"]


def _check_pictures(request: Request) -> None:
    """The last word: no text of a body has become a path."""
    init, stages = request.init, request.upscale
    sources = [control.image for control in request.controls] + [stage.image for stage in stages]
    sources += [] if init is None else [init.image, init.mask]
    if any(isinstance(source, Path) for source in sources):
        raise ApiError(500, "a picture was not read", "internal_error", kind="server_error")
