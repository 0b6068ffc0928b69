"""A lean export writes the operators of a whole one, and leaves alone what it does not know."""

from __future__ import annotations

import contextlib

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from stepforge.export.graph import exporter, trace

pytestmark = pytest.mark.slow  # the quick lane has three minutes


class Casts(nn.Module):
    """To another type, to the same one in the middle and at the end, and back at the border; a padding as VAE encoders have; a
    whole number among the operands, which has to become one of their type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8, dtype=dtype), nn.Linear(8, 8, dtype=dtype)
        self.dropout, self.dtype = nn.Dropout(0.5), dtype

    def forward(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        padded = nn.functional.pad(sample.to(self.dtype), (0, 1), mode="constant", value=0)[..., :-1]
        inner = self.norm(padded * 2).to(sample.device, self.dtype)
        scores = nn.functional.scaled_dot_product_attention(*(inner.unsqueeze(1),) * 3)
        scores = scores.reshape(sample.shape)
        return self.dropout(self.linear(nn.functional.silu(scores))).float(), inner.float()


class Pixels(Casts):
    """Besides casts a group norm, and what DeepFloyd IF's networks have more than others."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.groups = nn.GroupNorm(5, 5)
        with torch.no_grad():
            self.groups.weight += torch.randn(5)

    def forward(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        one, other = super().forward(self.groups(sample))
        mixed = torch.softmax(one @ other.transpose(1, 2), -1) @ other
        pooled = nn.functional.avg_pool2d(mixed.unsqueeze(1), (1, 2))[:, 0]
        return torch.cat([mixed.unflatten(2, (2, 4)).mean(2), pooled], -1), other


class Upscales(Casts):
    """Besides casts what text encoders and feed-forward networks have more than others."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.prelu = nn.PReLU(4)

    def forward(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        one, other = super().forward(sample)
        scaled = (one - (one == 2).float()) * torch.rsqrt(other.pow(2).mean(-1, keepdim=True) + 1)
        picture = nn.functional.leaky_relu(torch.tanh(scaled), 0.2).unsqueeze(1)
        picture = self.prelu(nn.functional.pixel_unshuffle(picture[:, :, :4], 2))
        return torch.cat([nn.functional.pixel_shuffle(picture, 2)[:, 0], scaled[:, 4:]], 1), other


class Unknown(Casts):
    """Besides casts an operator that only a whole decomposition has a translation for."""

    def forward(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        one, other = super().forward(sample)
        return torch.nn.functional.mse_loss(one, other, reduction="none"), other


def exported(module: nn.Module, monkeypatch: pytest.MonkeyPatch, *, lean: bool) -> tuple[ir.Model, list[bool]]:
    """The graph, and what casts_replaced said."""
    said: list[bool] = []
    ours = exporter.casts_replaced

    def spy(program: torch.export.ExportedProgram) -> bool:
        said.append(ours(program))
        return said[-1]

    traced = trace.Traced(
        module, {"sample": torch.zeros(2, 5, 8)}, {"sample": ("rows", 5, 8)},
        {"one": ("rows", 5, 8), "other": ("rows", 5, 8)},
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(exporter, "casts_replaced", spy)
        if not lean:
            patch.setattr(trace, "lean", contextlib.nullcontext)
        return trace.trace(traced), said


@pytest.mark.parametrize(("kind", "dtype", "plain"), [
    (Casts, torch.float32, True), (Casts, torch.float16, True), (Pixels, torch.float32, True), (Upscales, torch.float32, True),
    (Unknown, torch.float32, False),
])  # fmt: skip
def test_same_operators(kind: type[Casts], dtype: torch.dtype, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = kind(dtype).eval()
    model, said = exported(module, monkeypatch, lean=True)
    whole, _ = exported(module, monkeypatch, lean=False)
    assert said == [plain]
    assert [node.op_type for node in model.graph] == [node.op_type for node in whole.graph]
    x = torch.randn(3, 5, 8)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    for found, expected in zip(session.run(None, {"sample": x.numpy()}), module(x), strict=True):
        # ONNX Runtime adds up in another order: some units in the last of 24 or 11 bits
        limit = 1e-5 if dtype == torch.float32 else 4e-3
        np.testing.assert_allclose(found, expected.detach().numpy(), rtol=limit, atol=limit)
