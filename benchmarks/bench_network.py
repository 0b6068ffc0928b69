"""A whole denoiser with the shape of SD1.5 on a GPU, beside diffusers: `python benchmarks/bench_kernels.py --network`.

bf16, 512x512 pixels, 2 and 8 rows, random weights, from NumPy to NumPy for all. Ours replays a CUDA graph: without adapters,
and with two adapters of rank 16 mixed over the rows, which diffusers cannot do in one call. Each runner has a process of its
own. `--work` keeps the 4.3 GB model and its bundles (the same folder as bench_denoiser.py's).

Pass: ours runs, and its error against diffusers in fp32 is at most twice that of diffusers in bf16. Times are reported only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench_denoiser import inputs, prepare
from bench_lora import write_adapter
from check_gpu import missing
from harness import timed

from stepforge.runtime.bundle import UNET

TRUTH, EAGER = "diffusers fp32", "diffusers bf16"
PEERS = (TRUTH, EAGER, "diffusers bf16 compiled")
OURS = ("torch bf16", "torch-exact bf16", "torch bf16 adapters", "torch-exact bf16 adapters")
ROWS = (2, 8)
SIZE, SLOTS, RANK, RUNS = 512, 4, 16, 20
Runner = Callable[[dict[str, np.ndarray]], np.ndarray]


def diffusers_runner(model: Path, precision: str, compiled: bool, device: str) -> Runner:
    import torch
    from diffusers import UNet2DConditionModel

    torch.backends.cudnn.allow_tf32 = False
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    unet = UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=dtype, local_files_only=True).to(device)
    if compiled:  # as diffusers' guide to speed has it
        unet = torch.compile(unet.to(memory_format=torch.channels_last), mode="reduce-overhead", fullgraph=True)

    def run(values: dict[str, np.ndarray]) -> np.ndarray:
        tensors = [torch.from_numpy(value).to(device, dtype) for value in values.values()]
        with torch.no_grad():
            return unet(*tensors).sample.float().cpu().numpy()

    return run


def our_runner(work: Path, backend: str, precision: str, adapters: bool) -> Runner:
    from stepforge import open_bundle
    from stepforge.runtime.backends import open_backend
    from stepforge.runtime.engine.adapters import Adapters, row_inputs

    engine = open_backend(backend, bundle := open_bundle(work / ("banks" if adapters else "bundle"), check=False),
                          precision=precision)  # fmt: skip
    if not adapters:
        plain = engine.open(UNET)
        return lambda values: plain(values)["prediction"]
    loaded = Adapters(bundle, engine)
    names = ("one", "two")
    for name in names:
        loaded.load(name, work / f"{name}.safetensors")
    slots = [loaded.acquire(loaded.choose({name: 1.0}), ()) for name in names]
    banked = engine.open(UNET, loaded.banks(UNET))

    def run(values: dict[str, np.ndarray]) -> np.ndarray:
        rows = len(values["sample"])
        mixed = [slots[row % len(slots)] for row in range(rows)]
        return banked({**values, **row_inputs(mixed, [1.0] * rows)})["prediction"]

    return run


def measure_runner(runner: str, work: Path, size: int, runs: int, device: str) -> dict[str, list[float]]:
    """Seconds by rows: median, fastest, slowest. Writes what the first rows gave beside the model."""
    name, precision, *options = runner.split()
    if name == "diffusers":
        run = diffusers_runner(work / "model", precision, bool(options), device)
    else:
        run = our_runner(work, name, precision, bool(options))
    found = {}
    for rows in ROWS:
        values = {key: np.tile(value, (rows // 2, *(1,) * (value.ndim - 1))) for key, value in inputs(size).items()}
        if rows == ROWS[0]:
            np.save(work / f"{runner.replace(' ', '-')}.npy", run(values))
        timing = timed(lambda given=values: run(given), runs=runs, warmup=3)
        found[str(rows)] = [timing.median, timing.low, timing.high]
    return found


def prepare_banks(work: Path) -> None:
    from stepforge.export.build import BankOptions, with_banks

    prepare(work)
    if not (work / "banks").exists():
        with_banks(work / "bundle", work / "banks", BankOptions(SLOTS, RANK, "all"))
    for seed, name in enumerate(("one", "two")):
        if not (work / f"{name}.safetensors").exists():
            write_adapter(work / "bundle", work / f"{name}.safetensors", RANK, "all", seed)


def child(runner: str, work: Path, size: int, runs: int, device: str) -> dict[str, Any]:
    """{rows: seconds}, or {"failed": the last line that the process wrote}."""
    command = [sys.executable, __file__, "--one", runner, "--work", work, "--size", size, "--runs", runs,
               "--device", device]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"failed": lines[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def error(work: Path, runner: str) -> float:
    """‖result − truth‖ / ‖truth‖, the truth being diffusers in fp32."""
    truth, own = (np.load(work / f"{name.replace(' ', '-')}.npy").astype(np.float64) for name in (TRUTH, runner))
    return float(np.linalg.norm(own - truth) / np.linalg.norm(truth))


def network(
    work: Path, size: int = SIZE, runs: int = RUNS, device: str = "cuda"
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Times and errors by runner, and what failed of ours. Prints the table."""
    work.mkdir(parents=True, exist_ok=True)
    prepare_banks(work)
    print(f"\nSD1.5-shaped denoiser, {size}x{size} pixels, ms: median (fastest..slowest), over diffusers eager in bf16")
    found: dict[str, dict[str, Any]] = {}
    faults = []
    for runner in (*PEERS, *OURS):
        found[runner] = report = child(runner, work, size, runs, device)
        if "failed" in report:
            print(f"  {runner:26} failed: {report['failed']}", flush=True)
            if runner in OURS:
                faults.append(f"{runner}: {report['failed']}")
            continue
        if "failed" not in found[TRUTH] and not runner.endswith("adapters"):
            report["error"] = error(work, runner)
        cells = []
        for rows in map(str, ROWS):
            median, low, high = (1e3 * seconds for seconds in report[rows])
            against = f" {median / (1e3 * found[EAGER][rows][0]):5.2f}x" if rows in found.get(EAGER, {}) else ""
            cells.append(f"{rows} rows {median:8.2f} ({low:.2f}..{high:.2f}){against}")
        tail = f"  error {report['error']:.1e}" if "error" in report else ""
        print(f"  {runner:26} {'   '.join(cells)}{tail}", flush=True)
        limit = 2 * found.get(EAGER, {}).get("error", np.inf)
        if runner in OURS and not report.get("error", 0.0) <= limit:  # NaN fails
            faults.append(f"{runner}: error {report['error']:.1e}, limit {limit:.1e}")
    return found, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/sd15"))
    parser.add_argument("--size", type=int, default=SIZE, help="pixels")
    parser.add_argument("--runs", type=int, default=RUNS, help="counted calls")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure_runner(args.one, args.work, args.size, args.runs, args.device)))
        return 0
    if args.device == "cuda" and (lines := list(missing())):
        print(f"cannot run: {'; '.join(lines)}", file=sys.stderr)
        return 2
    _, faults = network(args.work, args.size, args.runs, args.device)
    print("\n".join(f"FAIL {fault}" for fault in faults) or "pass")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
