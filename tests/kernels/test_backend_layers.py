"""The torch backend's LoRA layers on the Triton bodies, in the interpreter: banks as CUDA holds them, rows that differ."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stepforge.kernels import conv, ops
from stepforge.kernels.dispatch import tiles
from stepforge.kernels.dispatch.choose import dispatch
from stepforge.runtime.backends import Banks
from stepforge.runtime.backends.torch import lowrank as torch_lowrank
from stepforge.runtime.backends.torch.banks import DeviceBanks
from stepforge.runtime.backends.torch.lora import Stack, View

ARCH = 80
ULP = 2.0**-11  # fp16: y is rounded once, S once before its second product


def on_triton_linear(x, w, a, b, scale, ranks, *, residual=None, **extra):
    flat, over = (value.reshape(-1, value.shape[-1]) if value is not None else None for value in (x, residual))
    y = ops.run_linear(flat, w, a, b, scale, ranks, arch=ARCH, residual=over, **extra)
    return y.reshape(*x.shape[:-1], len(w))


def on_triton_geglu(x, w, a, b, scale, ranks, **extra):
    y = ops.run_geglu(x.reshape(-1, x.shape[-1]), w, a, b, scale, ranks, arch=ARCH, **extra)
    return y.reshape(*x.shape[:-1], len(w) // 2)


def on_triton_conv(y, x, a, b, scale, ranks, *, table, stride, pad, block_m):
    pixels = [value.permute(0, 2, 3, 1).contiguous() for value in (y, x)]
    tile = tiles.expand_tile(ARCH, block_m or 64)
    found = conv.lowrank_conv(*pixels, a, b, scale, ranks, tile=tile, table=table, stride=stride, pad=pad)
    return found.permute(0, 3, 1, 2)


@pytest.fixture
def triton_layers(monkeypatch):
    """`torch.lowrank` as on a GPU, but for the device."""
    kernels = SimpleNamespace(
        lowrank_linear=on_triton_linear, lowrank_geglu=on_triton_geglu, lowrank_conv=on_triton_conv
    )
    monkeypatch.setattr(torch_lowrank, "kernels", kernels)

    def choice(layer, rank, device):
        found = dispatch(layer, tiles.padded_rank(rank), ARCH, grouped=True)
        return found.block_m, found.path

    monkeypatch.setattr(torch_lowrank, "_choice", choice)
    monkeypatch.setattr(torch_lowrank, "_conv_block", lambda pixels, device: 64)


def copied(arrays, *views):
    banks = Banks({name: array.astype(np.float32) for name, array in arrays.items()}, np.zeros(3, np.int64))
    placed = DeviceBanks(banks, views, (), device=torch.device("cpu"), dtype=torch.float16, shared={}, copied=True)
    placed.refresh()
    return [placed.tensors[view.name] for view in views]


@pytest.mark.parametrize("rank", [8, 20])
def test_linear(triton_layers, rank):
    """The second of three layers that share an A, at a rank that the copy pads."""
    random = np.random.RandomState(rank)
    down, up = random.standard_normal((3, 64, 3 * rank)) / 8, random.standard_normal((3, rank, 96)) / 8
    a, b = copied({"A": down, "B": up}, View("A", "down", rank, 2 * rank), View("B", "up", 0, rank))
    x, w, bias = torch.randn(3, 70, 64).half(), (torch.randn(96, 64) / 8).half(), torch.randn(96).half()
    slots, strength = torch.tensor([2, 0, 2]), torch.tensor([0.5, 1.0, -2.0]).reshape(3, 1, 1)
    found = torch_lowrank.linear(x, w, bias, a, b, slots, strength, rank=rank)
    exact_a, exact_b = a[slots, :rank].double(), b[slots, :, :rank].double()
    expected = x.double() @ w.double().T + bias.double() + strength * (x.double() @ exact_a.mT @ exact_b.mT)
    assert (found.double() - expected).norm() <= ULP * expected.norm()


@pytest.mark.parametrize("rank", [8, 20])
def test_three_layers_in_one(triton_layers, rank):
    """q, k and v: each slice's ranks are padded by themselves."""
    random = np.random.RandomState(rank)
    banks = {"A": random.standard_normal((3, 64, 3 * rank)) / 8}
    banks |= {f"B{part}": random.standard_normal((3, rank, 96)) / 8 for part in range(3)}
    downs = Stack(tuple(View("A", "down", part * rank, (part + 1) * rank) for part in range(3)))
    ups = Stack(tuple(View(f"B{part}", "up", 0, rank) for part in range(3)))
    a, b = copied(banks, downs, ups)
    x, w, bias = torch.randn(3, 70, 64).half(), (torch.randn(288, 64) / 8).half(), torch.randn(288).half()
    slots, strength = torch.tensor([2, 0, 2]), torch.tensor([0.5, 1.0, -2.0]).reshape(3, 1, 1)
    found = torch_lowrank.linear(x, w, bias, a, b, slots, strength, rank=rank, slices=3)
    expected = x.double() @ w.double().T + bias.double()
    for part in range(3):
        down, up = (torch.from_numpy(banks[name])[slots].half().double() for name in ("A", f"B{part}"))
        term = x.double() @ down[:, :, part * rank : (part + 1) * rank] @ up
        expected[..., 96 * part : 96 * (part + 1)] += strength * term
    assert (found.double() - expected).norm() <= ULP * expected.norm()


