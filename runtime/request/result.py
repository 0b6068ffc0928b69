"""What the engine gives back: progress while a request runs, then its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stepforge.runtime.imaging.save import save_result
from stepforge.runtime.plan import Plan
from stepforge.runtime.request.request import Request


@dataclass(frozen=True, slots=True)
class Progress:
    """What `on_step` is told after each network evaluation."""

    image: int  # index within the request
    step: int  # network evaluations done
    steps: int  # network evaluations in all
    latents: Callable[[], NDArray[np.float32]]  # x_{k+1}, [C, h, w]; call it inside the callback
    denoised: Callable[[], NDArray[np.float32]]  # estimate of the clean latents so far, [C, h, w]
    preview: Callable[
        [], Future[Image.Image]
    ]  # that estimate as a small picture, made beside the steps; cancelled if late
    stage: str = ""  # super-resolution stage that made the step; empty for the base model


@dataclass(frozen=True, slots=True)
class Stats:
    """What a request cost. Shared calls are counted by this request's own rows."""

    rows: dict[str, int]  # network -> rows run
    calls: int  # engine ticks that this request took part in
    seconds: dict[str, float]  # part of the work -> seconds; denoise is shared out by rows
    backend: str
    precision: str
    versions: dict[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """The images of one request. Results are compared by identity."""

    request: Request
    images: tuple[Image.Image, ...]
    seeds: tuple[int, ...]
    latents: NDArray[np.float32]  # final latents of the last denoiser, [n, C, h, w]
    plan: Plan  # of the base model, or of the first stage if that was given the image
    stats: Stats
    model: str
    digest: str  # bundle's digest
    adapters: Mapping[str, str] = field(default_factory=dict)  # name -> sha256 of its file
    hints: tuple[str, ...] = ()  # sha256 of each ControlNet's hint image, float32 [3, height, width]
    init: tuple[str, ...] = ()  # sha256 of the init image's file, or pixels, and of its mask's
    stages: tuple[tuple[str, Plan], ...] = ()  # super-resolution stages and their plans, as the images passed them

    def save(self, path: str | Path, *, overwrite: bool = False, metadata: bool = True) -> list[Path]:
        """Write the images as PNG files, each in one atomic step, and return their paths.

            result.save("cat.png")          one image
            result.save("out")              a folder: out/00000-7.png, out/00001-8.png, ... (index and seed)
            result.save("cat-{seed}.png")   a pattern; {index} and {seed} take format codes such as {index:03d}

        Missing folders are made. metadata: write the request into each file, so that it can be drawn again.
        Raises RequestError, before anything is written, if a name is refused or taken; OSError if writing fails.
        """
        return save_result(self, path, overwrite=overwrite, metadata=metadata)
