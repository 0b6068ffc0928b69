"""What the demo's SR network gains over bicubic on emoji that its training never saw: `python benchmarks/emoji_sr.py`.

Pictures: the 33 emoji of `sr_data.HELD_OUT`, each on two backgrounds, 64 px. `clean` are Lanczos downscales of the font's
bitmap; `decoded` have passed the autoencoder; `melted` were noised to timestep 240 and denoised by the demo model with their
caption, which is nearest to what the stage is for. The target is the 128-px picture of the same bitmap at the places that
align_corners upsampling puts pixels (sr_data.py); `bicubic` is torch's, align_corners too.

psnr: mean over pictures, dB, of RGB in 8 bits. gmsd: gradient magnitude similarity deviation (arXiv 1308.3052), 0 is
equal; computed on luma, without the halving that the paper puts first, since the detail in question has a width of two
pixels. sharpness: mean gradient magnitude over that of the target, 1 is as crisp. PSNR is the right judge of `clean` and
`decoded`. Of `melted` it is not: strokes are displaced, where a crisp one costs more than a smear (a mean of
positions); sharpness and gmsd are stated beside it.

subject: the DreamBooth fine-tune (train_sr_subject.py) against the network itself, on the subject in ten poses and on
backgrounds that the fine-tune never saw, as drawn and as the demo's decoder draws them at best; and what the fine-tune costs
on the held-out emoji. `--subject-sheet`: nearest, bicubic, SR, fine-tuned SR, target.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from emoji_quality import ROOT
from harness import machine
from PIL import Image

sys.path.append(str(ROOT / "examples" / "emoji"))
import sr
from data import BACKGROUNDS, emoji
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from sr_data import HELD_OUT, canvas, pair
from sr_pool import round_trip, to_uint8
from subject import TRAINING, Pose
from train_sr_subject import adapted, drawing, redrawn
from train_vae import to_tensor

MODEL = ROOT / "examples/emoji/model"
FOLDER = ROOT / "examples/emoji/sr"
ADAPTER = ROOT / "examples/emoji/adapters/subject_sr"
MELT_STEPS = 3
SUBJECT_NOISE = 5  # level of the fine-tuned network: variance 3e-4


def held_out_pictures(per_emoji: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Captions, 64-px pictures, 128-px targets."""
    random = np.random.RandomState(17)
    names = {row.code_point: row.name for row in emoji()}
    captions, pairs = [], []
    for point in HELD_OUT:
        for colour in random.choice(list(BACKGROUNDS), per_emoji, replace=False):
            captions.append(f"{names[point]} on a {colour} background")
            pairs.append(pair(canvas(point, BACKGROUNDS[colour])))
    return captions, np.stack([low for low, _ in pairs]), np.stack([high for _, high in pairs])


@cache
def demo_model() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None, dtype=torch.float32)


def low_res_sets(captions: list[str], low: np.ndarray) -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    pipe = demo_model()
    return {
        "clean": low,
        "decoded": round_trip(pipe, low, None, 0),
        "melted": round_trip(pipe, low, captions, MELT_STEPS),
    }


def bicubic(low: np.ndarray) -> np.ndarray:
    return to_uint8(F.interpolate(to_tensor(low), scale_factor=2, mode="bicubic", align_corners=True))


def upscale(unet: UNet2DConditionModel, low: np.ndarray, steps: int, noise_level: int) -> np.ndarray:
    chunks = to_tensor(low).split(22)
    return np.concatenate(
        [
            to_uint8(sr.upscale(unet, chunk, steps=steps, noise_level=noise_level, seed=i))
            for i, chunk in enumerate(chunks)
        ]
    )


def unseen_subject() -> tuple[np.ndarray, np.ndarray]:
    """The upright pose and a drawn one on each of the five backgrounds that training does not have, at 64 and at 128 px."""
    random = np.random.RandomState(23)
    pairs = []
    for background in sorted(set(BACKGROUNDS) - {background for background, _ in TRAINING}):
        tilt, spread = random.uniform(-12, 12, 2)
        pose = Pose(
            tilt=tilt, scale=random.uniform(0.88, 1.04), look=tuple(random.uniform(-0.8, 0.8, 2)), spread=spread
        )
        pairs += [drawing(background), drawing(background, pose)]
    return np.stack([low for low, _ in pairs]), np.stack([high for _, high in pairs])


def subject_report(networks: dict[str, UNet2DConditionModel], low: np.ndarray, target: np.ndarray, steps: int) -> dict:
    """`low` and `target` are the held-out emoji."""
    drawn, wanted = unseen_subject()
    report: dict = {"pictures": len(drawn), "noise level": SUBJECT_NOISE}
    for name, pictures in {"drawn": drawn, "decoded": redrawn(MODEL, drawn)}.items():
        report[name] = {"bicubic": score(bicubic(pictures), wanted)}
        for network, unet in networks.items():
            report[name][network] = score(upscale(unet, pictures, steps, SUBJECT_NOISE), wanted)
    some = slice(None, None, 2)
    report["held-out emoji, clean"] = {
        network: score(upscale(unet, low[some], steps, SUBJECT_NOISE), target[some])
        for network, unet in networks.items()
    }
    return report


