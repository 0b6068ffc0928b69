"""A whole denoiser as CUDA runs it, passes, memory formats and all, on the Triton bodies in the interpreter."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stepforge.kernels import ops
from stepforge.runtime.backends.torch import backend
from stepforge.runtime.backends.torch.launches import count

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
