"""Named plan presets of a bundle: what `stepforge tune` found, and `--plan NAME` uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stepforge.runtime.bundle import NAME, Bundle, Preset, update
from stepforge.runtime.errors import RequestError
from stepforge.runtime.plan.switch import default_switch
from stepforge.runtime.request import Control, Request


def resolve(request: Request, bundle: Bundle) -> Request:
    """The request with its preset's values, and the bundle's experts where it names none.

    Raises RequestError if the bundle has no such preset.
    """
    if request.experts is None and bundle.experts:
        request = replace(request, experts=default_switch(bundle.experts))
    if not request.preset:
        return request
    if request.preset not in bundle.presets:
        have = f"it has {', '.join(bundle.presets)}" if bundle.presets else "it has none; `stepforge tune` makes them"
        raise RequestError(f"the bundle has no preset {request.preset!r}; {have}")
    preset = bundle.presets[request.preset]
    window = _given(start=preset.control_start, end=preset.control_end)
    return replace(
        request,
        controls=tuple(replace(control, **window) for control in request.controls),
        preset="",
        **_given(guidance=preset.guidance, guider=preset.guider, reuse=preset.reuse),
    )


def store(bundle: Bundle, name: str, values: Mapping[str, Any]) -> Bundle:
    """Write a preset into a bundle's manifest; one of the same name is replaced, others stay.

    values: as `Preset` names them. Raises RequestError for a bad one, BundleError if the bundle cannot be written.
    """
    if not NAME.fullmatch(name):
        raise RequestError(f"preset name {name!r} is not allowed; use letters, digits, ., - and _")
    try:
        preset = Preset.from_dict(values)
    except ValueError as error:
        raise RequestError(str(error)) from error
    Control(name="preset", image=b"", **_given(start=preset.control_start, end=preset.control_end))
    Request(prompt="", **_given(guidance=preset.guidance, guider=preset.guider, reuse=preset.reuse))
    return update(bundle, lambda now: replace(now, presets={**now.presets, name: preset}))


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
