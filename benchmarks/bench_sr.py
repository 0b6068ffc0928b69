"""Time and memory of super-resolution and of large decodes, against diffusers and spandrel: `python benchmarks/bench_sr.py`.

    x4        SD x4 upscaler, 128² -> 512², its published shapes, --steps steps without guidance (one row a step)
    network   an ESRGAN of 23 blocks and 64 channels (Real-ESRGAN x4plus), 128² -> 512²
    vae       SDXL's VAE decoder, 1024², whole
    tiles     the same in tiles: `diffusers`, of 64 latents a side, by both; stepforge's `even` within --budget
    seams     what tiled decodes differ from whole ones, of the demo's VAE, which is trained: 512² pictures of 64 emoji and of
              one emoji on a plain background; error in 8-bit levels, and its jump from one column to the next

Random weights but for `seams`, CPU, precision as the runner says. Each runner is a process of its own, whose peak has
libraries and weights in it. Times are of one call after one of the same shape that is not counted, or of the only call with
--cold; `processor seconds` are those of all threads, which other work on the machine hardly changes. `--work` keeps models and
bundles (`--prepare` makes them and stops); `--task` runs parts of it. With `--work` and `--out` a run that was interrupted goes
on: each runner's figures are written when it ends, and not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from harness import machine

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "examples/emoji/model"  # a bundle needs a base model; stages and decoders measured here do not run it
LOW, LATENTS = 128, 128  # side of the low-resolution picture, and of the latents of 1024 pixels
SEAMS = 128  # side of the latents of `seams`, 512 pixels
PROMPT = "a photograph of a cat sitting on a wooden table"
RUNNERS = {
    "x4": ("diffusers fp32", "stepforge openvino fp32"),
    "network": ("spandrel fp32", "stepforge openvino fp32"),
    "vae": ("diffusers fp32", "stepforge openvino fp32"),
    "tiles": ("diffusers fp32", "stepforge openvino fp32 diffusers", "stepforge openvino fp32 even"),
}
X4_UNET = {
    "sample_size": 128,
    "in_channels": 7,
    "block_out_channels": (256, 512, 512, 1024),
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
    "only_cross_attention": (True, True, True, False),
    "attention_head_dim": 8,
    "cross_attention_dim": 1024,
    "num_class_embeds": 1000,
    "use_linear_projection": True,
}


def picture() -> np.ndarray:
    """uint8 [128, 128, 3]: random shades, smooth enough to be a picture."""
    from PIL import Image

    coarse = np.random.RandomState(0).randint(0, 256, (16, 16, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((LOW, LOW), Image.Resampling.BICUBIC))


def latents() -> np.ndarray:
    return np.random.RandomState(0).standard_normal((4, LATENTS, LATENTS)).astype(np.float32)


def save_x4(folder: Path) -> None:
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
    from random_models import network, text_encoder, tokenizer

    def vae() -> AutoencoderKL:
        return AutoencoderKL(
            block_out_channels=(128, 256, 512), layers_per_block=2, latent_channels=4, sample_size=256,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            scaling_factor=0.08333,
        )  # fmt: skip

    torch.manual_seed(0)
    betas = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
    parts = {
        "unet": network(folder / "unet", lambda: UNet2DConditionModel(**X4_UNET), torch.float32),
        "vae": network(folder / "vae", vae, torch.float32),
        "text_encoder": network(
            folder / "text_encoder", lambda: text_encoder(1024, 23, 16, "gelu", None), torch.float32
        ),
        "scheduler": DDIMScheduler(
            **betas, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        "low_res_scheduler": DDPMScheduler(**betas),
    }
    for name in ("scheduler", "low_res_scheduler"):
        parts[name].save_pretrained(folder / name)
    tokenizer(folder / "tokenizer")
    index = {name: [type(part).__module__.split(".")[0], type(part).__name__] for name, part in parts.items()}
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"], "watermarker": [None, None]}
    named = {"_class_name": "StableDiffusionUpscalePipeline", "max_noise_level": 350, **index}
    (folder / "model_index.json").write_text(json.dumps(named))


def save_network(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from stepforge.export.models.pixel.feedforward import spandrel

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    network = spandrel().architectures.ESRGAN.ESRGAN(num_filters=64, num_blocks=23, scale=4)
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    save_file(state, folder / "net.safetensors")


def save_vae(folder: Path) -> None:
    """The base model with SDXL's VAE in the place of its own; its latents are never drawn."""
    import torch
    from random_models import FAMILIES, network, vae

    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("vae"))
    torch.manual_seed(0)
    # sample_size: diffusers' tiles have sample_size / 8 latents a side, and of 1024 pixels none would be made
    options = {**FAMILIES["sdxl"]["vae"], "sample_size": 512}
    network(folder / "vae", lambda: vae(**options), torch.float32)


