"""The exact tier with an adapter: the bits of diffusers with PEFT on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from stepforge.runtime.backends import open_backend
from stepforge.runtime.backends.torch import peft
from stepforge.runtime.backends.torch.precision import DTYPES
from stepforge.runtime.bundle import UNET, read
from stepforge.runtime.engine.adapters import Adapters

pytestmark = pytest.mark.slow  # the quick lane has three minutes

LAYERS = r".*(to_[qkv]|to_out\.0|net\.0\.proj|net\.2|proj_in|proj_out|conv\d?|conv_(in|out|shortcut)|time_emb_proj|linear_\d)"

RANK = 8  # of the adapter, and of the bundle's banks


@pytest.fixture(scope="module")
def step():
    """Three rows at timestep 0, whose sines are 0 and 1 whatever the exporter made of the frequencies."""
    random = np.random.RandomState(4)
    return {
        "sample": random.standard_normal((3, 4, 16, 24)).astype(np.float32),
        "timestep": np.zeros(3, np.float32),
        "encoder_hidden_states": random.standard_normal((3, 77, 32)).astype(np.float32),
    }


def with_adapter(model, dtype, alpha, file):
    """diffusers' UNet with a random adapter of all layers, through PEFT; the adapter as a file."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=dtype).eval()
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=alpha, target_modules=LAYERS, init_lora_weights=False), "a")
    torch.manual_seed(1)
    for name, value in unet.named_parameters():
        if "lora_" in name:
            value.data = (0.15 * torch.randn(value.shape)).to(dtype)
    state = {}
    for key, value in get_peft_model_state_dict(unet, adapter_name="a").items():
        state[f"unet.{key}"] = value.float().contiguous()
        state[f"unet.{key.split('.lora_')[0]}.alpha"] = torch.tensor(float(alpha))
    save_file(state, file)
    return unet


def rows_of(slots, strength):
    return {"adapter": np.array(slots), "adapter_strength": np.full((3, 1, 1), strength, np.float32)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("alpha", [8, 4])
def test_one_adapter_gives_the_bits_of_peft(tiny_sd1, tiny_sd1_banks, step, tmp_path, precision, alpha):
    """All linear layers, vectors and convolutions, with and without strides; rows without the adapter beside those with it."""
    dtype = DTYPES[precision]
    unet = with_adapter(tiny_sd1, dtype, alpha, tmp_path / "a.safetensors")
    bundle = read(tiny_sd1_banks)
    opened = open_backend("torch-exact", bundle, precision=precision, threads=1)
    adapters = Adapters(bundle, opened)
    read_layers = adapters.load("a", tmp_path / "a.safetensors").layers
    assert {path for _, path in read_layers} == set(bundle.components[UNET].bank.targets)
    graph = opened.open(UNET, adapters.banks(UNET))
    assert not {"MatMul", "Gather"} & {node.op for node in graph.networks[True].program.nodes}
    plain = np.array(graph({**step, **rows_of([0, 0, 0], 0)})["prediction"])
    sample, timestep, context = (torch.from_numpy(value) for value in step.values())
    for strength in (1.0, 0.7):
        wanted = adapters.choose({"a": strength})
        slot = adapters.acquire(wanted, ())
        unet.set_adapters("a", strength)
        with torch.no_grad():
            expected = unet(sample.to(dtype), timestep, context.to(dtype)).sample.float().numpy()
        assert np.abs(expected - plain).max() > 1
        assert np.array_equal(graph({**step, **rows_of([slot] * 3, wanted.strength)})["prediction"], expected)
        mixed = graph({**step, **rows_of([slot, 0, slot], wanted.strength)})["prediction"]
        assert np.array_equal(mixed, np.stack([expected[0], plain[1], expected[2]]))


@pytest.mark.parametrize("knows", [True, False], ids=["by slot", "batched"])
def test_both_ways_of_a_layer(knows, monkeypatch):
    """Rows with slots and strengths of their own against the formula in fp64; fp32 sums of 45 products are within 1e-5."""
    monkeypatch.setattr(peft, "knows_slots", lambda device: knows)
    torch.manual_seed(6)
    slots, strength = torch.tensor([2, 0, 2]), torch.tensor([0.5, 2.0, -1.0]).reshape(3, 1, 1)
    a, b = torch.randn(3, 16, 8), torch.randn(3, 6, 16)
    a[:, 4:], b[..., 4:] = 0, 0  # padded for the kernels
    w, bias = torch.randn(6, 8), torch.randn(6)
    for x in (torch.randn(3, 5, 8), torch.randn(3, 8)):
        found = peft.linear(x, w, bias, a, b, slots, strength, rank=4)
        down, up = a[slots].double().mT, b[slots].double().mT
        term = strength * (x.double().reshape(3, -1, 8) @ down @ up)
        expected = x.double() @ w.double().T + bias.double() + term.reshape(found.shape)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    x, w, a = torch.randn(3, 5, 8, 6), torch.randn(6, 5, 3, 3), torch.randn(3, 16, 3, 3, 5)
    a[:, 4:] = 0
    found = peft.conv(x, w, bias, a, b, slots, strength, rank=4, stride=2, pad=1)
    for row, slot in enumerate(slots.tolist()):
        merged = w.double() + strength[row].double() * torch.einsum("nr,rhwc->nchw", b[slot].double(), a[slot].double())
        expected = F.conv2d(x[row : row + 1].double(), merged, bias.double(), 2, 1)[0]
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-5, atol=1e-5)
