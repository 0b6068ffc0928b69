"""Why integers are as they are here: `python benchmarks/int8_choices.py BUNDLE`, the demo model's, some 20 s on one core.

Error of the denoiser's output with every layer in integers, at the start, in the middle and at the end of a trajectory:
one range for all steps, ranges clipped to a share, ranges of each step alone, weights of 8 bits in place of 7, and what
OpenVINO makes of both: without VNNI the sums of 8-bit products saturate.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from bench_int8 import FLAGS, has
from harness import machine

from stepforge import Request
from stepforge.export.int8 import calibrate, rewrite
from stepforge.export.int8.rewrite import Range
from stepforge.export.parity.measures import relative_error
from stepforge.runtime.backends import Arrays, open_backend
from stepforge.runtime.bundle import UNET, Component, read

PROMPTS = ("cat face on a blue background", "pizza on a yellow background")


def in_openvino(graph: Path, entry: Component, ranges: Mapping[str, Range], calls: list[Arrays]) -> list[float]:
    from stepforge.runtime.backends.openvino import core

    model = graph.with_name("int8_choices.onnx")
    found = []
    try:
        outputs = []
        for path in (graph, model):
            if path == model:
                rewrite.write_quantized(graph, model, ranges, ranges)
            network = core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            outputs.append([network({**call, **calibrate.zero_banks(entry)})["prediction"] for call in calls])
        found = [relative_error(ours, plain) for plain, ours in zip(*outputs, strict=True)]
    finally:
        model.unlink(missing_ok=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    bundle = read(args.bundle)
    entry = bundle.components[UNET]
    requests = [Request(prompt=p, seed=i, steps=args.steps, guidance=3.0) for i, p in enumerate(PROMPTS)]
    calls = calibrate.record(bundle, open_backend("onnxruntime", bundle, precision="fp32"), requests, ("denoiser",))[
        UNET
    ]
    places = (0, len(calls) // 2, len(calls) - 1)
    judged = [calls[i] for i in places]
    report: dict[str, object] = {}
    with TemporaryDirectory() as folder:  # a copy: scratch graphs appear beside the graph
        graph = Path(folder) / "model.onnx"
        for name in (entry.graph, f"{entry.graph}.data"):
            (Path(folder) / Path(name).name).write_bytes(bundle.file(name).read_bytes())
        measured = calibrate.measure(graph, entry, calls)
        static = measured.static()

        def errors(ranges: Mapping[str, Range], given: list[Arrays]) -> list[float]:
            simulation = calibrate.Simulation(graph, entry, ranges, given)
            return [float(f"{e:.3g}") for e in simulation.errors(np.ones(len(simulation.paths), np.bool_))]

        report["one range for all steps"] = errors(static, judged)
        for share in (0.85, 0.7):
            clipped = {path: Range(range_.low * share, range_.high * share) for path, range_ in static.items()}
            report[f"ranges clipped to {share}"] = errors(clipped, judged)
        own = []
        for place, call in zip(places, judged, strict=True):
            ranges = {path: found[place : place + 1] for path, found in measured.ranges.items()}
            own += errors(calibrate.Measured(ranges, measured.work).static(), [call])
        report["each step's own ranges"] = own
        report["7-bit weights in openvino"] = [float(f"{e:.3g}") for e in in_openvino(graph, entry, static, judged)]
        rewrite.WEIGHT_STEPS = 127
        report["8-bit weights"] = errors(static, judged)
        report["8-bit weights in openvino"] = [float(f"{e:.3g}") for e in in_openvino(graph, entry, static, judged)]
    report["timesteps"] = [float(call["timestep"][0]) for call in judged]
    report |= {"processor has": [flag for flag in FLAGS if has(flag)], "machine": machine()}
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
