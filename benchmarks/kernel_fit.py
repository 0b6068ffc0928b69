"""The constants of stepforge/kernels/dispatch/cost.py that fit measured times best.

python benchmarks/kernel_fit.py benchmarks/results/h100_kernels.json       from the file that bench_kernels.py wrote
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from stepforge.kernels.dispatch.choose import RANKS
from stepforge.kernels.dispatch.cost import (
    DEPTH,
    GPUS,
    Gpu,
    addmm,
    base,
    choose,
    onepass,
    peft,
    split,
    tiles_per_program,
)
from stepforge.kernels.dispatch.layers import GATED, SD15, SDXL, Layer
from stepforge.kernels.dispatch.tiles import onepass_tile, padded_rank

FITTED = ("merged", "PEFT", "addmm", "split", "onepass")
FEWEST = 12  # times; below, six constants fit anything
Point = tuple[Callable[[Gpu], float], float]  # the model of a path, and its measured seconds


@dataclass(frozen=True, slots=True)
class Fit:
    """start: seconds that every measurement has besides its work, from the first event to the second; no choice depends on
    it. deviation: the median of |ln(model / measured)|."""

    tensor_share: float
    bandwidth_share: float
    launch: float
    ours: float
    step: float
    start: float
    deviation: float
    points: int

    def gpu(self, gpu: Gpu) -> Gpu:
        return replace(
            gpu,
            tensor_share=self.tensor_share,
            bandwidth_share=self.bandwidth_share,
            launch=self.launch,
            ours=self.ours,
            step=self.step,
        )


def fit(gpu: Gpu, points: Sequence[Point]) -> Fit:
    """Least squares on ln(model / measured), soft L1 so that a few times that no roofline explains weigh little.

    A roofline is not smooth: the best of eight starts is taken. A constant that no time depends on keeps its value.
    ValueError with fewer than `FEWEST` times.
    """
    from scipy.optimize import least_squares

    if len(points) < FEWEST:
        raise ValueError(f"{len(points)} times are too few to fit; it takes {FEWEST}")
    measured = np.log([seconds for _, seconds in points])

    def constants(values: Any) -> Fit:
        tensor, bandwidth, ours = np.exp(values[:3])
        return Fit(tensor, bandwidth, 1e-6 * values[3], ours, 1e-6 * values[4], 1e-6 * values[5], 0.0, len(points))

    def residuals(values: Any) -> Any:
        found = constants(values)
        at = found.gpu(gpu)
        off = np.log([model(at) + found.start for model, _ in points]) - measured
        return np.concatenate([off, 1e-4 * (values - in_use)])

    low = [*np.log([0.05, 0.05, 0.3]), 0.0, 0.0, 0.0]
    high = [*np.log([1.5, 1.5, 4.0]), 20.0, 5.0, 50.0]
    in_use = np.array(
        [*np.log([gpu.tensor_share, gpu.bandwidth_share, gpu.ours]), 1e6 * gpu.launch, 1e6 * gpu.step, 2.0]
    )
    best = None
    for tensor, bandwidth, step in product((0.4, gpu.tensor_share), (0.5, gpu.bandwidth_share), (1e6 * gpu.step, 0.5)):
        at = np.array([*np.log([tensor, bandwidth]), *in_use[2:4], step, in_use[5]])
        found = least_squares(residuals, at, bounds=(low, high), loss="soft_l1", f_scale=0.05)
        best = found if best is None or found.cost < best.cost else best
    assert best is not None
    return replace(constants(best.x), deviation=float(np.median(np.abs(residuals(best.x)[: len(points)]))))


def changed_choices(gpu: Gpu, fitted: Gpu) -> tuple[Counter[str], int]:
    """Choices for the layers of SD1.5 and SDXL whose path or tiles would change, by "path -> path", and how many there are."""
    changes: Counter[str] = Counter()
    everything = list(product((*SD15, *SDXL, *GATED), RANKS, (False, True)))
    for layer, rank, grouped in everything:
        before, after = (choose(g, layer, rank, grouped=grouped) for g in (gpu, fitted))
        if (before.path, before.block_m, before.nt, before.parts) != (after.path, after.block_m, after.nt, after.parts):
            changes[f"{before.path} -> {after.path}"] += 1
    return changes, len(everything)


def report(gpu: Gpu, points: Sequence[Point]) -> dict[str, Any]:
    """Print the fit beside the constants in use; returns it for the JSON file."""
    try:
        found = fit(gpu, points)
    except ValueError as error:
        print(f"\nno fit: {error}")
        return {}
    at = found.gpu(gpu)
    print(
        f"\nconstants that fit {found.points} times of {', '.join(FITTED)} best, "
        f"median deviation {100 * found.deviation:.1f} %{'':12}fitted   in use"
    )
    for text, new, old in (
        (f"share of {gpu.name}'s tensor peak, {at.rate / 1e12:.1f} TFLOP/s", found.tensor_share, gpu.tensor_share),
        (f"share of its bandwidth, {at.bandwidth / 1e9:.0f} GB/s", found.bandwidth_share, gpu.bandwidth_share),
        ("a launch in a graph, µs", 1e6 * found.launch, 1e6 * gpu.launch),
        ("Triton's product over cuBLAS'", found.ours, gpu.ours),
        (f"a program's {DEPTH} of K, µs", 1e6 * found.step, 1e6 * gpu.step),
    ):
        print(f"  {text:60} {new:8.3f} {old:8.3f}")
    print(f"  {'start of a measurement, µs (no choice depends on it)':60} {1e6 * found.start:8.3f}")
    changes, total = changed_choices(gpu, at)
    detail = ", ".join(f"{name} {count}" for name, count in changes.most_common())
    print(f"dispatch choices that would change: {changes.total()} of {total}{f' ({detail})' if detail else ''}")
    return {**asdict(found), "changed": dict(changes), "choices": total}


def points_of(outcomes: Sequence[Any]) -> list[Point]:
    """The measured linear layers of a run (`bench_kernels.Outcome`)."""
    return [
        (outcome.models[path], timing.median)
        for outcome in outcomes
        if outcome.case.family == "linear"
        for path, timing in outcome.times.items()
        if path in FITTED
    ]


def model_of(path: str, layer: Layer, rank: int) -> Callable[[Gpu], float]:
    """The cost of one path, tiles as the kernels' launchers take them."""

    def at(gpu: Gpu) -> float:
        choice = choose(gpu, layer, rank)
        tile = onepass_tile(gpu.arch, padded_rank(rank), choice.block_m)
        nt = tiles_per_program(gpu, layer, tile.block_m, tile.block_n)
        return onepass(gpu, layer, rank, nt, tile.block_n)

    others = {"addmm": addmm, "PEFT": peft, "split": split}
    if path == "merged":
        return lambda gpu: base(gpu, layer)
    return at if path == "onepass" else lambda gpu: others[path](gpu, layer, rank)


def points_of_file(measured: dict[str, Any]) -> list[Point]:
    """The linear layers of a file that bench_kernels.py wrote; by name, and those of today's models only."""
    layers = {f"{layer.name} ({layer.m}, {layer.k}, {layer.n})": layer for layer in (*SD15, *SDXL)}
    points = []
    for case in measured["cases"]:
        name, _, rank = case["case"].rpartition(" r ")
        if case["family"] == "linear" and name in layers:
            points += [
                (model_of(path, layers[name], int(rank)), timing["median"])
                for path, timing in case["seconds"].items()
                if path in FITTED
            ]
    return points


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    measured = json.loads(parser.parse_args().file.read_text("utf-8"))
    gpu = next(gpu for gpu in GPUS.values() if gpu.name == measured["about"]["modelled as"])
    return 0 if report(gpu, points_of_file(measured)) else 1


if __name__ == "__main__":
    sys.exit(main())
