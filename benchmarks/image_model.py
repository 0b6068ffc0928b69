"""Whole images by the roofline beside what others and we measured: `python benchmarks/image_model.py`, a minute, no GPU.

An image is its text encoders, a denoiser call of two rows a step, and the decoder of its VAE: bytes and FLOPs of every operator
in fp16, batch 1. The denoiser is the program that the torch backend runs on CUDA (`network_model`); encoders and decoder are
counted layer by layer. Rates are those of one H100 (`stepforge/kernels/dispatch/cost.py`), and other GPUs are assumed to
sustain the same shares of their peaks. Nothing is overlapped, and the host is free: it says what is left to gain.

    python benchmarks/image_model.py --measure sd15     on a GPU: the same image by us and by diffusers, eager and compiled
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from network_model import SHAPES, Work, cuda_network, given, with_holes, works

from stepforge.kernels.dispatch.cost import GPUS, Gpu

MODELED = ("A100", "H100", "4090", "B200")
SIDES = {"sd15": 512, "sdxl": 1024}
FAMILY = {"sd15": "sd1", "sdxl": "sdxl"}
PARTS = ("a step", "text and decoder")
PROMPT = "a photograph of a cat sitting on a wooden table"


@dataclass(frozen=True, slots=True)
class Known:
    """An image that somebody timed: batch 1, 16 bits, guided. steps: of two rows each. decoded: text and decoder counted."""

    gpu: str
    model: str
    steps: int
    milliseconds: float
    decoded: bool
    who: str


# TensorRT: huggingface.co/stabilityai/stable-diffusion-xl-1.0-tensorrt; A100: github.com/fal-ai/stable-diffusion-benchmarks;
# 4090: github.com/siliconflow/onediff, pull request 1014, and chengzeyi/stable-fast's README; ours: results/h100_step*.json
KNOWN = (
    Known("A100", "sd15", 50, 819, True, "TensorRT 9.0"),
    Known("A100", "sd15", 50, 901, True, "stable-fast"),
    Known("A100", "sd15", 50, 1058, True, "diffusers, torch.compile (2.1)"),
    Known("A100", "sdxl", 30, 2742, True, "TensorRT"),
    Known("H100", "sdxl", 30, 1471, True, "TensorRT"),
    Known("H100", "sd15", 1, 1e3 / 104.6, False, "stable-fast, best published"),
    Known("4090", "sd15", 1, 1e3 / 61.8, False, "stable-fast"),
    Known("4090", "sd15", 1, 1e3 / 85.7, False, "OneFlow"),
    Known("4090", "sdxl", 1, 1e3 / 15.9, False, "OneFlow"),
    Known("H100", "sd15", 1, 23.22, False, "diffusers eager, here"),
    Known("H100", "sd15", 1, 7.27, False, "diffusers, torch.compile (2.11), here"),
    Known("H100", "sd15", 1, 5.74, False, "stepforge torch fp16, here"),
)


def layers(network: Any, call: Callable[[], Any]) -> list[Work]:
    """Convolutions, products, norms and attentions of a module on the meta device, as a call meets them. Activations and
    sums are taken to be fused into what reads them."""
    found: list[Work] = []

    def note(module: Any, inputs: Any, output: Any) -> None:
        if not isinstance(output, torch.Tensor):
            return
        x = inputs[0]
        weights = sum(one.numel() for one in module.parameters(recurse=False))
        flops = 0.0
        if isinstance(module, torch.nn.Conv2d):
            flops = 2.0 * output.numel() * module.weight[0].numel()
        elif isinstance(module, torch.nn.Linear):
            flops = 2.0 * output.numel() * x.shape[-1]
        found.append(Work(type(module).__name__, 1, flops, float(x.numel() + weights + output.numel())))

    def attend(module: Any, inputs: Any, output: Any) -> None:
        if inputs:
            x = inputs[0]
            tokens = x.shape[1] if x.ndim == 3 else x.shape[-1] * x.shape[-2]
            width = x.numel() // (x.shape[0] * tokens)
            found.append(Work("Attention", 1, 4.0 * x.shape[0] * tokens**2 * width, 4.0 * x.numel()))

    kinds = (torch.nn.Conv2d, torch.nn.Linear, torch.nn.GroupNorm, torch.nn.LayerNorm)
    for module in network.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(note)
        elif type(module).__name__ in ("Attention", "CLIPAttention"):
            module.register_forward_hook(attend, with_kwargs=False)
    with torch.no_grad():
        call()
    return found


def around(model: str) -> list[Work]:
    """Text encoders, both rows at once, and the decoder of one image."""
    import random_models

    shapes = random_models.FAMILIES[FAMILY[model]]
    found: list[Work] = []
    side = SIDES[model] // 8
    with torch.device("meta"):
        decoder = random_models.vae(**shapes["vae"])
        found += layers(decoder, lambda: decoder.decode(torch.zeros(1, 4, side, side)))
        for encoder in shapes["encoders"]:
            text = random_models.text_encoder(*encoder)
            found += layers(text, lambda text=text: text(torch.zeros(2, 77, dtype=torch.long)))
    return found


def denoiser(model: str) -> list[Work]:
    with with_holes(SHAPES / f"{model}.onnx.xz") as path, torch.inference_mode():
        network = cuda_network(path)
        return works(network, given(network.program, 2))


def milliseconds(found: list[Work], gpu: Gpu) -> float:
    return 1e3 * sum(work.seconds(gpu) for work in found)


def predict(model: str) -> dict[str, Any]:
    step, rest = denoiser(model), around(model)
    work = [(sum(w.flops for w in one) / 1e12, 2e-9 * sum(w.elements for w in one)) for one in (step, rest)]
    told = [f"{what} {flops:.2f} TFLOP, {size:.1f} GB" for what, (flops, size) in zip(PARTS, work, strict=True)]
    print(f"\n{model}, {SIDES[model]}x{SIDES[model]}, fp16, one guided image: {'; '.join(told)}")
    report: dict[str, Any] = {}
    print(f"{'':6}{'step, ms':>10}{'text+VAE':>10}{'20 steps':>10}{'30 steps':>10}{'50 steps':>10}")
    for name in MODELED:
        a, b = milliseconds(step, GPUS[name]), milliseconds(rest, GPUS[name])
        report[name] = {"step": round(a, 2), "around": round(b, 2)}
        print(f"{name:6}{a:10.2f}{b:10.2f}{20 * a + b:10.0f}{30 * a + b:10.0f}{50 * a + b:10.0f}")
    print(f"{'known: ms, and how much of the time the roofline explains':60}")
    for one in KNOWN:
        if one.model == model:
            own = report[one.gpu]
            floor = one.steps * own["step"] + one.decoded * own["around"]
            what = f"{one.steps} steps" + (", text and VAE" if one.decoded else "")
            print(f"  {one.gpu:6}{one.who:40}{what:26}{one.milliseconds:9.1f}{100 * floor / one.milliseconds:6.0f} %")
    return report


def measure(model: str, work: Path, steps: int, runs: int) -> dict[str, Any]:
    """On a CUDA GPU: whole images in fp16 by ours and diffusers, random weights, seconds; and the roofline of this GPU."""
    import random_models
    from diffusers import DiffusionPipeline

    from stepforge import Request, load

    folder, bundle = work / f"{model}-fp16", work / f"{model}-fp16.bundle"
    if not (folder / "model_index.json").exists():
        random_models.save(folder, FAMILY[model], dtype=torch.float16)
    if not (bundle / "bundle.json").exists():
        command = [sys.executable, "-m", "stepforge.runtime", "export", folder, "-o", bundle, "--precision", "fp16"]
        subprocess.run(list(map(str, command)), check=True)
    side = SIDES[model]

    def timed(draw: Callable[[int], object]) -> dict[str, float]:
        """Seconds of an image, and milliseconds of a step more."""
        draw(steps), draw(2 * steps)
        taken: dict[int, list[float]] = {steps: [], 2 * steps: []}
        for _ in range(runs):
            for count in taken:
                started = time.perf_counter()
                draw(count)
                taken[count].append(time.perf_counter() - started)
        short, long = (statistics.median(taken[count]) for count in (steps, 2 * steps))
        return {"image, s": round(short, 4), "step, ms": round(1e3 * (long - short) / steps, 3)}

    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "steps": steps}
    with load(bundle, backend="torch", precision="fp16") as engine:
        options = {"prompt": PROMPT, "width": side, "height": side, "guidance": 7.5}
        report["stepforge torch fp16"] = timed(lambda count: engine.generate(Request(steps=count, **options)))
    for compiled in (False, True):
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float16, local_files_only=True).to("cuda")
        pipe.set_progress_bar_config(disable=True)
        if compiled:  # layout and mode of diffusers' guide to speed
            pipe.unet.to(memory_format=torch.channels_last)
            pipe.unet = torch.compile(pipe.unet, mode="reduce-overhead", fullgraph=True)
        name = f"diffusers fp16{', torch.compile' if compiled else ''}"
        report[name] = timed(
            lambda count, pipe=pipe: pipe(
                PROMPT, width=side, height=side, num_inference_steps=count, guidance_scale=7.5
            )
        )
        del pipe
        torch.cuda.empty_cache()
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=sorted(SIDES), default=sorted(SIDES))
    parser.add_argument("--measure", choices=sorted(SIDES), help="on a CUDA GPU, beside diffusers")
    parser.add_argument("--work", type=Path, default=Path("out/gpu"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.measure:
        if not torch.cuda.is_available():
            print("cannot run: there is no CUDA GPU", file=sys.stderr)
            return 2
        report = measure(args.measure, args.work, args.steps, args.runs)
        print(json.dumps(report, indent=1))
    else:
        report = {model: predict(model) for model in args.models}
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
