"""An analytic denoiser without weights: for tests, for trying the API, and for measuring the engine's own overhead.

The data it pretends to know are Gaussian: x0 ~ N(mu(prompt), SPREAD²) in every latent element. The best prediction of a
denoiser is then a formula, so images are deterministic, depend on the prompt, and improve with more steps.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stepforge.runtime.backends import Arrays, Graph
from stepforge.runtime.bundle import (
    TEXT_ENCODERS,
    UNET,
    VAE_DECODER,
    VAE_ENCODER,
    Bundle,
    Component,
    ComponentId,
    ModelCard,
    StageCard,
    TextEncoder,
)
from stepforge.runtime.bundle.scheduler import SchedulerCard
from stepforge.runtime.errors import BackendError
from stepforge.runtime.plan.sampling.schedules import alphas_cumprod

SPREAD = 0.5
DIM = 16  # width of the pretended text embedding


def fake_bundle(size: int = 512) -> Bundle:
    """A bundle with the shape of Stable Diffusion 1 whose only file is a tokenizer of one token a byte, and three stages:
    "x4" and "x2", which denoise, and "nearest", which repeats pixels."""
    card = ModelCard(
        name="fake",
        family="sd1",
        width=size,
        height=size,
        latent_channels=4,
        vae_scale=8,
        size_multiple=8,
        scaling_factor=1.0,
        text_encoders=(TextEncoder("text_encoder", "fake_tokenizer.json", 77, 256, 257, 257),),
    )
    scheduler = SchedulerCard(sampler="ddim", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    x4 = replace(card, family="x4", width=4 * size, height=4 * size, vae_scale=4, size_multiple=4)
    x2 = replace(card, family="x2", width=2 * size, height=2 * size, size_multiple=16)
    stages = {
        "x4": StageCard("x4", 4, x4, scheduler, noising=scheduler, most_noise=350, noise_level=20, guidance=9.0),
        "x2": StageCard("x2", 2, x2, replace(scheduler, sampler="euler")),
        "nearest": StageCard("network", 2),
    }
    keys = [TEXT_ENCODERS[0], UNET, VAE_DECODER, VAE_ENCODER]
    for name in ("x4", "x2"):
        keys += [replace(key, stage=name) for key in (UNET, VAE_DECODER, VAE_ENCODER)]
    return Bundle(
        path=Path(__file__).parent,
        card=card,
        scheduler=scheduler,
        components={
            key: Component("", (), ()) for key in (*keys, ComponentId("upscaler", "upscaler", stage="nearest"))
        },
        precision="fp32",
        versions={},
        source={"kind": "fake"},
        files={},
        stages=stages,
    )


class Fake:
    """Opens any bundle; pictures mean something with those that predict epsilon, such as `fake_bundle()`."""

    name = "fake"
    precision = "fp32"

    def __init__(self, bundle: Bundle, *, precision: str = "auto", threads: int = 1) -> None:
        if precision not in ("auto", "fp32"):
            raise BackendError(f"backend 'fake' computes in fp32, not in {precision}")
        self.versions: dict[str, str] = {}
        self._bundle = bundle
        self._alphas = alphas_cumprod(bundle.scheduler)

    def bank_dtype(self, component: ComponentId) -> type[np.float32]:
        return np.float32

    def open(self, component: ComponentId, banks: Arrays | None = None) -> Graph:
        return Lent(self._graph(component))

    def _graph(self, component: ComponentId) -> Graph:
        if component.role == "text_encoder":
            return encode_text
        card = self._bundle.model(component.stage)
        if card is None:
            return Enlarger(self._bundle.stages[component.stage].scale)
        if component.role == "vae_decoder":
            return Decoder(card.vae_scale)
        if component.role == "vae_encoder":
            return Encoder(card.vae_scale)
        return Denoiser(self._alphas, card.latent_channels)


class Lent:
    """A graph whose outputs are NaN from its next call on, as engines reuse theirs: who keeps one uncopied is found out."""

    def __init__(self, graph: Graph) -> None:
        self._graph, self._outputs = graph, dict[str, NDArray[np.float32]]()

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        made = {name: np.array(array) for name, array in self._graph(inputs).items()}  # inputs may be older outputs
        for array in self._outputs.values():
            array.fill(np.nan)
        self._outputs = made
        return dict(made)


def encode_text(inputs: Arrays) -> dict[str, NDArray[np.float32]]:
    """Token ids [n, L] to pretended hidden states [n, L, DIM]."""
    ids = inputs["input_ids"]
    return {"hidden_states": np.sin(ids[..., None] * np.arange(1, DIM + 1)).astype(np.float32)}


class Denoiser:
    """epsilon = E[noise | x_t, prompt] for Gaussian data; what stands beside the latents changes nothing if it is finite."""

    def __init__(self, alphas: NDArray[np.float64], channels: int = 4) -> None:
        self._alphas, self._channels = alphas, channels

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        x, t = inputs["sample"][:, : self._channels], inputs["timestep"]
        alpha_squared = np.interp(t, np.arange(len(self._alphas)), self._alphas)
        alpha, sigma = np.sqrt(alpha_squared), np.sqrt(1 - alpha_squared)
        gain = (sigma / (alpha_squared * SPREAD**2 + sigma**2)).astype(np.float32).reshape(-1, 1, 1, 1)
        mean = inputs["encoder_hidden_states"].mean(axis=1)[:, : x.shape[1]].reshape(len(x), -1, 1, 1)
        beside = np.float32(0) * inputs["sample"][:, self._channels :].sum(axis=(1, 2, 3), keepdims=True)
        return {"prediction": gain * (x - alpha.astype(np.float32).reshape(-1, 1, 1, 1) * mean) + beside}


class Decoder:
    """The first three latent channels as colours, each latent a square of `scale` pixels."""

    def __init__(self, scale: int) -> None:
        self._scale = scale

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        pixels = np.clip(inputs["latents"][:, :3], -1, 1)
        return {"pixels": pixels.repeat(self._scale, axis=2).repeat(self._scale, axis=3)}


class Encoder:
    """Means of squares of `scale` pixels as three latent channels, 0 as the fourth; no variance."""

    def __init__(self, scale: int) -> None:
        self._scale = scale

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        rows, channels, height, width = inputs["pixels"].shape
        h, w = height // self._scale, width // self._scale
        means = inputs["pixels"].reshape(rows, channels, h, self._scale, w, self._scale).mean(axis=(3, 5))
        moments = np.full((rows, 8, h, w), -30, np.float32)
        moments[:, :3], moments[:, 3] = means, 0
        return {"moments": moments}


class Enlarger:
    """Each pixel `scale` times."""

    def __init__(self, scale: int) -> None:
        self._scale = scale

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        return {"pixels": inputs["image"].repeat(self._scale, axis=2).repeat(self._scale, axis=3)}