def psnr(image: np.ndarray, target: np.ndarray) -> np.ndarray:
    error = (image.astype(np.float64) - target).reshape(len(image), -1)
    return 10 * np.log10(255**2 / np.maximum((error**2).mean(1), 1e-9))


def gradient_magnitude(image: np.ndarray) -> np.ndarray:
    """Prewitt, of luma in 0..255: [n, h-2, w-2]."""
    luma = image.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    rows = luma[:, :-2] + luma[:, 1:-1] + luma[:, 2:]
    columns = luma[:, :, :-2] + luma[:, :, 1:-1] + luma[:, :, 2:]
    across, down = rows[:, :, 2:] - rows[:, :, :-2], columns[:, 2:] - columns[:, :-2]
    return np.hypot(across, down) / 3


def gmsd(image: np.ndarray, target: np.ndarray) -> np.ndarray:
    a, b = gradient_magnitude(image), gradient_magnitude(target)
    similarity = (2 * a * b + 170) / (a**2 + b**2 + 170)
    return similarity.reshape(len(image), -1).std(1)


def score(image: np.ndarray, target: np.ndarray) -> dict[str, float]:
    sharpness = gradient_magnitude(image).mean() / gradient_magnitude(target).mean()
    return {
        "psnr": round(float(psnr(image, target).mean()), 2),
        "gmsd": round(float(gmsd(image, target).mean()), 4),
        "sharpness": round(float(sharpness), 3),
    }


def compare(unet: UNet2DConditionModel, low: np.ndarray, target: np.ndarray, steps: int, noise_level: int) -> dict:
    smooth, ours = bicubic(low), upscale(unet, low, steps, noise_level)
    gain = psnr(ours, target) - psnr(smooth, target)
    return {
        "bicubic": score(smooth, target),
        "sr": score(ours, target),
        "gain, dB": round(float(gain.mean()), 2),
        "pictures better than bicubic": f"{int((gain > 0).sum())} of {len(gain)}",
    }


def sheet(
    path: Path, networks: list[UNet2DConditionModel], low: np.ndarray, target: np.ndarray, steps: int, level: int
) -> None:
    """Columns: nearest, bicubic, each network, target; one picture a row, twice as large."""
    nearest = low.repeat(2, 1).repeat(2, 2)
    columns = [nearest, bicubic(low), *(upscale(unet, low, steps, level) for unet in networks), target]
    picture = Image.fromarray(np.concatenate([np.concatenate(list(column)) for column in columns], 1))
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--per-emoji", type=int, default=2, help="backgrounds of each emoji")
    parser.add_argument("--stride", type=int, default=1, help="every how many of the pictures")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--noise-level", type=int, default=0)
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="the subject's")
    parser.add_argument("--ablation", type=Path, help="a subject's adapter trained at pretraining's noise level")
    parser.add_argument("--sweep", action="store_true", help="steps and noise levels on a quarter of the pictures")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--sheet", type=Path, help="write a picture: nearest, bicubic, SR, target")
    parser.add_argument("--subject-sheet", type=Path, help="the same of the subject, with the fine-tuned network")
    args = parser.parse_args()

    captions, low, target = held_out_pictures(args.per_emoji)
    captions, low, target = captions[:: args.stride], low[:: args.stride], target[:: args.stride]
    sets, unet = low_res_sets(captions, low), sr.load(args.model)
    report: dict = {
        "held out": " ".join(f"{point:X}" for point in HELD_OUT),
        "pictures": len(low),
        "steps": args.steps,
        "noise level": args.noise_level,
    }
    started = time.perf_counter()
    for name, pictures in sets.items():
        report[name] = compare(unet, pictures, target, args.steps, args.noise_level)
    report["seconds a picture"] = round((time.perf_counter() - started) / 3 / len(low), 2)
    if args.sweep:
        some = slice(None, None, 4)
        settings = [(steps, args.noise_level) for steps in (1, 2, 4, 8, 16)]
        settings += [(args.steps, level) for level in (0, 50, 100, 200)]
        report["sweep"] = [
            {"steps": steps, "noise level": level, "set": name}
            | score(upscale(unet, sets[name][some], steps, level), target[some])
            for steps, level in settings
            for name in ("decoded", "melted")
        ]
    if args.adapter.exists():
        networks = {"not fine-tuned": unet, "fine-tuned": adapted(args.model, args.adapter)}
        if args.ablation:
            networks["fine-tuned at pretraining's noise"] = adapted(args.model, args.ablation)
        report["subject"] = subject_report(networks, low, target, args.steps)
    report["machine"] = machine()
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    if args.sheet:
        some = range(1, len(low), len(low) // 8)
        shown = np.stack([sets[name][i] for i in some for name in ("clean", "melted")])
        sheet(args.sheet, [unet], shown, np.repeat(target[list(some)], 2, 0), args.steps, args.noise_level)
    if args.subject_sheet:
        drawn, wanted = (pictures[1::2] for pictures in unseen_subject())
        both = np.stack([drawn, redrawn(MODEL, drawn)], 1).reshape(-1, *drawn.shape[1:])
        tuned = [unet, adapted(args.model, args.adapter)]
        sheet(args.subject_sheet, tuned, both, np.repeat(wanted, 2, 0), args.steps, SUBJECT_NOISE)


if __name__ == "__main__":
    main()
