"""A whole denoiser as CUDA runs it, passes, memory formats and all, on the Triton bodies in the interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from stepforge.kernels import ops
from stepforge.runtime.backends.torch import backend

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import network_model

# ‖interpreted − references‖ / ‖references‖ in fp16: both round in the same places, sums have another order
LIMIT = 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("fixture", ["tiny_sd1_banks", "tiny_sd1_control_bundle", "tiny_sdxl_bundle"])
def test_a_denoiser_on_the_kernels_is_that_on_the_references(fixture, request, monkeypatch):
    """Of SD 1.5's kind with adapters in all layers, with residuals of ControlNets and what reuse keeps, and of SDXL's kind."""
    graph = request.getfixturevalue(fixture) / "denoiser/unet/model.onnx"
    with network_model.with_holes(graph) as path, torch.inference_mode():
        network = network_model.cuda_network(path, "fp16")
        given = network_model.numbers(network_model.given(network.program, 2, 8), "cpu")
        network_model.drawn(network, "cpu")
        backend.channels_last(network.program)
        expected = network(dict(given))
        monkeypatch.setattr(ops, "on_cpu", lambda tensor: False)
        found = network(dict(given))
    for name, value in expected.items():
        assert (found[name] - value).float().norm() <= LIMIT * value.float().norm(), name
