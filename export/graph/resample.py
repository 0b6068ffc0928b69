"""How UNets change the size of what they read, as graphs can for sides that vary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepforge.export.models.networks import size_multiple
from stepforge.runtime.errors import CheckpointError

NEVER_DIVIDES = 40  # levels: diffusers' UNet forwards the sizes of skip connections unless 2^levels divides all sides


class Upsample(nn.Module):
    """diffusers' Upsample2D to a given size, or to twice its own. diffusers' compares sides as numbers (a detour for 2^31
    elements), which an export cannot for a side that varies."""

    def __init__(self, conv: nn.Module | None) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, hidden_states: Tensor, output_size: Any = None) -> Tensor:
        scale = 2.0 if output_size is None else None
        result = functional.interpolate(hidden_states, size=output_size, scale_factor=scale, mode="nearest")
        return result if self.conv is None else self.conv(result)


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


def for_any_size(unet: Any) -> None:
    """Have a UNet upsample to the sizes of its skip connections, as diffusers' forward does for sides that are no multiples
    of 2^levels; for those that are, both are the same. Changes the UNet, also
    the fixed filters of K blocks.

    Raises CheckpointError for other upsamplers.
    """
    from diffusers.models.downsampling import KDownsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import KUpsample2D, Upsample2D

    for block in unet.down_blocks:
        for index, layer in enumerate(block.downsamplers or ()):
            if type(layer) is KDownsample2D:
                block.downsamplers[index] = Halve(layer)
    for block in unet.up_blocks:
        for index, layer in enumerate(block.upsamplers or ()):
            if type(layer) is KUpsample2D:
                block.upsamplers[index] = Double()
                continue
            if type(layer) is ResnetBlock2D and type(layer.upsample) is Upsample2D and not layer.upsample.use_conv:
                layer.upsample = Upsample(None)
                continue
            if (
                type(layer) is not Upsample2D
                or layer.norm is not None
                or layer.use_conv_transpose
                or not layer.use_conv
            ):
                raise CheckpointError(
                    f"the UNet upsamples by {type(layer).__name__}, which stepforge does not support; supported: "
                    "nearest neighbours and a convolution"
                )
            block.upsamplers[index] = Upsample(layer.conv)
    unet.num_upsamplers = NEVER_DIVIDES if size_multiple(unet.config) == 1 else 0
