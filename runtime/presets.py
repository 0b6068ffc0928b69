"""Named plan presets of a bundle: what `stepforge tune` found, and `--plan NAME` uses.

A preset is a mapping in the manifest: `guidance`, `guider`, `reuse`, `control_start` and `control_end` as in `Request` and
`Control`, and `found`, what was measured when it was chosen. It takes the place of the request's own values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stepforge.runtime.bundle import NAME, Bundle, write_manifest
from stepforge.runtime.errors import RequestError
from stepforge.runtime.request import Control, Request

FIELDS = ("guidance", "guider", "reuse", "control_start", "control_end", "found")


def resolve(request: Request, bundle: Bundle) -> Request:
    """The request with its preset's values. Raises RequestError if the bundle has no such preset."""
    if not request.preset:
        return request
    if request.preset not in bundle.presets:
        have = f"it has {', '.join(bundle.presets)}" if bundle.presets else "it has none; `stepforge tune` makes them"
        raise RequestError(f"the bundle has no preset {request.preset!r}; {have}")
    preset = bundle.presets[request.preset]
    window = _window(preset)
    return replace(
        request,
        controls=tuple(replace(control, **window) for control in request.controls),
        preset="",
        **{name: preset[name] for name in ("guidance", "guider", "reuse") if name in preset},
    )


def _window(preset: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("control_"): preset[name] for name in ("control_start", "control_end") if name in preset}


def store(bundle: Bundle, name: str, preset: Mapping[str, Any]) -> Bundle:
    """Write a preset into a bundle's manifest; one of the same name is replaced. Raises RequestError for a bad one."""
    if not NAME.fullmatch(name):
        raise RequestError(f"preset name {name!r} is not allowed; use letters, digits, ., - and _")
    if unknown := sorted(set(preset) - set(FIELDS)):
        raise RequestError(f"a preset has no {unknown[0]!r}; it has {', '.join(FIELDS)}")
    Control(name=name, image=b"", **_window(preset))
    Request(prompt="", **{name: preset[name] for name in ("guidance", "guider", "reuse") if name in preset})
    stored = replace(bundle, presets={**bundle.presets, name: dict(preset)})
    write_manifest(stored)
    return stored