@pytest.mark.parametrize("shape", [(3, 70, 96), (3, 1, 96)], ids=["in the kernel", "broadcast"])
def test_a_residual(triton_layers, shape):
    random = np.random.RandomState(0)
    down, up = random.standard_normal((3, 64, 8)) / 8, random.standard_normal((3, 8, 96)) / 8
    a, b = copied({"A": down, "B": up}, View("A", "down", 0, 8), View("B", "up", 0, 8))
    x, w, residual = torch.randn(3, 70, 64).half(), (torch.randn(96, 64) / 8).half(), torch.randn(shape).half()
    slots, strength = torch.tensor([1, 2, 0]), torch.tensor([0.5, 1.0, -2.0]).reshape(3, 1, 1)
    found = torch_lowrank.linear(x, w, None, a, b, slots, strength, residual, rank=8)
    exact_a, exact_b = a[slots, :8].double(), b[slots, :, :8].double()
    layer = x.double() @ w.double().T + strength * (x.double() @ exact_a.mT @ exact_b.mT)
    expected = layer + residual.double()
    once_more = 0 if shape == (3, 70, 96) else ULP * layer.norm()  # added after the layer was rounded
    assert (found.double() - expected).norm() <= ULP * expected.norm() + once_more


@pytest.mark.parametrize("rank", [8, 20])
def test_geglu(triton_layers, rank):
    random = np.random.RandomState(rank)
    down, up = random.standard_normal((3, 64, rank)) / 8, random.standard_normal((3, rank, 192)) / 8
    a, b = copied({"A": down, "B": up}, View("A", "down", 0, rank), View("B", "up", 0, rank))
    x, w, bias = torch.randn(3, 70, 64).half(), (torch.randn(192, 64) / 8).half(), torch.randn(192).half()
    slots, strength = torch.tensor([2, 0, 1]), torch.tensor([0.5, 1.0, -2.0]).reshape(3, 1, 1)
    found = torch_lowrank.geglu(x, w, bias, a, b, slots, strength, rank=rank)
    exact_a, exact_b = a[slots, :rank].double(), b[slots, :, :rank].double()
    h = x.double() @ w.double().T + bias.double() + strength * (x.double() @ exact_a.mT @ exact_b.mT)
    value, gate = h.chunk(2, -1)
    expected = value * F.gelu(gate)
    assert (found.double() - expected).norm() <= ULP * expected.norm()


@pytest.mark.parametrize(("side", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_convolution(triton_layers, side, stride):
    random = np.random.RandomState(side)
    down, up = random.standard_normal((3, 8 * side**2, 32)) / 8, random.standard_normal((3, 48, 8)) / 8
    a, b = copied({"A": down, "B": up}, View("A", "conv down", 0, 8, side**2), View("B", "conv up", 0, 8))
    x, w, bias = torch.randn(2, 32, 9, 10).half(), (torch.randn(48, 32, side, side) / 16).half(), torch.randn(48).half()
    slots, strength = torch.tensor([1, 2]), torch.tensor([0.5, -1.0]).reshape(2, 1, 1)
    pad = side // 2
    found = torch_lowrank.conv(x, w, bias, a, b, slots, strength, rank=8, stride=stride, pad=pad)
    expected = F.conv2d(x.double(), w.double(), bias.double(), stride, pad)
    for row, slot in enumerate(slots.tolist()):
        taps = a[slot, :8].double().permute(0, 3, 1, 2)
        low = F.conv2d(x[row : row + 1].double(), taps, None, stride, pad)
        expected[row] += strength[row].item() * torch.einsum("rhw,nr->nhw", low[0], b[slot, :, :8].double())
    assert (
        found.double() - expected
    ).norm() <= 2 * ULP * expected.norm()  # the base is rounded before the term is added
