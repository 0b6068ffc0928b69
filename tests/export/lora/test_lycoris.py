"""Modules that LyCORIS trains, against their forward: its merge applies the scale of LoHa and LoKr twice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris import create_lycoris
from lycoris.modules.full import FullModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from safetensors.torch import save_file
from torch import nn

from stepforge.export.lora.merge import merge
from stepforge.runtime.bundle import TEXT_ENCODERS, UNET

LAYERS = {
    "linear": "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",  # 64 -> 512
    "square": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",  # 32 -> 32, no bias
    "tall": "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",  # 32 -> 64, no bias
    "1x1": "down_blocks.1.resnets.0.conv_shortcut",  # 32 -> 64
    "3x3": "up_blocks.1.resnets.0.conv1",  # 96 -> 32
    "wide": "down_blocks.1.resnets.0.conv1",  # 32 -> 64, 3x3
    "layer norm": "mid_block.attentions.0.transformer_blocks.0.norm2",
    "group norm": "down_blocks.1.resnets.0.norm1",
}
WEIGHTS = ("square", "1x1", "3x3", "linear")
LOKR = {  # -> which factors are whole
    "w1, w2": dict(full_matrix=True, factor=4),
    "w1, w2 by rank": dict(lora_dim=64, factor=4),
    "w1": dict(lora_dim=2, factor=4),
    "w2": dict(lora_dim=7, factor=4, decompose_both=True, unbalanced_factorization=True),
    "none": dict(lora_dim=1, factor=4, decompose_both=True),
    "none, scalar": dict(lora_dim=1, decompose_both=True, use_scalar=True),
    "w1, tucker": dict(lora_dim=2, factor=4, use_tucker=True),
}
DECOMPOSED = {"rows": dict(weight_decompose=True), "columns": dict(weight_decompose=True, wd_on_out=False)}


@pytest.fixture
def check(sd1, tmp_path: Path) -> Iterator[Callable[..., set[str]]]:
    """Train a module at random, save it, merge the file, and compare the layer's outputs; returns the keys saved."""

    def run(
        kind: type[nn.Module], layer: str, *, strengths: tuple[float, ...] = (1.0, -0.7), **options: Any
    ) -> set[str]:
        path = LAYERS[layer]
        base = sd1.pristine[UNET].get_submodule(path)
        x = inputs(base)
        before = copy.deepcopy(base).double()(x)
        file = tmp_path / "a.safetensors"
        for strength in strengths:
            torch.manual_seed(3)
            trained = train(kind, copy.deepcopy(base), {"lora_dim": 4, "alpha": 3.0, **options})
            state = {key: torch.as_tensor(value).contiguous() for key, value in trained.state_dict().items()}
            save_file({f"lora_unet_{path.replace('.', '_')}.{key}": value for key, value in state.items()}, file)
            layers = {place[1]: layer for place, layer in sd1.read(file).layers.items()}
            ours = merge(alone(path, copy.deepcopy(base)), [(layers, strength)]).get_submodule(path).double()
            got, wanted = ours(x), in_double(trained, strength)(x)
            error = float((got - wanted).norm() / wanted.norm())
            print(f"{kind.__name__} {layer} at {strength}: {error:.2g}")
            assert error <= 1e-6
            assert (got - before).norm() > 1e-3 * before.norm()
        return set(state)

    with torch.no_grad():
        yield run


def alone(path: str, layer: nn.Module) -> nn.Module:
    """A network of one layer, with that path."""
    for name in reversed(path.split(".")):
        network = nn.Module()
        network.add_module(name, layer)
        layer = network
    return layer


def inputs(layer: nn.Module) -> torch.Tensor:
    """More rows than the weight has columns, so that outputs tell as much as weights."""
    if isinstance(layer, nn.Linear):
        return torch.randn(320, layer.in_features, dtype=torch.float64)
    if isinstance(layer, nn.LayerNorm):
        return torch.randn(320, *layer.normalized_shape, dtype=torch.float64)
    channels = layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.in_channels
    return torch.randn(8, channels, 12, 12, dtype=torch.float64)


