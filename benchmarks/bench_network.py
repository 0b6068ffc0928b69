"""A whole denoiser with the shape of SD1.5 on a GPU, beside diffusers: `python benchmarks/bench_kernels.py --network`.

bf16, 512x512 pixels, 2 and 8 rows, random weights, from NumPy to NumPy for all. Ours replays a CUDA graph: without adapters,
and with two adapters of rank 16 mixed over the rows, which diffusers cannot do in one call. Each runner has a process of its
own. `--work` keeps the 4.3 GB model and its bundles (the same folder as bench_denoiser.py's).

    python benchmarks/bench_network.py --model              launches, FLOPs, bytes and predicted ms, two models' shapes
    python benchmarks/bench_network.py --model GRAPH.onnx   of any denoiser, with or without its weights

--model needs no GPU; where there is one, measured milliseconds stand beside the predictions.

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
MODELED = ("A100", "H100", "4090")
Runner = Callable[[dict[str, np.ndarray]], np.ndarray]


def diffusers_runner(model: Path, precision: str, compiled: bool, device: str) -> Runner:
    import torch
    from diffusers import UNet2DConditionModel

    torch.backends.cudnn.allow_tf32 = False
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    unet = UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=dtype, local_files_only=True).to(device)
    if compiled:  # layout and mode of diffusers' guide to speed
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


def ratios(steps: dict[tuple[str, int], float]) -> dict[str, float]:
    """Steps with adapters over those without, and SD 1.5's image of 20 steps with its decoder, ms; replays, or predicted."""
    found = {
        f"{name}, {rows} rows, over the step without": time / steps[name.partition("_")[0], rows]
        for (name, rows), time in steps.items()
        if name.endswith(("_all", "_transformer")) and (name.partition("_")[0], rows) in steps
    }
    if ("sd15", 2) in steps and ("sd15_decoder", 1) in steps:
        found["20 steps of 2 rows and the decoder, ms"] = 20 * steps["sd15", 2] + steps["sd15_decoder", 1]
    return found


def model(graphs: list[Path], rows: list[int], out: Path | None) -> int:
    """Print the tables and ratios; on a CUDA GPU with what it measured, on weights drawn there."""
    import network_model
    import torch
    from harness import machine

    from stepforge.kernels.dispatch.cost import GPUS

    gpus = {name: GPUS[name] for name in MODELED}
    on_gpu = torch.cuda.is_available()
    report: dict[str, Any] = {
        "machine": machine(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "tables": {},
    }
    steps: dict[tuple[str, int], float] = {}
    for graph in graphs or sorted(network_model.SHAPES.glob("*.onnx.xz")):
        with network_model.with_holes(graph) as path, torch.inference_mode():
            network = network_model.cuda_network(path)
            own = [1] if "latents" in network.program.inputs else rows
            calls = {count: network_model.given(network.program, count) for count in own}
            works = {count: network_model.works(network, given) for count, given in calls.items()}
            network = network_model.drawn(network, "cuda") if on_gpu else network
        for count, found in works.items():
            measured = replay = None
            if on_gpu:
                with torch.inference_mode():
                    values = network_model.numbers(calls[count], "cuda")
                    measured = network_model.measure(network, values)
                    replay = network_model.replayed(network, values)
            latents = next(calls[count][name] for name in ("sample", "latents") if name in calls[count])
            size = "x".join(map(str, latents.shape[2:]))
            print(f"\n{graph.name.partition('.')[0]}, {count} rows, fp16, latents {size}: {network_model.WHAT}")
            print("\n".join(network_model.table(found, gpus, measured)), flush=True)
            predicted = 1e3 * sum(work.seconds(gpus["H100"]) for work in found)
            steps[graph.name.partition(".")[0], count] = predicted if replay is None else replay[1]
            if replay is not None:
                print(f"recorded and replayed: {replay} ms, quartiles")
            report["tables"][f"{graph.name} {count}"] = {
                "measured ms": measured, "replay ms": replay,
                "kinds": {
                    kind: {
                        "launches": sum(w.launches for w in own), "flops": sum(w.flops for w in own),
                        "elements": sum(w.elements for w in own),
                        "predicted ms": {name: 1e3 * sum(w.seconds(gpu) for w in own) for name, gpu in gpus.items()},
                    }
                    for kind, own in network_model.by_kind(found).items()
                },
            }  # fmt: skip
    report["ratios"] = ratios(steps)
    print("\nmeasured:" if on_gpu else "\npredicted, H100:")
    print("\n".join(f"{name}: {value:.3f}" for name, value in report["ratios"].items()))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/sd15"))
    parser.add_argument("--size", type=int, default=SIZE, help="pixels")
    parser.add_argument("--runs", type=int, default=RUNS, help="counted calls")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument(
        "--model", nargs="*", type=Path, metavar="GRAPH", help="predict; graphs, or those in benchmarks/shapes"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[2], help="with --model")
    parser.add_argument("--json", type=Path, help="with --model: file to write every figure to")
    args = parser.parse_args()
    if args.model is not None:
        return model(args.model, args.rows, args.json)
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
