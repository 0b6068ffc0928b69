"""One SD1.5-shaped UNet pass and one image, by everything that runs it on a CPU: `python benchmarks/bench_denoiser.py`.

Random weights, 2 rows (guided), the same inputs for all. Runners load one after the other, each in a process of its own, so
that none pays for another's memory; the peer that a ratio is against ran in the same call. `--work` keeps the 4.3 GB model and
its bundle for the next call.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import machine, timed

from stepforge.runtime.bundle import UNET

PASSES = ("diffusers fp32", "diffusers bf16", "onnxruntime fp32", "openvino fp32", "openvino bf16")
OURS = ("stepforge onnxruntime fp32", "stepforge openvino fp32", "stepforge openvino bf16")
PROMPT = "a photograph of a cat sitting on a wooden table"


def inputs(size: int) -> dict[str, np.ndarray]:
    random = np.random.RandomState(0)
    return {
        "sample": random.standard_normal((2, 4, size // 8, size // 8)).astype(np.float32),
        "timestep": np.full(2, 500, np.float32),
        "encoder_hidden_states": random.standard_normal((2, 77, 768)).astype(np.float32),
    }


def diffusers_runner(model: Path, precision: str) -> tuple[Any, Any]:
    import torch
    from diffusers import StableDiffusionPipeline

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    pipeline = StableDiffusionPipeline.from_pretrained(
        model, dtype=dtype, safety_checker=None, requires_safety_checker=False, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)

    def one_pass(size: int) -> np.ndarray:
        tensors = [torch.from_numpy(value).to(dtype) for value in inputs(size).values()]
        with torch.no_grad():
            return pipeline.unet(*tensors).sample.float().numpy()

    def image(size: int, steps: int) -> None:
        pipeline(PROMPT, width=size, height=size, num_inference_steps=steps, guidance_scale=7.5)

    return one_pass, image


def bare_runner(bundle: Path, engine: str, precision: str) -> tuple[Any, Any]:
    """The engine library alone, on the bundle's standard graph, by its own API."""
    graph = bundle / "denoiser/unet/model.onnx"
    if engine == "onnxruntime":
        import onnxruntime

        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        return lambda size: session.run(None, inputs(size))[0], None
    import openvino

    hint = {"fp32": "f32", "bf16": "bf16"}[precision]
    compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": hint})
    return lambda size: compiled(inputs(size))[0], None


def our_runner(bundle: Path, backend: str, precision: str) -> tuple[Any, Any]:
    from stepforge import Engine, Request, open_bundle
    from stepforge.runtime.backends import open_backend

    opened = open_bundle(bundle, check=False)
    engine_library = open_backend(backend, opened, precision=precision)
    open_network, networks = engine_library.open, {}

    def open_once(component: Any, banks: Any = None) -> Any:
        """The engine runs the denoiser that passes are timed on: two of them would double the peak."""
        if component not in networks:
            networks[component] = open_network(component, banks)
        return networks[component]

    engine_library.open = open_once  # type: ignore[method-assign]
    engine = Engine(opened, engine_library)
    denoiser = engine_library.open(UNET)

    def one_pass(size: int) -> np.ndarray:
        return np.array(denoiser(inputs(size))["prediction"])

    def image(size: int, steps: int) -> None:
        engine.generate(Request(prompt=PROMPT, width=size, height=size, steps=steps, guidance=7.5))

    return one_pass, image


def run_one(runner: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one runner; called in a process of its own."""
    model, bundle = args.work / "model", args.work / "bundle"
    *owner, name, precision = runner.split()
    started = time.perf_counter()
    if owner:
        one_pass, image = our_runner(bundle, name, precision)
    elif name == "diffusers":
        one_pass, image = diffusers_runner(model, precision)
    else:
        one_pass, image = bare_runner(bundle, name, precision)
    loaded = time.perf_counter() - started
    report: dict[str, Any] = {"load": loaded}
    timing = timed(lambda: one_pass(args.size), runs=args.runs)
    report["pass"] = [timing.median, timing.low, timing.high]
    np.save(args.work / f"{runner.replace(' ', '-')}.npy", one_pass(args.size))
    if image is not None:
        image(args.size, 1)
        timing = timed(lambda: image(args.size, args.steps), runs=args.images, warmup=0)
        report["image"] = [timing.median, timing.low, timing.high]
    report["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    return report


def prepare(work: Path) -> None:
    if not (work / "model/model_index.json").exists():
        import random_models

        random_models.save(work / "model")
    if not (work / "bundle/bundle.json").exists():
        command = [sys.executable, "-m", "stepforge.runtime", "export", work / "model", "-o", work / "bundle"]
        subprocess.run(list(map(str, command)), check=True)


def show(reports: dict[str, dict[str, Any]], work: Path, size: int, steps: int) -> None:
    base = reports.get("diffusers fp32")
    truth = np.load(work / "diffusers-fp32.npy").astype(np.float64) if base else None
    print(f"\n{'':28}{'load s':>8}  {'pass s (low..high)':24}{'ratio':>6}  {'error':>8}  "
          f"{f'{steps}-step image s (low..high)':30}{'ratio':>6}  {'peak GB':>7}")  # fmt: skip
    for runner, report in reports.items():
        median, low, high = report["pass"]
        line = f"{runner:28}{report['load']:8.1f}  {f'{median:.3f} ({low:.3f}..{high:.3f})':24}"
        line += f"{base['pass'][0] / median:5.2f}x" if base else f"{'':6}"
        if truth is not None:
            ours = np.load(work / f"{runner.replace(' ', '-')}.npy").astype(np.float64)
            line += f"  {np.linalg.norm(ours - truth) / np.linalg.norm(truth):8.1e}  "
        if "image" in report:
            median, low, high = report["image"]
            line += f"{f'{median:.2f} ({low:.2f}..{high:.2f})':30}"
            line += f"{base['image'][0] / median:5.2f}x" if base else f"{'':6}"
        else:
            line += " " * 36
        print(line + f"  {report['peak_gb']:7.1f}")
    for precision in ("fp32", "bf16"):
        bare, ours = reports.get(f"openvino {precision}"), reports.get(f"stepforge openvino {precision}")
        if bare and ours:
            print(f"stepforge / bare openvino, {precision}, one pass: {ours['pass'][0] / bare['pass'][0]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=5, help="counted passes")
    parser.add_argument("--images", type=int, default=2, help="counted images")
    parser.add_argument("--runners", nargs="*", default=[*PASSES, *OURS], help="also: stepforge torch fp32, and bf16")
    parser.add_argument("--work", type=Path, help="folder for the model and its bundle, kept; default: a temporary one")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_one(args.one, args)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        args.work = args.work or Path(temporary)
        args.work.mkdir(parents=True, exist_ok=True)
        prepare(args.work)
        print(machine())
        print(f"SD1.5-shaped UNet, random weights, 2 rows, {args.size}x{args.size} pixels")
        reports = {}
        for runner in args.runners:
            command = [
                sys.executable, __file__, "--one", runner, "--work", args.work, "--size", args.size,
                "--steps", args.steps, "--runs", args.runs, "--images", args.images,
            ]  # fmt: skip
            environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
            output = subprocess.check_output(list(map(str, command)), env=environment, text=True)
            reports[runner] = json.loads(output.splitlines()[-1])
            print(f"  measured {runner}", file=sys.stderr)
        show(reports, args.work, args.size, args.steps)


if __name__ == "__main__":
    main()
