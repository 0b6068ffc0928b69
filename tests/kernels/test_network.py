"""A whole denoiser as CUDA runs it, passes, memory formats and all, on the Triton bodies in the interpreter."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stepforge.kernels import ops
from stepforge.runtime.backends import Banks, Kept, NetworkCall, StepTable, open_backend
from stepforge.runtime.backends.torch import backend
from stepforge.runtime.backends.torch.launches import count
from stepforge.runtime.bundle import UNET, ComponentId, read
from stepforge.runtime.plan.guiders import Guider

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import network_model

# ‖interpreted − references‖ / ‖references‖ in fp16: both round in the same places, sums have another order
LIMIT = 2e-3
# what a step may launch, and the kinds that it launches for: views aside
KINDS = {
    "convolution": ("convolution",), "group_norm": ("group norm",), "layer_norm": ("layer norm",), "geglu": ("GEGLU",),
    "widen": ("copy", "layer norm", "GEGLU"), "widen_norm": ("group norm",), "image_sum": ("sum of images",),
    "_scaled_dot_product_flash_attention_for_cpu": ("attention",), "baddbmm_": ("adapter of a convolution",),
    "addmm": ("product",), "addmm_": ("product",), "mm": ("product",), "mul": ("strengths", "multiplication"),
    "silu": ("time embedding",), "add": ("addition",), "add_": ("bias",), "cat": ("concatenation",),
    "_to_copy": ("cast", "timestep"), "sin": ("timestep",), "cos": ("timestep",),
}  # fmt: skip
VIEWS = {
    "view", "_unsafe_view", "permute", "transpose", "t", "slice", "select", "unsqueeze", "expand", "split", "as_strided",
    "unbind", "detach", "alias", "new_empty",
}  # fmt: skip
GRAPHS = pytest.mark.parametrize(
    ("fixture", "residuals"),
    [
        ("tiny_sd1_banks", False),
        ("tiny_sd1_control_bundle", False),
        ("tiny_sd1_control_bundle", True),
        ("tiny_sdxl_bundle", False),
    ],
)


def drawn(graph, residuals):
    """The network as CUDA runs it, on the CPU, and inputs; weights are random. residuals: of a ControlNet."""
    network = network_model.cuda_network(graph, "fp16", residuals=residuals)
    shapes = network_model.given(network.program, 2, 8)
    if residuals:
        sides = {"residual_0": 8, "residual_1": 8, "residual_2": 4, "residual_3": 4, "residual_4": 4}
        assert {name for name in shapes if name.startswith("residual_")} == set(sides)
        shapes |= {
            name: torch.empty(2, shapes[name].shape[1], side, side, device="meta") for name, side in sides.items()
        }
    given = network_model.numbers(shapes, "cpu")
    network_model.drawn(network, "cpu")
    backend.channels_last(network.program)
    return network, given


class Launched(TorchDispatchMode):
    """Counts operators that are no views."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        self.found[name] += name not in VIEWS
        return function(*args, **(kwargs or {}))


@GRAPHS
def test_a_step_launches_what_its_program_says(fixture, residuals, request):
    """No copy of a tensor whose layout does not suit the next, no sum of its own."""
    with (
        network_model.with_holes(request.getfixturevalue(fixture) / "denoiser/unet/model.onnx") as graph,
        torch.no_grad(),
    ):
        network, given = drawn(graph, residuals)
        given |= network.once(dict(given))
        with Launched() as launched:
            network(dict(given))
    found = +launched.found
    assert found.keys() <= KINDS.keys()
    said = count(network.program)
    products = sum(found[name] for name in ("addmm", "addmm_", "mm"))
    assert products == said["product"]
    assert (said["addition"] > 0) == residuals
    for name in (
        "convolution",
        "group_norm",
        "_scaled_dot_product_flash_attention_for_cpu",
        "image_sum",
        "add_",
        "cat",
    ):
        assert found[name] <= sum(said[kind] for kind in KINDS[name]), name


@pytest.mark.slow
@GRAPHS
def test_a_denoiser_on_the_kernels_is_that_on_the_references(fixture, residuals, request, monkeypatch):
    """Of SD 1.5's kind with adapters in all layers, with residuals of ControlNets and what reuse keeps, and of SDXL's kind."""
    with (
        network_model.with_holes(request.getfixturevalue(fixture) / "denoiser/unet/model.onnx") as graph,
        torch.inference_mode(),
    ):
        network, given = drawn(graph, residuals)
        expected = network(dict(given))
        monkeypatch.setattr(ops, "on_cpu", lambda tensor: False)
        found = network(dict(given))
    for name, value in expected.items():
        assert (found[name] - value).float().norm() <= LIMIT * value.float().norm(), name


def three_steps(bundle):
    """States of two images, one with a guider and an adapter: a step that is kept, one that reuses, one that does neither."""
    random, backend = np.random.RandomState(0), open_backend("torch", bundle, precision="fp32")
    graphs = {}
    for component in (UNET, ComponentId("denoiser", "unet", "deepcache")):
        banks = Banks({}, np.zeros(3, np.int64))
        shapes = {tensor.name: tensor.shape for tensor in bundle.components[component].inputs}
        for name in (name for name in shapes if ".lora_" in name):
            banks[name] = (0.1 * np.random.RandomState(len(name)).standard_normal(shapes[name])).astype(np.float32)
            banks[name][0] = 0
        graphs[component] = backend.open(component, banks)
    whole, variant = graphs
    loop = graphs[whole].loop((4, 8, 8))
    for place, guider in enumerate(("apg(momentum=-0.5, norm=3)+rescale(0.5)+dynamic(p=0.8, max=2)", "cfg")):
        steps = StepTable(
            np.linspace(900, 1, 3, dtype=np.float32), np.ones(4, np.float32), np.tile(np.float32([3, -2]), (3, 1)),
            np.full((3, 9), 0.1, np.float32), np.ones(3, np.float32), Guider.parse(guider), np.full((3, 2), 0.5),
        )  # fmt: skip
        loop.put(place, random.standard_normal((8, 256)).astype(np.float32), steps)
    inputs = {"encoder_hidden_states": random.standard_normal((4, 77, 32)).astype(np.float32)}
    inputs |= {"adapter": np.array([2, 2, 0, 0])}
    told, roles = (np.int32([0, 1]), np.int32([[0, 1], [2, 3]]), np.int32([0, 0, 1, 1])), np.int32([0, 1, 0, 1])
    every = np.ones(4, np.bool_)
    for call in (
        NetworkCall(whole, graphs[whole], roles, [Kept(("deep",), every)]),
        NetworkCall(variant, graphs[variant], roles, [], [Kept(("deep",), ~every)]),
        NetworkCall(whole, graphs[whole], roles),
    ):
        loop.step(*told, inputs, {}, (), call)
    return [loop.get(place) for place in range(2)]


@pytest.mark.slow
@pytest.mark.long  # a minute: half a thousand kernels a step, each interpreted
def test_a_loop_on_the_kernels_is_that_on_the_references(tiny_sd1_control_bundle, monkeypatch):
    """Guidance and update too, in fp32, where the order of sums alone differs."""
    bundle = read(tiny_sd1_control_bundle)
    expected = three_steps(bundle)
    monkeypatch.setattr(ops, "on_cpu", lambda tensor: False)
    for found, wanted in zip(three_steps(bundle), expected, strict=True):
        assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)
