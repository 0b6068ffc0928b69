"""An analytic denoiser without weights: for tests, for trying the API, and for measuring the engine's own overhead.

The data it pretends to know are Gaussian: x0 ~ N(mu(prompt), SPREAD²) in every latent element. The best prediction of a
denoiser is then a formula, so images are deterministic, depend on the prompt, and improve with more steps.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stepforge.runtime.backends import Arrays, Graph
from stepforge.runtime.bundle import (
    TEXT_ENCODERS,
    UNET,
    VAE_DECODER,
    Bundle,
    Component,
    ComponentId,
    ModelCard,
    TextEncoder,
)
from stepforge.runtime.bundle.scheduler import SchedulerCard
from stepforge.runtime.plan.schedules import alphas_cumprod

SPREAD = 0.5
DIM = 16  # width of the pretended text embedding


def fake_bundle(size: int = 512) -> Bundle:
    """A bundle with the shape of Stable Diffusion 1 whose only file is a tokenizer of one token a byte."""
    return Bundle(
        path=Path(__file__).parent,
        card=ModelCard(
            name="fake",
            family="sd1",
            width=size,
            height=size,
            latent_channels=4,
            vae_scale=8,
            size_multiple=8,
            scaling_factor=1.0,
            text_encoders=(TextEncoder("text_encoder", "fake_tokenizer.json", 77, 256, 257, 257),),
        ),
        scheduler=SchedulerCard(
            sampler="ddim", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        ),
        components={key: Component("", (), ()) for key in (TEXT_ENCODERS[0], UNET, VAE_DECODER)},
        precision="fp32",
        versions={},
        source={"kind": "fake"},
        files={},
    )  # fmt: skip


class Fake:
    """Opens any epsilon-prediction bundle, and `fake_bundle()`."""

    name = "fake"
    precision = "fp32"

    def __init__(self, bundle: Bundle, *, precision: str = "auto", threads: int = 1) -> None:
        self.versions: dict[str, str] = {}
        self._bundle = bundle
        self._alphas = alphas_cumprod(bundle.scheduler)

    def bank_dtype(self, component: ComponentId) -> type[np.float32]:
        return np.float32

    def open(self, component: ComponentId, banks: Arrays | None = None) -> Graph:
        if component.role == "text_encoder":
            return encode_text
        if component.role == "vae_decoder":
            return Decoder(self._bundle.card.vae_scale)
        return Denoiser(self._alphas)


def encode_text(inputs: Arrays) -> dict[str, NDArray[np.float32]]:
    """Token ids [n, L] to pretended hidden states [n, L, DIM]."""
    ids = inputs["input_ids"]
    return {"hidden_states": np.sin(ids[..., None] * np.arange(1, DIM + 1)).astype(np.float32)}


class Denoiser:
    """epsilon = E[noise | x_t, prompt] for Gaussian data."""

    def __init__(self, alphas: NDArray[np.float64]) -> None:
        self._alphas = alphas

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        x, t = inputs["sample"], inputs["timestep"]
        alpha_squared = np.interp(t, np.arange(len(self._alphas)), self._alphas)
        alpha, sigma = np.sqrt(alpha_squared), np.sqrt(1 - alpha_squared)
        gain = (sigma / (alpha_squared * SPREAD**2 + sigma**2)).astype(np.float32).reshape(-1, 1, 1, 1)
        mean = inputs["encoder_hidden_states"].mean(axis=1)[:, : x.shape[1]].reshape(len(x), -1, 1, 1)
        return {"prediction": gain * (x - alpha.astype(np.float32).reshape(-1, 1, 1, 1) * mean)}


class Decoder:
    """The first three latent channels as colours, each latent a square of `scale` pixels."""

    def __init__(self, scale: int) -> None:
        self._scale = scale

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        pixels = np.clip(inputs["latents"][:, :3], -1, 1)
        return {"pixels": pixels.repeat(self._scale, axis=2).repeat(self._scale, axis=3)}
