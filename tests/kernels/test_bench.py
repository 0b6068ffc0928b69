"""benchmarks/bench_kernels.py without a GPU: every family in the interpreter, with times that the tests make up."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stepforge.kernels import gated, lowrank
from stepforge.kernels.dispatch import cost
from stepforge.kernels.dispatch.layers import SD15, SDXL

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import bench_kernels as bench
import check_gpu
import kernel_cases
import kernel_fit
from harness import Timing

pytestmark = pytest.mark.slow  # the quick lane has three minutes

GPU = cost.GPUS["A100"]
AMPERE = SimpleNamespace(name="pretended", major=8, minor=0)
LAYERS = replace(kernel_cases.TINY, layers=kernel_cases.TINY.layers[:1], ranks=(16,))


def even(path):
    return Timing(1e-5, 0.9e-5, 1.1e-5)


def slow(*names):
    """A timer by which these paths take 1.2 times as long as the others."""
    return lambda path: Timing(1.2e-5 if path.name in names else 1e-5, 0, 0)


def run(*families, shapes=LAYERS, timer=even):
    return bench.measure(kernel_cases.cases(GPU, "cpu", shapes, families), GPU, timer)


@pytest.mark.slow
def test_every_family_is_checked_and_timed(capsys):
    shapes = replace(kernel_cases.TINY, ranks=(16,))
    outcomes = run(*kernel_cases.FAMILIES, shapes=shapes)
    table, good = bench.summary(outcomes)
    assert good, table
    rows = {line[:10].strip(): line[10:].split()[:3] for line in table.splitlines()[1:-1]}
    counts = {"linear": 3, "grouped": 3, "conv": 1, "norm": 1, "GEGLU": 1, "gated": 1, "guide": 1}
    assert rows == {family: [str(count), str(count), "0"] for family, count in counts.items()}
    assert bench.FAMILY_NAMES == tuple(kernel_cases.FAMILIES) == tuple(counts)
    for outcome in outcomes:
        ours = {"linear": {"addmm", "split", "onepass"}, "conv": {"conv"}, "gated": {"gated"}}
        own = ours.get("linear" if outcome.case.family == "grouped" else outcome.case.family, {"fused"})
        assert set(outcome.errors) == own
        assert all(0 < error <= 1 for error in outcome.errors.values())
        peers = {"fused": {"eager"}, "gated": {"merged", "after"}}.get(min(own), {"merged", "PEFT"})
        assert set(outcome.times) == set(outcome.models) == own | peers
        assert outcome.ratios
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(outcomes)
    assert all(" pass " in line and "|" in line for line in printed)
    assert all(line.count("* ") == (line.split()[0] in ("linear", "grouped", "conv", "gated")) for line in printed)


def test_limits_of_the_one_pass():
    shapes = replace(kernel_cases.TINY, ranks=(16, 32))
    cases = {case.name: case.setup() for case in kernel_cases.cases(GPU, "cpu", shapes, ("linear",))}
    against = [name for name, setup in cases.items() for limit in setup.limits if limit.rivals == ("merged",)]
    assert against == ["qkv packed (128, 32, 96) r 16", "GEGLU-up (128, 32, 128) r 16"]


@pytest.mark.parametrize(
    ("family", "path", "text"),
    [
        ("linear", "onepass", "dispatch: onepass 1.200 × addmm, limit 1.02"),
        ("conv", "conv", "dispatch: conv 1.200 × PEFT, limit 1.02"),
        ("GEGLU", "fused", "eager: fused 1.200 × eager, limit 1.02"),
        ("guide", "fused", "eager: fused 1.200 × eager, limit 1.02"),
    ],
)
def test_a_slow_path_fails(family, path, text):
    layers = {"linear": LAYERS.layers, "guide": ()}.get(family, kernel_cases.TINY.layers[2:])
    outcomes = run(family, shapes=replace(LAYERS, layers=layers), timer=slow(path))
    assert text in outcomes[0].faults
    table, good = bench.summary(outcomes)
    assert not good
    assert table.endswith("FAILED")
    assert text in table


def test_a_wrong_result_fails(monkeypatch):
    split = lowrank.split
    monkeypatch.setattr(lowrank, "split", lambda *a, **k: split(*a, **k) + 1)
    (outcome,) = run("linear")
    assert [fault.split(" by ")[0] for fault in outcome.faults] == ["split is off"]
    assert not bench.summary([outcome])[1]


def test_a_result_that_does_not_repeat_fails(monkeypatch):
    geglu, calls = gated.geglu, itertools.count()
    monkeypatch.setattr(gated, "geglu", lambda h: geglu(h) * (1 + 2.0**-10 * (next(calls) % 2)))
    outcome = run("GEGLU", shapes=replace(kernel_cases.TINY, layers=kernel_cases.TINY.layers[2:3]))[0]
    assert outcome.faults == ["fused does not repeat to the bit"]


def test_an_exception_is_one_failed_line(monkeypatch, capsys):
    def broken(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\n  Tried to allocate everything")

    monkeypatch.setattr(lowrank, "onepass", broken)
    (outcome,) = run("linear")
    assert outcome.faults == ["onepass: OutOfMemoryError: CUDA out of memory. … Tried to allocate everything"]
    assert set(outcome.times) == {"merged", "PEFT", "addmm", "split"}
    good = next(kernel_cases.cases(GPU, "cpu", kernel_cases.TINY, ("GEGLU",)))
    capsys.readouterr()
    outcomes = bench.measure([kernel_cases.Case("GEGLU", "broken", broken), good], GPU, even)
    assert [bool(outcome.faults) for outcome in outcomes] == [True, False]
    assert [line for line in capsys.readouterr().out.splitlines() if "FAIL " in line and "broken" not in line] == [
        f"{'':10}FAIL OutOfMemoryError: CUDA out of memory. … Tried to allocate everything"
    ]


def test_nothing_runs_on_a_lost_device(monkeypatch):
    def broken():
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setattr(bench, "device_lost", lambda: True)
    outcomes = bench.measure([kernel_cases.Case("conv", name, broken) for name in "abc"], GPU, even)
    assert "illegal memory access" in outcomes[0].faults[0]
    assert all("lost in conv a" in outcome.faults[0] for outcome in outcomes[1:])


def test_exit_status_and_file(tmp_path, capsys, monkeypatch):
    file = tmp_path / "out" / "kernels.json"
    given = bench.arguments(["--tiny", "--families", "GEGLU", "guide", "--fit", "--sanitize", "--json", str(file)])
    monkeypatch.setattr(bench.shutil, "which", lambda name: None)
    assert bench.run(given, AMPERE, "cpu", even) == 0
    out = capsys.readouterr().out
    assert "compute-sanitizer is not on PATH" in out
    assert "no fit: 0 times" in out
    written = json.loads(file.read_text("utf-8"))
    assert written["about"]["gpu"] == "pretended"
    assert {"machine", "driver", "torch", "triton", "cuda"} <= set(written["about"])
    assert [case["family"] for case in written["cases"]] == ["GEGLU", "guide"]
    assert written["cases"][0]["seconds"]["fused"] == {"median": 1e-5, "low": 0.9e-5, "high": 1.1e-5}
    assert written["cases"][0]["predicted"]["fused"] > 0
    assert bench.run(bench.arguments(["--tiny", "--families", "GEGLU"]), AMPERE, "cpu", slow("fused")) == 1
    assert bench.run(bench.arguments(["--tiny", "--families", "GEGLU"]), AMPERE, "cpu", None) == 0


def test_the_sanitizer_decides(tmp_path, monkeypatch, capsys):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\nfor last; do :; done\n[ "$last" = --tiny ] && [ "$2" = memcheck ]\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert bench.sanitize() == [("memcheck", ""), ("racecheck", "exit status 1")]
    (outcome,) = run("guide")
    assert bench.summary([outcome], [("memcheck", "")])[1]
    assert not bench.summary([outcome], [("racecheck", "exit status 1")])[1]


class PretendedCuda:
    """An event takes as many ms as graphs were replayed before it."""

    replayed = 0

    class Stream:
        def wait_stream(self, other):
            pass

    current_stream = Stream

    class CUDAGraph:
        def replay(self):
            PretendedCuda.replayed += 1

    class Event:
        def __init__(self, enable_timing):
            self.at = 0.0

        def record(self):
            self.at = PretendedCuda.replayed

        def elapsed_time(self, end):
            return (end.at - self.at) * end.at

        def synchronize(self):
            pass

    def stream(self, stream):
        return contextlib.nullcontext()

    def graph(self, graph):
        return contextlib.nullcontext()


def test_the_timer(monkeypatch):
    """Seconds, the call warmed up before it is captured, one replay a measurement and one before the first."""
    empty = torch.empty
    monkeypatch.setattr(torch, "cuda", PretendedCuda())
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: empty(8, dtype=dtype))
    calls = []
    timing = bench.CudaTimer(runs=7)(kernel_cases.Path("any", lambda: calls.append(1), cost.base))
    assert len(calls) == 3 + 1
    assert (timing.low, timing.median, timing.high) == pytest.approx((3e-3, 5e-3, 7e-3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(monkeypatch, capsys):
    assert bench.main(["--network"]) == 2
    refused = capsys.readouterr().err
    assert "CUDA" in refused
    assert refused.count("\n") == 1
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CC", "")
    monkeypatch.setattr(check_gpu.shutil, "which", lambda name: None)
    lines = list(check_gpu.missing())
    assert "TRITON_INTERPRET" in lines[0]
    assert any("C compiler" in line for line in lines)
    assert all("\n" not in line for line in lines)


def synthetic(true, start):
    """Times of the models' linear layers on a GPU with these constants: 1 % of noise, every 25th three times as slow."""
    draw = random.Random(0)
    points = []
    for layer, rank in itertools.product((*SD15, *SDXL), (16, 64)):
        if layer.taps > 1 or layer.m < 128:
            continue
        choice = cost.choose(true, layer, rank)
        tile = cost.onepass_tile(true.arch, rank, choice.block_m)
        models = [
            lambda g, layer=layer: cost.base(g, layer),
            lambda g, layer=layer, rank=rank: cost.addmm(g, layer, rank),
            lambda g, layer=layer, rank=rank: cost.split(g, layer, rank),
            lambda g, layer=layer, rank=rank, nt=choice.nt, n=tile.block_n: cost.onepass(g, layer, rank, nt, n),
        ]
        for model in models:
            seconds = (model(true) + start) * draw.gauss(1, 0.01) * (3 if len(points) % 25 == 0 else 1)
            points.append((model, seconds))
    return points


