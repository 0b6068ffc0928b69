"""The x2 latent upscaler as a network that predicts v, and its text encoder.

    sample [rows, 8, height, width], timestep [rows] = 0.25·ln sigma, encoder_hidden_states [rows, tokens, dim],
    text_embeds [rows, dim] -> prediction [rows, 4, height, width]

Its pipeline makes of the output F the clean latent x/(sigma² + 1) + sigma/sqrt(sigma² + 1)·F, which is what v-prediction makes
of v = −F: the graph gives −F, without the fifth channel, and the plan is any sampler's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepforge.export.graph.modules import ClipEncoder, at_end
from stepforge.export.graph.resample import for_any_size
from stepforge.export.graph.trace import Traced

NOISE_FEATURES = 64  # cosines and as many sines of the low-resolution latents' noise level, which is 0 always


class LatentUpscaler(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        for_any_size(unet)
        self.unet = unet
        # cosine and sine of no noise
        self.clean: Tensor
        self.register_buffer("clean", torch.tensor([[1.0] * NOISE_FEATURES + [0.0] * NOISE_FEATURES]), persistent=False)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor) -> Tensor:
        dtype = self.unet.dtype
        clean = self.clean.float() + 0 * text_embeds[:, :1]  # one a row
        condition = torch.cat([clean, text_embeds], dim=1).to(dtype)
        out = self.unet(
            sample.to(dtype), timestep, encoder_hidden_states.to(dtype), timestep_cond=condition, return_dict=False
        )[0]
        return -1.0 * out[:, :-1].float()  # bundles allow no Neg on every engine


class PooledClipEncoder(ClipEncoder):
    """Hidden states of the last layer before the final norm, and pooled text behind it."""

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        core = getattr(self.model, "text_model", self.model)
        hidden = core.embeddings(input_ids=input_ids)
        for layer in core.encoder.layers:
            hidden = layer(hidden, self.mask)
        return hidden.float(), at_end(core, input_ids, core.final_layer_norm(hidden)).float()


def text_encoder(model: Any, length: int) -> Traced:
    """length: tokens of one chunk."""
    width = model.config.hidden_size
    return Traced(
        PooledClipEncoder(model, length, penultimate=False),
        {"input_ids": torch.zeros(2, length, dtype=torch.int64)},
        {"input_ids": ("rows", length)},
        {"hidden_states": ("rows", length, width), "pooled": ("rows", width)},
    )


def latent_upscaler(unet: Any) -> Traced:
    """Sides of its latents are multiples of 2^(levels − 1)."""
    config = unet.config
    levels, dim = len(config.block_out_channels), config.cross_attention_dim
    pooled = config.time_cond_proj_dim - 2 * NOISE_FEATURES
    multiple = 2 ** (levels - 1)
    example = {
        "sample": torch.zeros(2, config.in_channels, 4 * multiple, 6 * multiple),
        "timestep": torch.zeros(2),
        "encoder_hidden_states": torch.zeros(2, 77, dim),
        "text_embeds": torch.zeros(2, pooled),
    }
    return Traced(
        LatentUpscaler(unet),
        example,
        {
            "sample": ("rows", config.in_channels, "height", "width"),
            "timestep": ("rows",),
            "encoder_hidden_states": ("rows", "tokens", dim),
            "text_embeds": ("rows", pooled),
        },
        {"prediction": ("rows", config.out_channels - 1, "height", "width")},
        multiple=multiple,
        derive=True,
    )
