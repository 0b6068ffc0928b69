"""benchmarks/network_model.py: FLOPs against PyTorch's own counter, launches against the program, times on the CPU."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from stepforge.runtime.backends.torch.launches import count

# What a recorded step may launch: no addition, concatenation, upsampling or norm of PyTorch's. The concatenations and the cast
# are those of the timestep's sines, the bias is the last convolution's.
ALLOWED = {
    "product", "convolution", "attention", "group norm", "layer norm", "GEGLU", "sum of images", "timestep", "time embedding",
    "multiplication", "concatenation", "cast", "bias",
}  # fmt: skip
WITH_ADAPTERS = {"strengths", "copy"}  # copies of rows that no kernel of ours wrote, each with a shrink
ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import network_model

    yield network_model
    for name in ("network_model", "bench_network", "gpu_report"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_flops_are_those_of_the_unet(model):
    """SD1.5's shape, of which no weight exists: every product, convolution and attention, to 0.1 % (PyTorch's counter has no
    other operators)."""
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    inputs = [torch.zeros(shape, device="meta") for shape in ((2, 4, 64, 64), (2,), (2, 77, 768))]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(*inputs)
    with model.with_holes(model.SHAPES / "sd15.onnx.xz") as graph, torch.inference_mode():
        network = model.cuda_network(graph)
        found = model.works(network, model.given(network.program, 2))
    once = network._once.program  # the prompt's keys and values, made when the batch changes
    weights = [once.constants[node.inputs[1]] for node in once.nodes if node.op == "Linear"]
    kept = sum(2.0 * 2 * 77 * weight.numel() for weight in weights)
    assert kept + sum(work.flops for work in found) == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_ratios(model):
    import bench_network

    steps = {("sd15", 1): 3.0, ("sd15", 2): 5.0, ("sd15_all", 2): 6.0, ("sd15_all", 4): 9.0, ("sd15_decoder", 1): 4.0}
    found = bench_network.ratios(steps)
    assert found == {"sd15_all, 2 rows, over the step without": 1.2, "20 steps of 2 rows and the decoder, ms": 104.0}


def test_a_network_with_adapters_runs_on_numbers_drawn(model, tiny_sd1_banks):
    """Columns, banks and strengths: what a GPU times is what the program says."""
    with model.with_holes(tiny_sd1_banks / "denoiser/unet/model.onnx") as path, torch.inference_mode():
        network = model.cuda_network(path, "bf16")
        given = model.given(network.program, 2, 16)
        kinds = {work.kind for work in model.works(network, given)}
        measured = model.measure(model.drawn(network, "cpu"), model.numbers(given, "cpu"), times=1)
    assert kinds <= measured.keys()
    assert {"copy", "strengths"} <= kinds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "side", "attentions", "most"),
    [("sd15", 64, 32, 410), ("sdxl", 128, 140, 1040), ("sd15_transformer", 64, 32, 595), ("sd15_all", 64, 32, 675)],
)
def test_launches_are_few_and_each_of_a_kind_on_the_list(model, shape, side, attentions, most):
    """Two rows at the size that the shape was trained for; with two adapters in the transformers' layers, and in all."""
    with model.with_holes(model.SHAPES / f"{shape}.onnx.xz") as graph, torch.inference_mode():
        network = model.cuda_network(graph)
        found = model.works(network, model.given(network.program, 2, side))
    if shape == "sd15_transformer":  # docs/torch.md
        said = count(network.program)
        assert (said["copy"], said["shrink"]) == (48, 128)
    launches = Counter()
    for work in found:
        launches[work.kind] += work.launches
    assert launches["attention"] == attentions
    assert set(launches) <= ALLOWED | (WITH_ADAPTERS if "_" in shape else set())
    assert sum(launches.values()) <= most


def test_times_by_kind_and_the_file(model, tiny_sd1_bundle, tmp_path, monkeypatch, capsys):
    """On the CPU with weights drawn there; on a GPU the same lines."""
    import bench_network

    graph = tiny_sd1_bundle / "denoiser/unet/model.onnx"
    with model.with_holes(graph) as path, torch.inference_mode():
        assert path == graph
        network = model.cuda_network(path, "fp32")
        given = model.given(network.program, 2, 16)
        found = model.works(network, given)
        measured = model.measure(model.drawn(network, "cpu"), model.numbers(given, "cpu"), times=1)
    assert set(measured) == {*model.by_kind(found), model.VIEWS}
    assert all(value > 0 for value in measured.values())
    lines = model.table(found, {}, measured)
    assert float(lines[-1].split()[-1]) == pytest.approx(sum(measured.values()), abs=0.01)
    out = tmp_path / "network.json"
    assert bench_network.model([graph], [1, 2], out) == 0
    tables = json.loads(out.read_text("utf-8"))["tables"]
    one, two = (tables[f"model.onnx {rows}"]["kinds"]["convolution"] for rows in (1, 2))
    assert two["flops"] == 2 * one["flops"]
    assert two["launches"] == one["launches"]
    assert "convolution" in capsys.readouterr().out
