"""One recorded denoiser step on a GPU, kernel by kernel: `python benchmarks/bench_step.py BUNDLE`.

BUNDLE is an exported one, or one without its weights (`--fill` draws them on the device: norms about 1, products scaled by
their depth, so that values keep their size). Prints the milliseconds of a replay (median, quartiles), its launches by kind as
the program says and by name as the profiler saw them, the error against `torch-exact` in fp32, and with `--peers` diffusers.
With a bundle that has banks, `--adapters N` mixes N adapter slots of random numbers over the rows.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from stepforge.runtime.backends import Banks, open_backend
from stepforge.runtime.backends.torch.launches import count
from stepforge.runtime.bundle import UNET, ComponentId, read

WIDTHS = {768: "SD1.5", 2048: "SDXL"}


def fill(bundle: Path, component: ComponentId = UNET, seed: int = 0) -> None:
    """Write random weights where a bundle has none."""
    graph = bundle / component.folder / "model.onnx"
    model = onnx.load(str(graph), load_external_data=False)
    tensors = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    places = {t.name: {entry.key: entry.value for entry in t.external_data} for t in tensors}
    file = graph.with_name(next(iter(places.values()))["location"])
    if file.exists() or not tensors:
        return
    size = max(int(place.get("offset", 0)) + int(place["length"]) for place in places.values())
    data = np.memmap(file, np.uint8, "w+", shape=(size,))
    generator = torch.Generator("cuda").manual_seed(seed)
    for tensor in tensors:
        dims = tuple(tensor.dims)
        value = torch.randn(dims, device="cuda", generator=generator)
        if len(dims) > 1:
            value *= (dims[0] / value.numel()) ** 0.5 if len(dims) > 2 else dims[0] ** -0.5
        else:
            value *= 0.1
        if len(dims) == 1 and "norm" in tensor.name and "weight" in tensor.name:
            value += 1.0
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        raw = np.frombuffer(value.cpu().numpy().astype(kind).tobytes(), np.uint8)
        start = int(places[tensor.name].get("offset", 0))
        data[start : start + len(raw)] = raw
    data.flush()


def given(rows: int, width: int, side: int, slots: int) -> dict[str, np.ndarray]:
    random = np.random.RandomState(rows)
    values = {
        "sample": random.standard_normal((rows, 4, side, side)).astype(np.float32),
        "timestep": np.full(rows, 981.0, np.float32),
        "encoder_hidden_states": random.standard_normal((rows, 77, width)).astype(np.float32),
    }
    if width == 2048:
        values["text_embeds"] = random.standard_normal((rows, 1280)).astype(np.float32)
        values["time_ids"] = np.tile(np.array([1024, 1024, 0, 0, 1024, 1024], np.float32), (rows, 1))
    if slots:
        values["adapter"] = np.arange(rows) % slots + 1
        values["adapter_strength"] = np.ones((rows, 1, 1), np.float32)
    return values


def banks_of(bundle: Any, component: ComponentId = UNET) -> Banks | None:
    random = np.random.RandomState(7)
    banks = Banks({}, np.zeros(64, np.int64))
    for tensor in bundle.components[component].inputs:
        if ".lora_" in tensor.name:
            banks[tensor.name] = (0.02 * random.standard_normal(tensor.shape)).astype(np.float32)
            banks[tensor.name][0] = 0
    return banks or None


def milliseconds(run: Any, runs: int = 30) -> list[float]:
    """Quartiles of a call on the device."""
    for _ in range(5):
        run()
    found = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return [round(value, 4) for value in statistics.quantiles(found, n=4)]


def profile(run: Any, times: int = 5) -> list[tuple[str, float, float]]:
    """(kernel, launches a call, µs a call) of what runs on the device, longest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(times):
            run()
        torch.cuda.synchronize()
    launches: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for event in found.events():
        if event.device_type.name == "CUDA":
            name = (
                re.sub(r"<.*", "", event.name)[:70]
                if "kernel" in event.name and "at::" in event.name
                else event.name[:70]
            )
            launches[name] += 1
            seconds[name] += event.device_time_total if hasattr(event, "device_time_total") else event.cuda_time_total
    return [(name, launches[name] / times, seconds[name] / times) for name, _ in seconds.most_common()]


