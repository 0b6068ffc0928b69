"""All that a GPU must still say, in one command of at most six minutes on an idle H100: `make test-gpu`.

    machine    what the kernels need (check_gpu.py)
    compile    every program of the benchmark, in parallel processes, into Triton's cache
    kernels    every family: error bounds, repeats, times beside peers and prediction, constants that fit (bench_kernels.py)
    network    SD1.5's and SDXL's shape, and SD1.5's with adapters and its decoder: recorded steps, and milliseconds by kind
               beside the prediction, on weights drawn there (bench_network.py)
    peers      diffusers' UNet of SD1.5's shape, eager and compiled (bench_step.py)
    parity     the GPU tests of the kernels and of the torch backend: against the CPU in fp32, replays, swaps, mixed batches,
               nothing that waits
    engines    those of TensorRT and of ONNX Runtime's GPU providers, where installed: plans built, deserialised and run

Each part has a limit in seconds, and one that fails leaves the others. Medians and quartiles, the machine, the driver,
versions and the commit go into one file. Exit status: 0 all pass, 1 something failed, 2 there is no GPU that can run it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from check_gpu import driver, missing
from harness import machine

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
LIMIT = 360  # seconds in all
ENGINES = ("tests/runtime/backends/tensorrt/test_gpu.py", "tests/runtime/backends/test_backends.py")
COMPILERS = 8  # processes; with 16 cores they fill Triton's cache in under a minute


@dataclass(frozen=True, slots=True)
class Part:
    """commands run at once; each writes its file, if it has one, for the report. seconds: limit of the part."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    seconds: int
    file: Path | None = None


def parts(out: Path, *, tiny: bool) -> list[Part]:
    """tiny: small shapes and no times, for a machine without a GPU."""
    python, script = sys.executable, str(HERE / "bench_kernels.py")
    kernels, network = out / "kernels.json", out / "network.json"
    few = ("--families", "guide", "--tiny") if tiny else ()
    on = ("--on", "cpu") if tiny else ()
    compilers = 2 if tiny else COMPILERS
    # not `python -m pytest`, which would put the rooms on the path as top-level names
    tests = (str(Path(python).with_name("pytest")), "-q", "-m", "gpu")
    graphs = tuple(str(graph) for graph in sorted((HERE / "shapes").glob("*.onnx.xz"))[: 1 if tiny else None])
    peers = ("--peers", "eager", "compiled", "--rows", "2", "16")
    rows = ("--rows", "1") if tiny else ("--rows", "2", "8", "16")
    warm = tuple((python, script, *few, *on, "--part", str(i), str(compilers)) for i in range(compilers))
    beside = Part(
        "peers",
        ((python, str(HERE / "bench_step.py"), *peers, "--json", str(out / "peers.json")),),
        110,
        out / "peers.json",
    )
    return [
        Part("compile", warm, 90),
        Part("kernels", ((python, script, *few, *on, "--fit", "--json", str(kernels)),), 90, kernels),
        Part(
            "network",
            ((python, str(HERE / "bench_network.py"), "--model", *graphs, *rows, "--json", str(network)),),
            110,
            network,
        ),
        *([] if tiny else [beside]),  # the peers need a GPU
        # at once: neither is timed, and both export and compare on the CPU for most of their time
        Part("parity", ((*tests, "tests/kernels"), (*tests, "tests/runtime/backends/torch/test_cuda.py")), 150),
        Part("engines", ((*tests, *ENGINES),), 180),
    ]


def run(part: Part, limit: float, out: Path) -> dict[str, Any]:
    """Run a part's commands at once; their output goes to files. Never raises for what they do."""
    started = time.perf_counter()
    deadline = started + limit
    logs = [out / f"{part.name}{i or ''}.log" for i in range(len(part.commands))]
    processes = []
    for command, log in zip(part.commands, logs, strict=True):
        with log.open("wb") as file:
            processes.append(subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT))
    status: list[int | str] = []
    for process in processes:
        try:
            status.append(process.wait(max(0.1, deadline - time.perf_counter())))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status.append("out of time")
    failed = [str(code) for code in status if code != 0]
    found: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 1), "failed": ", ".join(failed)}
    if part.file is not None and part.file.exists():
        found["result"] = json.loads(part.file.read_text("utf-8"))
    for log in logs:
        lines = log.read_text("utf-8", errors="replace").strip().splitlines()
        found["last"] = lines[-1][:200] if lines else ""
    return found


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for the report and the logs")
    parser.add_argument("--parts", nargs="+", help="these only")
    parser.add_argument("--dry-run", action="store_true", help="small shapes on the CPU: does every part run?")
    args = parser.parse_args(given)
    if not args.dry_run and (lines := list(missing())):
        print(f"cannot run: {'; '.join(lines)}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    report: dict[str, Any] = {"machine": machine(), "driver": driver(), "commit": commit(), "parts": {}}
    if not args.dry_run:
        import torch

        report |= {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
        os.environ["TRITON_INTERPRET"] = "0"
    left = float("inf") if args.dry_run else LIMIT
    for part in parts(out, tiny=args.dry_run):
        if args.parts and part.name not in args.parts:
            continue
        report["parts"][part.name] = found = run(
            part, min(left, 10 * part.seconds if args.dry_run else part.seconds), out
        )
        left -= found["seconds"]
        print(f"{part.name:8} {found['seconds']:6.1f} s  {found['failed'] or 'pass'}  {found['last']}", flush=True)
        (out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"wrote {args.out / 'report.json'}")
    return 1 if any(part["failed"] for part in report["parts"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