def test_the_fit_finds_planted_constants(capsys):
    true = replace(GPU, tensor_share=0.6, bandwidth_share=0.9, launch=2e-6, ours=1.15)
    points = synthetic(true, 3e-6)
    found = kernel_fit.fit(GPU, points)
    assert found.tensor_share == pytest.approx(0.6, rel=0.03)
    assert found.bandwidth_share == pytest.approx(0.9, rel=0.05)
    assert found.ours == pytest.approx(1.15, rel=0.03)
    assert found.launch == pytest.approx(2e-6, abs=0.3e-6)
    assert found.start == pytest.approx(3e-6, abs=0.3e-6)
    assert found.deviation < 0.02
    changes, total = kernel_fit.changed_choices(GPU, found.gpu(GPU))
    assert 0 < changes.total() < total
    assert kernel_fit.changed_choices(GPU, GPU)[0].total() == 0
    written = kernel_fit.report(GPU, points)
    out = capsys.readouterr().out
    assert written["ours"] == found.ours
    assert f"{changes.total()} of {total}" in out
    assert f"{cost.BANDWIDTH_SHARE:.3f}" in out  # the share in use


def test_a_constant_without_evidence_stays():
    """Layers that memory limits say nothing of the tensor peak."""
    true = replace(GPU, bandwidth_share=0.6)
    layers = [layer for layer in (*SD15, *SDXL) if layer.n == layer.k == 320 or layer.m == 154]
    points = [
        (lambda g, layer=layer, model=model: model(g, layer), model(true, layer) + 2e-6)
        for layer in layers
        for model in (cost.base, lambda g, layer: cost.addmm(g, layer, 16))
    ]
    found = kernel_fit.fit(GPU, points)
    assert (found.tensor_share, found.ours) == pytest.approx((GPU.tensor_share, GPU.ours), rel=1e-3)
    assert found.bandwidth_share == pytest.approx(0.6, rel=0.01)


def test_the_fit_takes_the_linear_layers():
    outcomes = run("linear", "guide")
    assert len(kernel_fit.points_of(outcomes)) == len(kernel_fit.FITTED)