def ours(args: argparse.Namespace, name: str, precision: str, rows: int, report: dict[str, Any]) -> np.ndarray:
    bundle = read(args.bundle, check=False)
    width = next(tensor.shape[2] for tensor in bundle.components[UNET].inputs if tensor.name == "encoder_hidden_states")
    started = time.perf_counter()
    graph = open_backend(name, bundle, precision=precision, threads=8).open(
        UNET, banks_of(bundle) if args.adapters else None
    )
    opened = time.perf_counter() - started
    values = given(rows, width, args.side or (64 if width == 768 else 128), args.adapters)
    result = graph(values)["prediction"]
    at = bool(args.adapters)
    network = graph.chosen(residuals=False)[at]
    recording = next(iter(graph._callers[id(network)]._recordings.values()))
    own = {
        "open_s": round(opened, 2), "replay_ms": milliseconds(recording.graph.replay),
        "call_ms": milliseconds(lambda: graph(values)),
        "kinds": dict(count(network.program)),
    }  # fmt: skip
    if recording.once is not None:
        own["once_ms"] = milliseconds(recording.once.replay)
    print(f"{name} {precision} {rows} rows {args.adapters} adapters: replay {own['replay_ms']} ms, call {own['call_ms']}, "
          f"once {own.get('once_ms')}, nodes {sum(own['kinds'].values())}", flush=True)  # fmt: skip
    if args.profile:
        kernels = profile(recording.graph.replay)
        own["kernels"] = kernels
        own["launches"] = sum(n for _, n, _ in kernels)
        print(f"  {own['launches']:.0f} launches, {sum(us for _, _, us in kernels) / 1e3:.3f} ms of kernels")
        for kernel, n, us in kernels[: args.profile]:
            print(f"  {n:6.1f} {us:9.1f} µs  {us / n:7.2f} each  {kernel}")
    report[f"{name} {precision} {rows} rows {args.adapters} adapters"] = own
    return result


def peer(rows: int, compiled: bool, report: dict[str, Any]) -> None:
    """diffusers in fp16, channels last, random weights; compiled with CUDA graphs, as its guide to speed has it."""
    from diffusers import UNet2DConditionModel

    with torch.device("cuda"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    unet = unet.eval().half().to(memory_format=torch.channels_last)
    started = time.perf_counter()
    if compiled:
        unet = torch.compile(unet, mode="reduce-overhead", fullgraph=True)
    tensors = [torch.from_numpy(value).cuda().half() for value in given(rows, 768, 64, 0).values()]

    def run() -> None:
        unet(*tensors)

    with torch.inference_mode():
        times = milliseconds(run)
    name = f"diffusers fp16 {'compiled' if compiled else 'eager'} {rows} rows"
    report[name] = {"replay_ms": times, "compile_s": round(time.perf_counter() - started, 1) if compiled else None}
    print(f"{name}: {times} ms", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", help="left out, the peers alone")
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--side", type=int, default=0, help="of the latents")
    parser.add_argument("--precision", nargs="+", default=["fp16"])
    parser.add_argument("--adapters", type=int, default=0)
    parser.add_argument("--fill", action="store_true")
    parser.add_argument("--errors", action="store_true", help="against torch-exact in fp32, at the first rows")
    parser.add_argument("--peers", nargs="*", default=None, choices=["eager", "compiled"])
    parser.add_argument("--profile", type=int, default=0, help="so many kernels of each replay")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("cannot run: there is no CUDA GPU", file=sys.stderr)
        return 2
    if args.fill and args.bundle is not None:
        fill(args.bundle)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    report: dict[str, Any] = {
        "machine": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda, "commit": commit,
        "command": " ".join(sys.argv), "unit": "ms: lower quartile, median, upper quartile of 30",
    }  # fmt: skip
    results: dict[int, np.ndarray] = {}
    for precision in args.precision if args.bundle is not None else ():
        for rows in args.rows:
            results[rows] = ours(args, "torch", precision, rows, report)
        if args.errors:
            rows = args.rows[0]
            truth = ours(args, "torch-exact", "fp32", rows, report)
            for name, found in (
                (f"torch {precision}", results[rows]),
                (f"torch-exact {precision}", ours(args, "torch-exact", precision, rows, report)),
            ):
                report[f"error {name}"] = float(np.linalg.norm(found - truth) / np.linalg.norm(truth))
                print(f"error {name}: {report[f'error {name}']:.2e}", flush=True)
    for kind in args.peers or ():
        for rows in args.rows:
            peer(rows, kind == "compiled", report)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
