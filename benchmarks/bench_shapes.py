"""What fixed shapes and huge pages would gain on OpenVINO: `python benchmarks/bench_shapes.py BUNDLE --size 256`.

One denoiser pass of 2 rows in fp32, by the library alone: the bundle's graph as it is, whose rows and sizes are open, and the
same graph compiled for this one shape, in turn; then both once more in a process whose memory glibc asks huge pages for. With
the seconds, whether the two graphs give the same bits: where they do not, an engine that changed from one to the other
would draw the same request in two ways; and how much memory did come to lie in huge pages.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from harness import interleaved, machine

from stepforge.export.parity.measures import relative_error
from stepforge.runtime.backends.openvino import core
from stepforge.runtime.bundle import UNET, read

PAGES = {"usual pages": {}, "huge pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}}  # environment of each process


def measure(args: argparse.Namespace) -> dict[str, Any]:
    bundle = read(args.bundle, check=False)
    entry = bundle.components[UNET]
    axes = {"rows": 2, "tokens": args.tokens}
    axes |= dict.fromkeys(("height", "width"), args.size // bundle.card.vae_scale)
    random = np.random.default_rng(0)
    inputs = {}
    for tensor in entry.inputs:
        shape = [axes[size] if isinstance(size, str) else size for size in tensor.shape]
        inputs[tensor.name] = random.standard_normal(shape).astype(tensor.dtype)
    inputs["timestep"] = np.full(2, 500, np.float32)
    requests = {}
    for kind in ("open", "fixed"):
        network = core().read_model(bundle.file(entry.graph))
        if kind == "fixed":
            network.reshape({name: list(value.shape) for name, value in inputs.items()})
        config = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        requests[kind] = core().compile_model(network, "CPU", config).create_infer_request()

    def run(kind: str) -> np.ndarray:
        requests[kind].infer(inputs, share_inputs=True)
        return np.array(requests[kind].get_tensor("prediction").data)

    plain, fixed = run("open"), run("fixed")
    times = interleaved({kind: lambda kind=kind: run(kind) for kind in requests}, runs=args.runs)  # type: ignore[misc]
    return {
        **{kind: [round(t.median, 4), round(t.low, 4), round(t.high, 4)] for kind, t in times.items()},
        "open over fixed": round(times["open"].median / times["fixed"].median, 3),
        "same bits": bool(np.array_equal(plain, fixed)),
        "relative difference": float(f"{relative_error(fixed, plain):.2g}"),
        "bytes in huge pages": huge_bytes(),
    }


def huge_bytes() -> int:
    """Memory of this process that lies in huge pages: what was asked for the kernel need not have given."""
    rows = Path("/proc/self/smaps_rollup").read_text("ascii").splitlines()
    return int(next(row.split()[1] for row in rows if row.startswith("AnonHugePages:"))) << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="without LoRA banks and ControlNets")
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--tokens", type=int, default=77)
    parser.add_argument("--runs", type=int, default=9, help="counted passes")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind, in turn")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args)))
        return
    command = [sys.executable, *sys.argv, "--one"]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in PAGES}
    for _ in range(args.rounds):
        for name, more in PAGES.items():
            output = subprocess.check_output(command, env={**os.environ, **more}, text=True)
            found[name].append(json.loads(output))
    report = {"bundle": read(args.bundle, check=False).card.name, "size": args.size, **found, "machine": machine()}
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
