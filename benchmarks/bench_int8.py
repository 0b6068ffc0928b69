"""One denoiser pass in fp32, bf16 and INT8 by each engine: `python benchmarks/bench_int8.py BUNDLE [--rows 2] [--size 256]`.

BUNDLE was quantised (`stepforge quantize`). Runners load in turn, each in a process of its own, in rounds, so that a
drift of the machine's speed hits all alike. Errors first: no speed is printed of a runner whose output is further from
OpenVINO's fp32 than its precision allows. Inputs are the engine's own at the start, in the middle and at the end of
a trajectory. What the processor has decides: integers win
by VNNI or AMX; without them x86 needs three instructions for what VNNI does in one, against one of two for floats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from harness import machine, timed

from stepforge import Request
from stepforge.export.int8.calibrate import record
from stepforge.export.parity.measures import relative_error
from stepforge.export.parity.verify import LIMITS
from stepforge.runtime.backends import open_backend
from stepforge.runtime.bundle import UNET, read
from stepforge.runtime.engine.adapters import Adapters
from stepforge.runtime.errors import BackendError

RUNNERS = ("openvino fp32", "openvino bf16", "openvino int8", "onnxruntime fp32", "onnxruntime int8")
FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def has(flag: str) -> bool:
    """Whether the processor says that it has instructions of this name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return flag in next(line for line in lines if line.startswith("flags")).split()


def record_inputs(args: argparse.Namespace, scratch: Path) -> None:
    """What the engine feeds the denoiser at the start, in the middle and at the end of a trajectory, as files."""
    bundle = read(args.bundle)
    options = {"images": args.rows // 2, "steps": args.steps, "width": args.size, "height": args.size}
    requests = [Request(prompt=args.prompt, guidance=3.0, **options)]
    calls = record(bundle, open_backend("openvino", bundle, precision="fp32"), requests, ("denoiser",))[UNET]
    for index in (0, len(calls) // 2, len(calls) - 1):
        np.savez(scratch / f"call{index:03}.npz", **calls[index])


def run_one(runner: str, args: argparse.Namespace) -> dict[str, Any]:
    bundle = read(args.bundle, check=False)
    name, precision = runner.split()
    try:
        backend = open_backend(name, bundle, precision=precision, threads=args.threads)
    except BackendError as error:
        return {"refused": str(error)}
    graph = backend.open(UNET, Adapters(bundle, backend).banks(UNET))
    calls = [dict(np.load(file)) for file in sorted(args.scratch.glob("call*.npz"))]
    outputs = [np.array(graph(call)["prediction"]) for call in calls]
    np.save(args.scratch / f"{runner.replace(' ', '-')}.npy", np.stack(outputs))
    timing = timed(lambda: graph(calls[1]), runs=args.runs)
    return {"pass": [timing.median, timing.low, timing.high]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rows", type=int, default=2, help="of a call, two for each image")
    parser.add_argument("--steps", type=int, default=4, help="of the trajectory")
    parser.add_argument("--prompt", default="cat face on a blue background")
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--threads", type=int, help="default: all cores that this process may use")
    parser.add_argument("--runs", type=int, default=5, help="counted passes a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--runners", nargs="*", default=list(RUNNERS))
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_one(args.one, args)))
        return
    rounds: dict[str, list[dict[str, Any]]] = {runner: [] for runner in args.runners}
    with tempfile.TemporaryDirectory() as scratch:
        record_inputs(args, Path(scratch))
        for _ in range(args.rounds):
            for runner, reports in rounds.items():
                command = [sys.executable, __file__, str(args.bundle), "--one", runner, "--scratch", scratch]
                for option in ("rows", "size", "runs", *(["threads"] if args.threads else [])):
                    command += [f"--{option}", str(getattr(args, option))]
                reports.append(json.loads(subprocess.check_output(command, text=True).splitlines()[-1]))
        outputs = {file.stem.replace("-", " "): np.load(file) for file in Path(scratch).glob("*.npy")}
    report = summary(args, rounds, outputs)
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def summary(
    args: argparse.Namespace, rounds: dict[str, list[dict[str, Any]]], outputs: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Errors, and seconds where they are within limits. Ratios are within an engine: against its fp32 and its bf16."""
    runners: dict[str, Any] = {}
    for runner, reports in rounds.items():
        if "refused" in reports[0]:
            runners[runner] = reports[0]
            continue
        engine, precision = runner.split()
        pairs = zip(outputs[runner], outputs["openvino fp32"], strict=True)
        errors = [relative_error(ours, float32) for ours, float32 in pairs]
        runners[runner] = {"errors": [float(f"{error:.3g}") for error in errors]}
        if max(errors) > LIMITS[precision].component:
            runners[runner]["refused"] = f"error above {LIMITS[precision].component:g}"
            continue
        times = [report["pass"] for report in reports]
        runners[runner] |= {
            "seconds": round(statistics.median(t[0] for t in times), 4),
            "lowest": round(min(t[1] for t in times), 4),
            "highest": round(max(t[2] for t in times), 4),
        }
        for base in ("fp32", "bf16"):
            if precision == "int8" and "lowest" in runners.get(f"{engine} {base}", {}):
                ratio = runners[f"{engine} {base}"]["lowest"] / runners[runner]["lowest"]
                runners[runner][f"times {base}, lowest to lowest"] = round(ratio, 2)
    bundle = read(args.bundle, check=False)
    return {
        "bundle": {"name": bundle.card.name, "digest": bundle.digest[:16], "int8": bundle.source["int8"]},
        "rows": args.rows,
        "size": args.size,
        "runners": runners,
        "processor has": [flag for flag in FLAGS if has(flag)],
        "processor lacks": [flag for flag in FLAGS if not has(flag)],
        "machine": machine(),
    }


if __name__ == "__main__":
    main()