def train(kind: type[nn.Module], base: nn.Module, options: dict[str, Any]) -> nn.Module:
    module = kind("name", base, multiplier=1.0, **options).eval()
    if kind is FullModule:
        module.apply_to()  # it saves the difference to what the layer had then
    for name, parameter in module.named_parameters():
        if name == "scalar":
            parameter.fill_(0.6)
        elif "dora" in name or kind is FullModule:
            parameter *= 1 + 0.1 * torch.randn_like(parameter)
        else:
            parameter.normal_(std=0.3)
    return module


def in_double(module: nn.Module, strength: float) -> nn.Module:
    module.double()
    module.multiplier = strength
    if isinstance(module, FullModule):  # it took the layer's weight away
        module._org_weight = [module._org_weight[0].double()]
        module.org_bias = module.org_bias and [module.org_bias[0].double()]
    else:
        module.org_module[0].double()
    return module


@pytest.mark.parametrize("layer", WEIGHTS)
@pytest.mark.parametrize("options", [{}, {"rs_lora": True}, {"use_tucker": True}, {"use_scalar": True}], ids=str)
def test_locon(check, layer: str, options: dict[str, Any]) -> None:
    keys = check(LoConModule, layer, **options)
    assert ("lora_mid.weight" in keys) == (layer == "3x3" and "use_tucker" in options)


@pytest.mark.parametrize("layer", WEIGHTS)
@pytest.mark.parametrize("options", [{}, {"rs_lora": True}, {"use_tucker": True}], ids=str)
def test_loha(check, layer: str, options: dict[str, Any]) -> None:
    keys = check(LohaModule, layer, **options)
    assert ("hada_t1" in keys) == (layer == "3x3" and "use_tucker" in options)


@pytest.mark.parametrize("layer", ["tall", "1x1", "wide"])
@pytest.mark.parametrize("case", LOKR)
def test_lokr(check, layer: str, case: str) -> None:
    """With both factors whole, alpha is not used: LyCORIS writes one that is the rank.

    With rs_lora as well it trains such a layer at sqrt(rank) and loads its own file at 1; a file cannot tell, so 1 it is.
    """
    keys = check(LokrModule, layer, **LOKR[case])
    assert ("lokr_w1" in keys) == ("w1" in case)
    assert ("lokr_w2" in keys) == ("w2" in case)


@pytest.mark.parametrize("axis", DECOMPOSED)
@pytest.mark.parametrize("layer", WEIGHTS)
@pytest.mark.parametrize("kind", [LoConModule, LohaModule, LokrModule], ids=lambda kind: kind.name)
def test_dora(check, kind: type[nn.Module], layer: str, axis: str) -> None:
    """At strengths other than 1 the norms change by that much, and the direction by all of it."""
    assert "dora_scale" in check(kind, layer, **DECOMPOSED[axis], strengths=(1.0, 0.5, -0.7, 1.6))


@pytest.mark.parametrize("layer", WEIGHTS)
@pytest.mark.parametrize("train_on_input", [False, True])
def test_ia3(check, layer: str, train_on_input: bool) -> None:
    assert check(IA3Module, layer, train_on_input=train_on_input) == {"weight", "on_input"}


@pytest.mark.parametrize("layer", WEIGHTS)
def test_full(check, layer: str) -> None:
    assert ("diff_b" in check(FullModule, layer)) == (layer != "square")


@pytest.mark.parametrize("layer", ["layer norm", "group norm"])
def test_norms(check, layer: str) -> None:
    assert check(NormModule, layer) == {"w_norm", "b_norm"}


def test_wrapper(sd1, tmp_path: Path) -> None:
    """A whole network by LyCORIS's own wrapper, which has its own prefix: outputs of the text encoder."""
    encoder = sd1.copy(TEXT_ENCODERS[0]).eval()
    network = create_lycoris(encoder, multiplier=1.0, linear_dim=4, linear_alpha=2, algo="lokr", factor=4)
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    adapter = sd1.read(tmp_path / "a.safetensors")
    assert {name.partition("_")[0] for name in adapter.names.values()} == {"lycoris"}
    assert not adapter.refused
    layers = {path: layer for (_, path), layer in adapter.layers.items()}
    tokens = torch.randint(0, 500, (2, 77))
    with torch.no_grad():
        ours = merge(sd1.copy(TEXT_ENCODERS[0]), [(layers, 1.0)]).eval()(tokens)[0]
        theirs = encoder(tokens)[0]
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()  # three layers of float32 rounding
