"""The bank rewrite on a small network with every kind of layer, against the formula in float64."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from stepforge.export.build import BankOptions
from stepforge.export.graph import trace
from stepforge.export.graph.bank import add_bank, transformer_only, used_modules
from stepforge.export.models.networks import modules_of
from stepforge.runtime.bundle import Module
from stepforge.runtime.engine.adapters import Buffers
from stepforge.runtime.errors import CheckpointError

RANK, SLOTS = 3, 3


class Network(nn.Module):
    """3×3 with stride 2 and odd padding, 1×1, q and k on one input, and a layer of one vector a row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.point = nn.Conv2d(6, 5, 1)
        self.to_q, self.to_k = nn.Linear(5, 7, bias=False), nn.Linear(5, 7, bias=False)
        self.emb = nn.Linear(2, 7)
        self.unused = nn.Linear(9, 9)


class Whole(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.unet = network

    def forward(self, sample: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        net, dtype = self.unet, self.unet.conv.weight.dtype
        x = net.point(net.conv(sample.to(dtype))).flatten(2).transpose(1, 2)
        return (net.to_q(x) * net.to_k(x) + net.emb(vector.to(dtype))[:, None]).float()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float16, 2e-2)])
def test_every_kind_of_layer_with_its_own_adapter_in_each_row(tmp_path, dtype, limit):
    torch.manual_seed(0)
    network = Network().to(dtype)
    traced = trace.Traced(
        Whole(network),
        {"sample": torch.zeros(2, 4, 9, 12), "vector": torch.zeros(2, 2)},
        {"sample": ("rows", 4, "height", "width"), "vector": ("rows", 2)},
        {"prediction": ("rows", "tokens", 7)},
    )
    entry = trace.save(traced, tmp_path)
    modules = used_modules(tmp_path / entry.graph, modules_of(network))
    assert [module.path for module in modules] == ["conv", "point", "to_q", "to_k", "emb"]
    bank, tensors = add_bank([tmp_path / entry.graph], modules, SLOTS, RANK)
    assert bank.shared["to_q"] == ("to_q", "to_k")
    buffers = Buffers(bank, modules, np.float32)
    assert {t.name: t.shape for t in tensors if "lora" in t.name} == {k: a.shape for k, a in buffers.arrays.items()}

    random = np.random.default_rng(0)
    pairs = {}
    for slot, rank in ((1, 3), (2, 1)):
        for module in modules:
            down = random.standard_normal((rank, int(np.prod(module.shape[1:])))).astype(np.float32)
            pairs[slot, module.path] = down, random.standard_normal((module.shape[0], rank)).astype(np.float32)
        blocks = {m.path: buffers.block(m.path, *pairs[slot, m.path]) for m in modules}
        buffers.fill(slot, [(blocks, 1.0)])
    inputs = {"sample": random.standard_normal((4, 4, 11, 8)).astype(np.float32),
              "vector": random.standard_normal((4, 2)).astype(np.float32)}  # fmt: skip
    slots, strengths = [1, 0, 2, 1], [0.5, 1.0, -0.7, 0.0]
    session = onnxruntime.InferenceSession(tmp_path / entry.graph, providers=["CPUExecutionProvider"])
    rows = {"adapter": np.array(slots), "adapter_strength": np.array(strengths, np.float32).reshape(-1, 1, 1)}
    (found,) = session.run(None, {**inputs, **rows, **buffers.arrays})
    for row, (slot, strength) in enumerate(zip(slots, strengths, strict=True)):
        exact = Network().double()
        exact.load_state_dict({key: value.double() for key, value in network.state_dict().items()})
        for module in modules if slot else ():
            down, up = pairs[slot, module.path]
            exact.get_submodule(module.path).weight.data += torch.from_numpy(
                strength * (up.astype(np.float64) @ down).reshape(module.shape)
            )
        one = [torch.from_numpy(value[row : row + 1]).double() for value in inputs.values()]
        with torch.no_grad():
            wanted = exact_forward(exact, *one)
        assert np.abs(found[row] - wanted[0].numpy()).max() <= limit * np.abs(wanted.numpy()).max()


def exact_forward(net: Network, sample: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    x = net.point(net.conv(sample)).flatten(2).transpose(1, 2)
    return net.to_q(x) * net.to_k(x) + net.emb(vector)[:, None]


def test_transformer_targets_are_what_trainers_change():
    modules = [
        Module(path, "linear", (4, 4), True)
        for path in ("time_embedding.linear_1", "down_blocks.0.attentions.0.proj_in", "down_blocks.0.resnets.0.conv1")
    ]
    assert [m.path for m in transformer_only(modules)] == ["down_blocks.0.attentions.0.proj_in"]


@pytest.mark.parametrize("options", [(0,), (65,), (4, 0), (4, 513), (4, 16, "attention")])
def test_impossible_banks_are_refused(options):
    with pytest.raises(CheckpointError, match=r"possible|unknown"):
        BankOptions(*options)
