"""What a ControlNet, a LoRA and reuse cost and save: `python benchmarks/bench_control.py`, SD1.5-shaped, random weights.

    pass      one call of each network for 2 rows; the denoiser without residual inputs (another bundle) against with them
    image     one guided image with a ControlNet and a LoRA: diffusers, ours with the same semantics, ours with shorter plans
    lossless  the denoiser with prompt keys and values, or with time embeddings, as inputs instead of computed in each step

diffusers keeps the LoRA unfused, as a service that switches adapters must. Runners load one after the other, each in a process
of its own. `--work` keeps model and bundles for the next call (the same folder as bench_denoiser.py's).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from bench_denoiser import PROMPT, inputs, prepare
from bench_lora import write_adapter
from harness import Timing, interleaved, machine, timed

from stepforge.runtime.bundle import UNET, ComponentId

HINT, RESIDUALS = ComponentId("control_hint", "net"), ComponentId("control_residuals", "net")
RANK, SCALE = 16, 0.8
# shorter plans; the last one has the settings that `stepforge tune` found for the demo model (docs/attention.md)
PLANS = {
    "same semantics": {},
    "guidance in 0.5 of the steps": {"guidance": "interval(7.5, steps=0..0.5)"},
    "guidance in 0.25 of the steps": {"guidance": "interval(7.5, steps=0..0.25)"},
    "guidance and ControlNet in 0.5": {"guidance": "interval(7.5, steps=0..0.5)", "end": 0.5},
    "deepcache(3)": {"reuse": "deepcache(3)"},
    "tgate(0.5), guidance in 0.5": {"guidance": "interval(7.5, steps=0..0.5)", "reuse": "tgate(0.5)"},
    "the demo model's preset": {"guidance": "interval(7.5, steps=0..0.4)", "reuse": "deepcache(5)+tgate(0.7)"},
}


def hint_image(size: int) -> Any:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (size, size))
    ImageDraw.Draw(image).ellipse((size // 8, size // 4, size * 7 // 8, size * 3 // 4), outline="white", width=3)
    return image


def diffusers_image(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.one.split()[1]]
    net = ControlNetModel.from_pretrained(args.work / "control", dtype=dtype, local_files_only=True)
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        args.work / "model", controlnet=net, dtype=dtype, safety_checker=None, requires_safety_checker=False,
        local_files_only=True,
    )  # fmt: skip
    pipeline.load_lora_weights(args.work, weight_name=adapter(args.work).name, adapter_name="style")
    pipeline.set_adapters(["style"], [SCALE])
    pipeline.set_progress_bar_config(disable=True)
    options = {"prompt": PROMPT, "image": hint_image(args.size), "width": args.size, "height": args.size}

    def image(steps: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        output = pipeline(
            **options, num_inference_steps=steps, guidance_scale=7.5, generator=generator, output_type="np"
        )
        return output.images[0]

    image(1)
    drawn: list[np.ndarray] = []
    timing = timed(lambda: drawn.append(image(args.steps)), runs=args.images, warmup=0)
    np.save(args.work / f"image-{args.one.replace(' ', '-')}.npy", drawn[0])
    return {"image": [timing.median, timing.low, timing.high]}


def our_images(args: argparse.Namespace) -> dict[str, Any]:
    from stepforge import Request, load

    _, backend, precision = args.one.split()
    report: dict[str, Any] = {}
    with load(bundle(args.work), backend=backend, precision=precision) as engine:
        engine.adapters.load("style", adapter(args.work))

        def request(steps: int, end: float = 1.0, **plan: Any) -> Request:
            control = {"name": "net", "image": hint_image(args.size), "end": end}
            return Request(prompt=PROMPT, width=args.size, height=args.size, steps=steps, seed=0, prompt_syntax="plain",
                           controls=(control,), adapters={"style": SCALE}, **plan)  # fmt: skip

        for plan in PLANS.values():  # opens what the plans need, and touches its memory
            engine.generate(request(4, **plan))
        for name, plan in PLANS.items():
            asked, results = request(args.steps, **plan), []
            for _ in range(args.images):
                results.append(engine.generate(asked))
            seconds = [result.stats.seconds["total"] for result in results]
            timing = Timing(float(np.median(seconds)), min(seconds), max(seconds))
            denoise = float(np.median([result.stats.seconds["denoise"] for result in results]))
            report[name] = {"image": [timing.median, timing.low, timing.high], "denoise": denoise,
                            "rows": results[0].stats.rows}  # fmt: skip
            if name == "same semantics":
                picture = np.asarray(results[0].images[0], np.float32) / 255
                np.save(args.work / f"image-{args.one.replace(' ', '-')}.npy", picture)
    return report


def passes(args: argparse.Namespace) -> dict[str, Any]:
    """Each network for 2 rows, in turn."""
    from stepforge import open_bundle
    from stepforge.runtime.backends import open_backend

    _, backend, precision = args.one.split()
    plain, full = open_bundle(args.work / "bundle", check=False), open_bundle(bundle(args.work), check=False)
    values = {
        **inputs(args.size),
        "adapter": np.zeros(2, np.int64),
        "adapter_strength": np.zeros((2, 1, 1), np.float32),
    }
    values["image"] = np.random.RandomState(1).rand(2, 3, args.size, args.size).astype(np.float32)
    engine = open_backend(backend, full, precision=precision)
    banks = bank_arrays(full, engine)

    def run(opened: Any, name: ComponentId, graph: Any, given: dict[str, Any]) -> dict[str, np.ndarray]:
        return graph({t.name: given[t.name] for t in opened.components[name].inputs if t.name not in banks})

    def opened(name: ComponentId) -> Any:
        read = {t.name for t in full.components[name].inputs}
        return engine.open(name, {key: array for key, array in banks.items() if key in read} or None)

    hint = opened(HINT)
    values["hint"] = np.array(run(full, HINT, hint, values)["hint"])
    residuals = opened(RESIDUALS)
    (count,) = (t.shape[1] for t in full.components[RESIDUALS].inputs if t.name == "scale")
    values["scale"] = np.ones((2, int(count)), np.float32)
    made = {key: np.array(value) for key, value in run(full, RESIDUALS, residuals, values).items()}
    zeros = {key: np.zeros((1, value.shape[1], 1, 1), np.float32) for key, value in made.items()}
    whole = opened(UNET)
    values |= {key: np.array(value) for key, value in run(full, UNET, whole, {**values, **made}).items()}
    bare = open_backend(backend, plain, precision=precision).open(UNET)
    deepcache, tgate = (replace(UNET, variant=variant) for variant in ("deepcache", "tgate"))
    shallow_residuals = replace(RESIDUALS, variant="deepcache")
    deep, gated, shallow = opened(deepcache), opened(tgate), opened(shallow_residuals)
    timings = interleaved(
        {
            "denoiser of a plain bundle": lambda: bare(inputs(args.size)),
            "the same, 1 row": lambda: bare({name: value[:1] for name, value in inputs(args.size).items()}),
            "denoiser, no ControlNet": lambda: run(full, UNET, whole, {**values, **zeros}),
            "denoiser, residuals": lambda: run(full, UNET, whole, {**values, **made}),
            "denoiser.tgate": lambda: run(full, tgate, gated, {**values, **made}),
            "denoiser.deepcache": lambda: run(full, deepcache, deep, {**values, **made}),
            "residuals": lambda: run(full, RESIDUALS, residuals, values),
            "residuals.deepcache": lambda: run(full, shallow_residuals, shallow, values),
            "hint": lambda: run(full, HINT, hint, values),
        },
        runs=args.runs,
    )
    return {name: [t.median, t.low, t.high] for name, t in timings.items()}


def bank_arrays(opened: Any, engine: Any) -> dict[str, Any]:
    from stepforge.runtime.engine.adapters import Adapters

    return dict(Adapters(opened, engine).banks(UNET) or {})


def lossless(args: argparse.Namespace) -> dict[str, Any]:
    """The plain denoiser, and copies of its graph that take what does not change between steps as inputs."""
    import onnx_ir as ir
    import openvino
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    folder = args.work / "bundle/denoiser/unet"
    core = openvino.Core()
    hint = {"fp32": "f32", "bf16": "bf16"}[args.one.split()[2]]
    runs, values = {}, inputs(args.size)
    # twice the same, first and last: what is opened first may lie otherwise in memory
    keys, times = (".attn2.to_k.", ".attn2.to_v."), (".time_emb_proj.",)
    cuts = {"computed": (), "keys and values given": keys, "time embeddings given": times,
            "both given": keys + times, "computed, opened last": ()}  # fmt: skip
    for label, marks in cuts.items():
        model = ir.load(folder / "model.onnx")
        given = dict(values)
        for node in list(model.graph):
            weight = node.inputs[1].name if len(node.inputs) > 1 and node.inputs[1] is not None else None
            if weight and any(mark in weight for mark in marks) and node.op_type in ("MatMul", "Gemm"):
                out = node.outputs[0]
                new = ir.Value(name=f"given_{len(given)}", type=ir.TensorType(ir.DataType.FLOAT))
                width = node.inputs[1].shape[1 if node.op_type == "MatMul" else 0]
                shape = (2, 77, width) if node.op_type == "MatMul" else (2, width)
                new.shape = ir.Shape(["rows", *shape[1:]])
                given[new.name] = np.random.RandomState(0).standard_normal(shape).astype(np.float32)
                model.graph.inputs.append(new)
                for use in list(out.uses()):
                    use.node.replace_input_with(use.idx, new)
        RemoveUnusedNodesPass()(model)
        for value in [value for value in model.graph.inputs if not value.uses()]:
            model.graph.inputs.remove(value)
            given.pop(value.name)
        path = folder / "lossless.onnx"
        ir.save(model, path)
        request = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": hint}).create_infer_request()
        path.unlink()
        runs[label] = lambda request=request, given=given: request.infer(given, share_inputs=True, share_outputs=True)
    return {name: [t.median, t.low, t.high] for name, t in interleaved(runs, runs=args.runs).items()}


def adapter(work: Path) -> Path:
    return work / f"adapter-transformer-{RANK}.safetensors"


def bundle(work: Path) -> Path:
    return work / "bundle-control"


def prepare_control(work: Path) -> None:
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    prepare(work)
    if not (work / "control/config.json").exists():
        torch.manual_seed(1)
        unet = UNet2DConditionModel.from_pretrained(work / "model/unet", local_files_only=True)
        net = ControlNetModel.from_unet(unet)
        with torch.no_grad():  # fresh ones are zero
            for layer in (
                *net.controlnet_down_blocks,
                net.controlnet_mid_block,
                net.controlnet_cond_embedding.conv_out,
            ):
                layer.weight.normal_(std=0.01)
        net.save_pretrained(work / "control")
    if not adapter(work).exists():
        write_adapter(work / "bundle", adapter(work), RANK, "transformer", 0)
    if not (bundle(work) / "bundle.json").exists():
        options = ["--control", f"net={work / 'control'}", "--reuse", "tgate", "--reuse", "deepcache"]
        lora = ["--lora-slots", "2", "--lora-rank", str(RANK), "--lora-targets", "transformer"]
        command = [
            sys.executable,
            "-m",
            "stepforge.runtime",
            "export",
            work / "model",
            "-o",
            bundle(work),
            *options,
            *lora,
        ]
        subprocess.run(list(map(str, command)), check=True)


TASKS = {"pass": passes, "image": our_images, "lossless": lossless}


def child(task: str, runner: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [
        sys.executable, __file__, "--task", task, "--one", runner, "--work", args.work, "--size", args.size,
        "--steps", args.steps, "--runs", args.runs, "--images", args.images,
    ]  # fmt: skip
    output = subprocess.check_output(list(map(str, command)), env={**os.environ, "HF_HUB_OFFLINE": "1"}, text=True)
    print(f"  measured {task}: {runner}", file=sys.stderr)
    return json.loads(output.splitlines()[-1])


def show_images(reports: dict[str, dict[str, Any]], work: Path, peers: list[str]) -> None:
    base = reports[peers[0]]["image"][0]
    truth = np.load(work / f"image-{peers[0].replace(' ', '-')}.npy")
    for runner, report in reports.items():
        path = work / f"image-{runner.replace(' ', '-')}.npy"
        quality = 10 * np.log10(1 / max(float(np.mean((np.load(path) - truth) ** 2)), 1e-12))
        plans = {"": report} if runner in peers else {k: v for k, v in report.items() if isinstance(v, dict)}
        full = plans.get("same semantics", {})
        for name, values in plans.items():
            same = f"{min(quality, 120.0):6.1f} dB" if name in ("", "same semantics") else ""
            rows = ", ".join(f"{k} {n}" for k, n in values.get("rows", {}).items() if "unet" in k or "control/net" in k)
            if values is not full and values.get("rows", {}).keys() == full.get("rows", {}).keys() and full:
                saved = 1 - values["denoise"] / full["denoise"], 1 - values["rows"]["unet"] / full["rows"]["unet"]
                rows += f"; {100 * saved[0]:.1f} % of the denoising seconds saved, {100 * saved[1]:.1f} % of the denoiser rows"
            print(
                f"  {runner:26}{name:34}{Timing(*values['image'])!s:28}{base / values['image'][0]:5.2f}x  {same:10}{rows}"
            )
        print(f"  {runner:26}peak {report['peak_gb']:.1f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="*", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument("--runners", nargs="*", default=["stepforge openvino bf16"])
    parser.add_argument(
        "--peers", nargs="*", default=["diffusers fp32", "diffusers bf16"], help="the first is the base"
    )
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=5, help="counted passes")
    parser.add_argument("--images", type=int, default=2, help="counted images")
    parser.add_argument(
        "--work", type=Path, help="folder for the model and its bundles, kept; default: a temporary one"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        report = diffusers_image(args) if args.one.startswith("diffusers") else TASKS[args.task[0]](args)
        print(json.dumps({**report, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2}))
        return
    with tempfile.TemporaryDirectory() as temporary:
        args.work = args.work or Path(temporary)
        args.work.mkdir(parents=True, exist_ok=True)
        prepare_control(args.work)
        print(machine())
        print(f"SD1.5-shaped UNet and ControlNet, LoRA of rank {RANK}, random weights, {args.size}x{args.size} pixels")
        for task in (task for task in args.task if task != "image"):
            for runner in args.runners:
                print(f"\n{task}, 2 rows, {runner}")
                found = {
                    name: Timing(*values) for name, values in child(task, runner, args).items() if name != "peak_gb"
                }
                first = next(iter(found.values())).median
                for name, timing in found.items():
                    print(f"  {name:30}{timing!s:28}{timing.median / first:6.3f}")
        if "image" in args.task:
            print(f"\nimage, {args.steps} steps, guidance 7.5, one ControlNet, one LoRA (PSNR to {args.peers[0]})")
            reports = {runner: child("image", runner, args) for runner in (*args.peers, *args.runners)}
            show_images(reports, args.work, args.peers)


if __name__ == "__main__":
    main()
