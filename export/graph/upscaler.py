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

from stepforge.export.graph.modules import ClipEncoder, at_end
from stepforge.export.graph.trace import Traced

NOISE_FEATURES = 64  # cosines and as many sines of the low-resolution latents' noise level, which is 0 always


class Halve(nn.Module):
    """diffusers' KDownsample2D, one channel at a time: its own builds a [C, C, 4, 4] kernel that is 0 off the diagonal."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.kernel: Tensor
        self.register_buffer("kernel", layer.kernel, persistent=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return depthwise(reflected(hidden_states), self.kernel, stride=2)


class Double(nn.Module):
    """diffusers' KUpsample2D, a transposed convolution by [1, 3, 3, 1] / 4 on each axis with stride 2: pixels twice, and
    [1, 2, 1] / 4 over them."""

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([[1 / 4, 2 / 4, 1 / 4]])
        self.kernel: Tensor
        self.register_buffer("kernel", taps.T @ taps, persistent=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        twice = functional.interpolate(reflected(hidden_states), scale_factor=2.0, mode="nearest")
        return depthwise(twice[:, :, 1:-1, 1:-1], self.kernel, stride=1)


def reflected(x: Tensor) -> Tensor:
    """One more pixel on each side, of the row or column before the last; of slices, as bundles allow no Pad."""
    x = torch.cat([x[:, :, 1:2], x, x[:, :, -2:-1]], dim=2)
    return torch.cat([x[:, :, :, 1:2], x, x[:, :, :, -2:-1]], dim=3)


def depthwise(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    channels = x.shape[1]
    weight = kernel.to(x)[None, None].expand(channels, 1, -1, -1)
    return functional.conv2d(x, weight, stride=stride, groups=channels)


class LatentUpscaler(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        for block in unet.down_blocks:
            for index, layer in enumerate(block.downsamplers or ()):
                block.downsamplers[index] = Halve(layer)
        for block in unet.up_blocks:
            for index in range(len(block.upsamplers or ())):
                block.upsamplers[index] = Double()
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
