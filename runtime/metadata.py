"""What is written into a generated PNG: enough to draw it again."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from stepforge.runtime.request import Result


def describe_image(result: Result, index: int) -> dict[str, Any]:
    """The facts of image `index`, for `images.save_png`."""
    request = result.request
    image = result.images[index]
    stated = {key: value for key, value in asdict(request).items() if value is not None}
    return {
        **stated,
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
