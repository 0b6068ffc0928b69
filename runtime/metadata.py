"""What is written into a generated PNG: enough to draw it again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from stepforge.runtime.request import Result


def describe_image(result: Result, index: int) -> dict[str, Any]:
    """The facts of image `index`, for `images.save_png`."""
    request = result.request
    image = result.images[index]
    stated = {f.name: getattr(request, f.name) for f in fields(request) if f.name != "controls"}
    return {
        **{name: value for name, value in stated.items() if value is not None},
        **({"controls": list(_controls(result))} if request.controls else {}),
        "seed": result.seeds[index],
        "width": image.width,
        "height": image.height,
        "model": result.model,
        "bundle": result.digest,
        "adapter_files": dict(result.adapters),
        "backend": result.stats.backend,
        "precision": result.stats.precision,
        "versions": result.stats.versions,
        "random": "torch-cpu-mt19937",
    }


def _controls(result: Result) -> Iterator[dict[str, Any]]:
    """ControlNets with the sha256 of the hint they were shown in place of the image."""
    for control, digest in zip(result.request.controls, result.hints, strict=True):
        stated = {f.name: getattr(control, f.name) for f in fields(control) if f.name not in ("image", "sigma")}
        yield {**stated, **({"sigma": control.sigma} if control.sigma else {}), "hint_sha256": digest}
