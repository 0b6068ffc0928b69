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
from torch.nn import functional

from stepforge.export.graph.trace import ClipEncoder, Traced, at_end

NOISE_FEATURES = 64  # cosines and as many sines of the low-resolution latents' noise level, which is 0 always


class Resample(nn.Module):
    """diffusers' KDownsample2D or KUpsample2D, one channel at a time: its own builds a [C, C, 4, 4] kernel that is 0 off the
    diagonal."""

    def __init__(self, layer: Any, *, up: bool) -> None:
        super().__init__()
        self.up, self.pad, self.mode = up, layer.pad, layer.pad_mode
        self.kernel: Tensor
        self.register_buffer("kernel", layer.kernel, persistent=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        channels = hidden_states.shape[1]
        pad = (self.pad + 1) // 2 if self.up else self.pad
        x = functional.pad(hidden_states, (pad,) * 4, self.mode)
        kernel = self.kernel.to(x)[None, None].expand(channels, 1, -1, -1)
        if self.up:
            return functional.conv_transpose2d(x, kernel, stride=2, padding=2 * self.pad + 1, groups=channels)
        return functional.conv2d(x, kernel, stride=2, groups=channels)


class LatentUpscaler(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        for block in (*unet.down_blocks, *unet.up_blocks):
            for name in ("downsamplers", "upsamplers"):
                for index, layer in enumerate(getattr(block, name, None) or ()):
                    getattr(block, name)[index] = Resample(layer, up=name == "upsamplers")
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor) -> Tensor:
        dtype = self.unet.dtype
        clean = torch.ones_like(text_embeds[:, :1]).expand(-1, NOISE_FEATURES)  # cosine and sine of no noise
        condition = torch.cat([clean, torch.zeros_like(clean), text_embeds], dim=1).to(dtype)
        out = self.unet(
            sample.to(dtype), timestep, encoder_hidden_states.to(dtype), timestep_cond=condition, return_dict=False
        )[0]
        return -out[:, :-1].float()


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