MODELS: dict[str, Callable[[Path], None]] = {"x4": save_x4, "network": save_network, "vae": save_vae}


def prepare(task: str, work: Path) -> None:
    """Model and bundle of a task, unless they are there."""
    name = "vae" if task == "tiles" else task
    folder, bundle = work / name, work / f"{name}.bundle"
    if name in MODELS and not folder.exists():
        partial = work / f"{name}.part"
        shutil.rmtree(partial, ignore_errors=True)
        MODELS[name](partial)
        partial.rename(folder)
    if not (bundle / "bundle.json").exists():
        model = folder if name == "vae" else BASE
        stage = {"x4": ["--sr", f"x4={folder}"], "network": ["--sr", f"network={folder / 'net.safetensors'}"]}
        command = [sys.executable, "-m", "stepforge.runtime", "export", model, "-o", bundle, *stage.get(name, [])]
        subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr)


def diffusers_x4(args: argparse.Namespace) -> Callable[[], np.ndarray]:
    import torch
    from diffusers import StableDiffusionUpscalePipeline
    from PIL import Image

    pipeline = StableDiffusionUpscalePipeline.from_pretrained(
        args.work / "x4", dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    image = Image.fromarray(picture())

    def run() -> np.ndarray:
        made = pipeline(
            PROMPT, image=image, num_inference_steps=args.steps, guidance_scale=1.0, noise_level=20,
            generator=torch.Generator().manual_seed(0), output_type="np",
        )  # fmt: skip
        return made.images[0]

    return run


def spandrel_network(args: argparse.Namespace) -> Callable[[], np.ndarray]:
    import torch

    from stepforge.export.models.pixel.feedforward import read_feed_forward

    network = read_feed_forward(args.work / "network/net.safetensors").load(torch.float32)
    image = torch.from_numpy(picture().copy()).permute(2, 0, 1)[None].float() / 255

    def run() -> np.ndarray:
        with torch.no_grad():
            return network(image)[0].permute(1, 2, 0).numpy()

    return run


def our_stage(stage: str, args: argparse.Namespace) -> Callable[[], np.ndarray]:
    from PIL import Image

    from stepforge import load

    _, backend, precision = args.one.split()[:3]
    engine = load(args.work / f"{stage}.bundle", backend=backend, precision=precision)
    options = {"steps": args.steps, "noise_level": 20, "guidance": 1.0} if stage == "x4" else {}
    image = Image.fromarray(picture())

    def run() -> np.ndarray:
        return np.asarray(engine.upscale(image, stage, prompt=PROMPT, seed=0, **options).images[0], np.float32) / 255

    return run


def diffusers_vae(args: argparse.Namespace) -> Callable[[], np.ndarray]:
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(args.work / "vae/vae", dtype=torch.float32)
    if args.task == ["tiles"]:
        vae.enable_tiling()
    given = torch.from_numpy(latents()[None]) / vae.config.scaling_factor

    def run() -> np.ndarray:
        with torch.no_grad():
            return vae.decode(given).sample[0].numpy()

    return run


def pictures(bundle: Path, backend: str, precision: str, tiling: Any) -> Any:
    from stepforge import open_bundle
    from stepforge.runtime.backends import open_backend
    from stepforge.runtime.engine.pictures.networks import Pictures

    opened = open_bundle(bundle, check=False)
    return Pictures(opened, open_backend(backend, opened, precision=precision), tiling)


def our_vae(args: argparse.Namespace) -> Callable[[], np.ndarray]:
    from stepforge.runtime.engine.pictures.networks import Tiling

    _, backend, precision, *kind = args.one.split()
    tiling = {"even": Tiling(args.budget), "diffusers": Tiling(kind="diffusers")}
    networks = pictures(args.work / "vae.bundle", backend, precision, tiling[kind[0]] if kind else Tiling())
    return lambda: networks.decode(latents())


def emoji_pictures() -> dict[str, np.ndarray]:
    """float32 [3, 512, 512] in -1..1."""
    sys.path.append(str(ROOT / "examples/emoji"))
    from data import BACKGROUNDS, SIZE, gallery, render

    count = 4 * SEAMS // SIZE
    some = gallery()[:: len(gallery()) // count**2][: count**2].reshape(count, count, SIZE, SIZE, 3)
    one = render(0x1F419, BACKGROUNDS["yellow"], size=4 * SEAMS)
    drawn = {"64 emoji": some.swapaxes(1, 2).reshape(4 * SEAMS, 4 * SEAMS, 3), "one emoji": one}
    return {name: (picture.transpose(2, 0, 1) / 127.5 - 1).astype(np.float32) for name, picture in drawn.items()}


def seams(work: Path) -> dict[str, dict[str, float]]:
    from stepforge.runtime.engine.pictures.networks import Tiling
    from stepforge.runtime.engine.pictures.tiles import Ratio, Tile, as_diffusers, even

    networks = pictures(work / "seams.bundle", "openvino", "fp32", Tiling())
    scale = np.float32(json.loads((BASE / "vae/config.json").read_text())["scaling_factor"])
    report = {}
    for name, picture in emoji_pictures().items():
        given = scale * networks.encode(picture)[:4]  # the posterior's mean
        whole = networks.decode(given)
        lost = np.mean((whole - picture) ** 2) * 127.5**2
        report[f"{name}, whole, to the picture itself"] = {"PSNR, dB": round(float(10 * np.log10(255**2 / lost)), 1)}
        for side in (48, 64, 96):
            overlap, ratio = max(16, side // 4), Ratio(up=4)
            for kind, tiled in (
                ("even", even(networks.decode, given, Tile(side, side, overlap), ratio)),
                ("diffusers", as_diffusers(networks.decode, given, side, ratio)),
            ):
                error = (tiled - whole) * 127.5
                jumps = np.abs(np.diff(error, axis=2)).mean((0, 1))
                report[f"{name}, {kind}, tiles of {side}"] = {
                    "PSNR, dB": round(float(10 * np.log10(255**2 / np.mean(error**2))), 1),
                    "mean error": round(float(np.abs(error).mean()), 3),
                    "largest": round(float(np.abs(error).max()), 1),
                    "mean jump": round(float(jumps.mean()), 4),
                    "of the worst column": round(float(jumps.max()), 4),
                }
    return report


def measure(args: argparse.Namespace) -> None:
    """One runner of one task in this process: its seconds and peak, and its picture beside the model for PSNR."""
    (task,) = args.task
    if args.one.startswith("stepforge"):
        run = our_vae(args) if task in ("vae", "tiles") else our_stage(task, args)
    else:
        run = {"x4": diffusers_x4, "network": spandrel_network, "vae": diffusers_vae, "tiles": diffusers_vae}[task](
            args
        )
    if not args.cold:
        run()
    started, worked = time.perf_counter(), time.process_time()
    made = run()
    seconds, worked = time.perf_counter() - started, time.process_time() - worked
    np.save(args.work / f"{task}-{args.one.replace(' ', '-')}.npy", made)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(
        json.dumps({"seconds": round(seconds, 2), "processor seconds": round(worked, 2), "peak, GiB": round(peak, 2)})
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="*", choices=(*RUNNERS, "seams"), default=[*RUNNERS, "seams"])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--budget", type=int, default=1 << 30, help="bytes of `even` tiles")
    parser.add_argument("--cold", action="store_true", help="count the first call, and make no other")
    parser.add_argument("--prepare", action="store_true", help="make models and bundles of the tasks, measure nothing")
    parser.add_argument("--work", type=Path, help="folder for models and bundles, kept; default: a temporary one")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON, beside those of other tasks in it")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(args)
        return
    report = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        args.work = args.work or Path(temporary)
        args.work.mkdir(parents=True, exist_ok=True)
        for task in args.task:
            prepare(task, args.work)
            if args.prepare:
                continue
            entry = report.setdefault(task, {})
            for _ in filled(task, entry, args):
                entry["machine"] = machine()
                if args.out:
                    args.out.write_text(json.dumps(report, indent=1) + "\n")
            print(json.dumps({task: entry}, indent=1), flush=True)


def filled(task: str, entry: dict[str, Any], args: argparse.Namespace) -> Iterator[None]:
    """Add to `entry` what it lacks, one runner after the other; PSNR is to the first, of a range of 2 where pictures are
    -1..1."""
    if task == "seams":
        entry |= {} if entry else seams(args.work)
        yield
        return
    entry |= {"steps": args.steps} if task == "x4" else {}
    entry |= {"budget, GiB": args.budget / 2**30} if task == "tiles" else {}
    files = []
    for runner in RUNNERS[task]:
        file = args.work / f"{task}-{runner.replace(' ', '-')}.npy"
        if runner in entry and file.exists():
            files.append(np.load(file))
            continue
        command = [sys.executable, __file__, "--task", task, "--one", runner, "--work", args.work, "--steps", args.steps,
                   "--budget", args.budget, *["--cold"] * args.cold]  # fmt: skip
        output = subprocess.check_output(list(map(str, command)), env={**os.environ, "HF_HUB_OFFLINE": "1"}, text=True)
        entry[runner] = json.loads(output.splitlines()[-1])
        files.append(np.load(file))
        error = float(np.mean((files[-1] - files[0]) ** 2))
        span = 1.0 if task in ("x4", "network") else 2.0
        entry[runner]["PSNR to the first, dB"] = round(10 * np.log10(span**2 / max(error, 1e-12)), 1)
        yield


if __name__ == "__main__":
    main()
