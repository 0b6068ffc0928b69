"""stable-diffusion.cpp by stable-diffusion-cpp-python (MIT), which pip compiles. DDIM is Euler over its timesteps' levels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from suite.cases import Workload
from suite.models import Model


class SdCpp:
    def __init__(self, model: Model) -> None:
        from stable_diffusion_cpp import StableDiffusion

        from stepforge.runtime.backends import available_threads

        self.pipe = StableDiffusion(
            model_path=str(model.folder), wtype="f32", rng_type="cpu", sampler_rng_type="cpu",
            n_threads=available_threads(), vae_decode_only=True, verbose=False,
        )  # fmt: skip
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        alphas = np.cumprod(1 - betas)
        self.levels = np.sqrt((1 - alphas) / alphas)

    def draw(self, workloads: Sequence[Workload]) -> list[np.ndarray]:
        return [self.one(workload) for workload in workloads]

    def one(self, workload: Workload) -> np.ndarray:
        times = (np.arange(workload.steps) * (1000 // workload.steps) + 1)[::-1]
        levels = [*self.levels[times], self.levels[0]]
        made = self.pipe.generate_image(
            prompt=workload.prompt, width=workload.size, height=workload.size, sample_steps=workload.steps,
            cfg_scale=workload.guidance, seed=workload.seed, sample_method="euler",
            sigmas=",".join(f"{level:.6f}" for level in levels),
        )  # fmt: skip
        return np.asarray(made[0].convert("RGB"), np.float32) / 255


def open_runner(name: str, model: Model, precision: str, like: Sequence[Workload], kind: str) -> SdCpp:
    return SdCpp(model)
