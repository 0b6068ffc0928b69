"""ControlNets to graphs: a hint encoder that runs once a request, and a residual network that runs where a plan asks for it.

    hint       image [rows, 3, s·height, s·width] in 0..1 -> hint [rows, C, height, width]
    residuals  what the denoiser reads, hint, scale [rows, n] -> residual_0 ... residual_{n-1}, the last one the middle block's

diffusers' ControlNetModel computes the hint again in every step; here it is an input. `scale` multiplies each residual of
each row, so that strength, guess mode and windows are numbers, not graphs. With `global_pool_conditions` the residuals are
[rows, C, 1, 1]. In names of sizes, height/2 is rounded up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepforge.export.graph.modules import network_inputs
from stepforge.export.graph.rewire import RESIDUAL
from stepforge.export.graph.trace import Traced


class Hint(nn.Module):
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.embedding = net.controlnet_cond_embedding
        self.flip = net.config.controlnet_conditioning_channel_order == "bgr"
        self.dtype = net.dtype

    def forward(self, image: Tensor) -> Tensor:
        image = image.flip(1) if self.flip else image
        return self.embedding(image.to(self.dtype)).float()


class Residuals(nn.Module):
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        hint: Tensor,
        scale: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        dtype = self.net.dtype
        extra = None
        if text_embeds is not None:
            extra = {"text_embeds": text_embeds, "time_ids": time_ids}
        down, mid = self.net(
            sample.to(dtype), timestep, encoder_hidden_states.to(dtype), hint.to(dtype), added_cond_kwargs=extra,
            return_dict=False,
        )  # fmt: skip
        return tuple(value.float() * scale[:, i, None, None, None] for i, value in enumerate((*down, mid)))


def split(net: Any) -> tuple[Traced, Traced]:
    """The hint encoder and the residual network of a ControlNetModel, which is taken apart."""
    config = net.config
    width = config.block_out_channels[0]
    down = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
    hint = Traced(
        Hint(net),
        {"image": torch.zeros(2, 3, 8 * down, 12 * down)},
        {"image": ("rows", 3, "height", "width")},
        {"hint": ("rows", width, f"height/{down}", f"width/{down}")},
        multiple=down,
    )
    net.controlnet_cond_embedding = nn.Identity()
    net.register_to_config(controlnet_conditioning_channel_order="rgb")
    count = len(net.controlnet_down_blocks) + 1
    example, inputs, least = network_inputs(config)
    height, width_ = example["sample"].shape[2:]
    example |= {"hint": torch.zeros(2, width, height, width_), "scale": torch.ones(2, count)}
    inputs |= {"hint": ("rows", width, "height", "width"), "scale": ("rows", count)}
    outputs: dict[str, tuple[int | str, ...]] = {}
    shapes = [(module.out_channels, level) for module, level in _levels(net)]
    for index, (channels, level) in enumerate(shapes):
        outputs[f"{RESIDUAL}{index}"] = ("rows", channels, f"height/{2**level}", f"width/{2**level}")
    return hint, Traced(Residuals(net), example, inputs, outputs, least=least, derive=True)


def _levels(net: Any) -> list[tuple[Any, int]]:
    """The output layers, and how often the value that each reads was halved."""
    levels = [0]
    for level, block in enumerate(net.down_blocks):
        levels += [level] * len(block.resnets)
        if block.downsamplers is not None:
            levels.append(level + 1)
    return list(zip((*net.controlnet_down_blocks, net.controlnet_mid_block), (*levels, levels[-1]), strict=True))
