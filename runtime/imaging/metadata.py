"""What is written into a generated PNG: enough to draw it again, and what A1111 and its like read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepforge.runtime.request import Result

A1111_SAMPLERS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "deis": "DEIS",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m": "DPM++ 3M",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "kdpm2": "DPM2",
    "lcm": "LCM",
    "lms": "LMS",
    "pndm": "PLMS",
    "tcd": "TCD",
    "unipc": "UniPC",
}


def describe_image(result: Result, index: int) -> dict[str, Any]:
    """The facts of image `index`, for `save_png`."""
    request = result.request
    image = result.images[index]
    stated = {name: value for name, value in request.to_dict().items() if name not in ("controls", "upscale")}
    return {
        **{name: value for name, value in stated.items() if value is not None},
        **({"controls": list(_controls(result))} if request.controls else {}),
        **({"upscale": list(_stages(result))} if request.upscale else {}),
        **({"init": _init(result)} if request.init else {}),
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
        yield {**control.to_dict(), "hint_sha256": digest}


def _init(result: Result) -> dict[str, Any]:
    """What was asked of the init image, with the sha256 of its file and its mask's."""
    assert result.request.init is not None
    names = ("image_sha256", "mask_sha256")
    return {**result.request.init.to_dict(), **dict(zip(names, result.init, strict=False))}


def _stages(result: Result) -> Iterator[dict[str, Any]]:
    """What was asked of each stage, and the evaluations that it made of it."""
    for upscale, (_, plan) in zip(result.request.upscale, result.stages, strict=True):
        yield {**upscale.to_dict(), "evaluations": len(plan.steps), "given_image": upscale.image is not None}


def a1111_parameters(metadata: Mapping[str, Any]) -> str:
    """The `parameters` text of A1111, from the keys prompt, negative, steps, sampler, schedule, guidance, seed, width,
    height and model. What is absent, and guidance that is not one number, is left out."""
    guidance = metadata.get("guidance")
    schedule = metadata.get("schedule")
    sampler = metadata.get("sampler")
    facts = {
        "Steps": metadata.get("steps"),
        "Sampler": A1111_SAMPLERS.get(sampler, sampler) if isinstance(sampler, str) else None,
        "Schedule type": schedule.title() if isinstance(schedule, str) else None,
        "CFG scale": f"{guidance:g}" if isinstance(guidance, (int, float)) else None,
        "Seed": metadata.get("seed"),
        "Size": f"{metadata['width']}x{metadata['height']}" if {"width", "height"} <= metadata.keys() else None,
        "Model": metadata.get("model"),
    }
    lines = [str(metadata.get("prompt", ""))]
    if metadata.get("negative"):
        lines.append(f"Negative prompt: {metadata['negative']}")
    lines.append(", ".join(f"{name}: {_quote(str(fact))}" for name, fact in facts.items() if fact is not None))
    return "\n".join(lines)


def _quote(fact: str) -> str:
    """A1111 quotes a value that holds one of its separators."""
    return json.dumps(fact, ensure_ascii=False) if any(mark in fact for mark in ",:\n") else fact
