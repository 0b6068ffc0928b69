"""What one writes around bare engines: text encoder, a DDIM loop in NumPy, decoder; guidance by two rows in one call."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from tokenizers import Tokenizer

from suite.cases import Workload
from suite.models import Model

Graph = Callable[[Mapping[str, np.ndarray]], np.ndarray]  # its first output


class PlainLoop:
    """graphs: "text_encoder", "denoiser/unet" and "vae_decoder" of our plain bundle."""

    def __init__(self, model: Model, graphs: Mapping[str, Graph]) -> None:
        self.graphs = graphs
        bundle = model.bundle()
        card = json.loads((bundle / "bundle.json").read_text())
        self.text = card["model"]["text_encoders"][0]
        self.channels, self.scale = card["model"]["latent_channels"], card["model"]["vae_scale"]
        self.velocity = card["scheduler"]["prediction_type"] == "v_prediction"
        self.tokenizer = Tokenizer.from_file(str(bundle / self.text["tokenizer"]))
        self.tokenizer.no_padding()
        schedule = card["scheduler"]
        betas = np.linspace(schedule["beta_start"] ** 0.5, schedule["beta_end"] ** 0.5, 1000, dtype=np.float64) ** 2
        self.alphas = np.cumprod(1 - betas)

    def ids(self, text: str) -> list[int]:
        own, most = self.text, self.text["max_length"]
        found = self.tokenizer.encode(text, add_special_tokens=False).ids[: most - 2]
        return [own["bos_id"], *found, own["eos_id"], *[own["pad_id"]] * (most - 2 - len(found))]

    def one(self, workload: Workload) -> np.ndarray:
        from stepforge.runtime.engine.noise import Generator

        side = workload.size // self.scale
        x = Generator(workload.seed).normal((1, self.channels, side, side)).astype(np.float32)
        ids = np.array([self.ids(""), self.ids(workload.prompt)], np.int64)
        text = self.graphs["text_encoder"]({"input_ids": ids})
        ratio = 1000 // workload.steps
        for t in (np.arange(workload.steps) * ratio + 1)[::-1]:
            rows = {
                "sample": np.concatenate([x, x]),
                "timestep": np.full(2, t, np.float32),
                "encoder_hidden_states": text,
            }
            without, prompted = self.graphs["denoiser/unet"](rows)
            predicted = without + workload.guidance * (prompted - without)
            x = self.step(x, predicted[None], int(t), int(t) - ratio)
        picture = self.graphs["vae_decoder"]({"latents": x})[0]
        return np.clip(picture.transpose(1, 2, 0) / 2 + 0.5, 0, 1)

    def step(self, x: np.ndarray, predicted: np.ndarray, now: int, then: int) -> np.ndarray:
        a, b = self.alphas[now], self.alphas[max(then, 0)]
        if self.velocity:
            clean, noise = a**0.5 * x - (1 - a) ** 0.5 * predicted, a**0.5 * predicted + (1 - a) ** 0.5 * x
        else:
            clean, noise = (x - (1 - a) ** 0.5 * predicted) / a**0.5, predicted
        return (b**0.5 * clean + (1 - b) ** 0.5 * noise).astype(np.float32)

    def draw(self, workloads: Sequence[Workload]) -> list[np.ndarray]:
        return [self.one(workload) for workload in workloads]
