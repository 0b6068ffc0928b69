"""Feed-forward super-resolution networks as graphs: image [rows, 3, height, width] in 0..1 -> pixels, s times as large.

What a network makes leaves the graph unclamped: clamping would hide what is not finite. Sizes are padded and cropped by who
calls (`StageCard.size_multiple`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepforge.export.graph.trace import Traced


class Upscaler(nn.Module):
    """A network behind its border in float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.network(image.to(self.dtype)).float()
        return result


class Merged(nn.Module):
    """SPAN's three convolutions and its shortcut as the one convolution that they are, which spandrel computes anew at every
    call."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        layer.update_params()
        self.conv, self.leaks = layer.eval_conv, layer.has_relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return functional.leaky_relu(x, 0.05) if self.leaks else x


class Normed(nn.Module):
    """SPAN's normalization of its input as constants: spandrel's module changes itself at every call."""

    def __init__(self, span: Any) -> None:
        super().__init__()
        self.span, self.range = span, span.img_range
        self.mean: Tensor
        self.register_buffer("mean", span.mean.to(next(span.parameters())), persistent=False)
        span.no_norm = torch.zeros(1)  # `is_norm` is False then

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.span((x - self.mean) * self.range)
        return result


def feed_forward(descriptor: Any) -> Traced:
    """spandrel's descriptor as a module ready for export; the descriptor's module is changed."""
    network, scale, multiple = descriptor.model, descriptor.scale, descriptor.size_requirements.multiple_of
    if str(descriptor.architecture.id) == "SPAN":
        for parent in list(network.modules()):
            for name, layer in list(parent.named_children()):
                if hasattr(layer, "update_params"):
                    setattr(parent, name, Merged(layer))
        network = Normed(network) if network.is_norm else network
    if str(descriptor.architecture.id) == "ESRGAN":
        # in place torch.onnx decomposes activations; nobody else reads what these change (in SPAN somebody does)
        for layer in network.modules():
            if isinstance(layer, nn.LeakyReLU):
                layer.inplace = False
    return Traced(
        Upscaler(network, descriptor.dtype),
        {"image": torch.zeros(2, 3, 8 * multiple, 12 * multiple)},
        {"image": ("rows", 3, "height", "width")},
        {"pixels": ("rows", 3, f"{scale}*height", f"{scale}*width")},
        multiple,
    )
