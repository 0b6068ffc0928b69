"""How often a generated emoji is the emoji that the prompt names: `python benchmarks/emoji_quality.py BUNDLE`.

Feature space: the picture box-averaged to 32x32 RGB, Euclidean distance. The gallery holds every emoji on every
background. top-1: the nearest gallery picture shows the prompted emoji; top-5: one of the five nearest distinct emoji.
Background: the median colour of the outer 3-pixel frame is nearest to the prompted background. `held out` are emoji and
background pairs that training never showed together. `autoencoder` scores the autoencoder's reconstruction of the
gallery: no diffusion model on top of it can be expected to do better.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from harness import machine
from PIL import Image

from stepforge import Request, load

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples" / "emoji"))
from data import BACKGROUNDS, Picture, emoji, gallery, pictures  # noqa: E402

COLOURS = np.array(list(BACKGROUNDS.values()), np.float32)


def features(images: np.ndarray) -> np.ndarray:
    """uint8 [n, 64, 64, 3] -> float32 [n, 32·32·3], each 2x2 block averaged."""
    blocks = images.astype(np.float32).reshape(len(images), 32, 2, 32, 2, 3)
    return blocks.mean((2, 4)).reshape(len(images), -1) / 255


def nearest_emoji(images: np.ndarray, top: int = 5) -> np.ndarray:
    """The `top` nearest distinct emoji of each image, [n, top]."""
    known = features(gallery())
    query = features(images)
    distance = (query**2).sum(1)[:, None] - 2 * query @ known.T + (known**2).sum(1)[None]
    per_emoji = distance.reshape(len(images), len(emoji()), len(BACKGROUNDS)).min(2)
    return per_emoji.argsort(1)[:, :top]


def background(images: np.ndarray) -> np.ndarray:
    """Index of the nearest background of each image."""
    frame = np.ones(images.shape[1:3], bool)
    frame[3:-3, 3:-3] = False
    colour = np.median(images[:, frame], axis=1)
    return ((colour[:, None] - COLOURS) ** 2).sum(2).argmin(1)


def score(images: np.ndarray, asked: list[Picture]) -> dict[str, float | int]:
    """Shares in percent."""
    wanted = np.array([picture.emoji for picture in asked])
    colours = np.array([list(BACKGROUNDS).index(picture.background) for picture in asked])
    found = nearest_emoji(images)
    return {
        "images": len(asked),
        "top1": round(100 * float((found[:, 0] == wanted).mean()), 1),
        "top5": round(100 * float((found == wanted[:, None]).any(1).mean()), 1),
        "background": round(100 * float((background(images) == colours).mean()), 1),
    }


def reconstruct(model: Path) -> np.ndarray:
    """The gallery through the autoencoder alone, uint8."""
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(model / "vae", local_files_only=True).float().eval()
    out = []
    with torch.no_grad():
        for chunk in np.array_split(gallery(), 40):
            pixels = torch.from_numpy(chunk).permute(0, 3, 1, 2).float() / 127.5 - 1
            decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
            out.append(((decoded.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy())
    return np.concatenate(out)


def choose(count: int) -> tuple[list[Picture], list[Picture]]:
    """`count` trained pairs in which every emoji appears, and every held-out pair."""
    random = np.random.RandomState(7)
    trained = [picture for picture in pictures() if not picture.held_out]
    by_emoji = [[picture for picture in trained if picture.emoji == index] for index in range(len(emoji()))]
    order = [index for _ in range(1 + count // len(emoji())) for index in random.permutation(len(emoji()))][:count]
    seen = [by_emoji[index][random.randint(len(by_emoji[index]))] for index in order]
    return seen, [picture for picture in pictures() if picture.held_out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--model", type=Path, default=ROOT / "examples/emoji/model", help="for the autoencoder alone")
    parser.add_argument("--prompts", type=int, default=320)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", default="3")
    parser.add_argument("--sampler")
    parser.add_argument("--experts", help="which denoiser runs when; default: the bundle's own")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--autoencoder", action=argparse.BooleanOptionalAction, default=True, help="score it too")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--sheet", type=Path, help="write a sheet of misses: asked on the left, drawn on the right")
    args = parser.parse_args()

    seen, held_out = choose(args.prompts)
    asked = [*seen, *held_out]
    with load(args.bundle, precision=args.precision) as engine:
        requests = [
            Request(
                prompt=p.caption,
                steps=args.steps,
                guidance=args.guidance,
                sampler=args.sampler,
                seed=1000 + i,
                experts=args.experts,
            )
            for i, p in enumerate(asked)
        ]
        results = engine.generate(requests)
    images = np.stack([np.asarray(result.images[0]) for result in results])
    report = {
        "bundle": results[0].digest,
        "steps": args.steps,
        "guidance": args.guidance,
        "sampler": args.sampler or "model's own",
        "experts": args.experts or "the bundle's own",
        "backend": f"{results[0].stats.backend} {results[0].stats.precision}",
        "trained pairs": score(images[: len(seen)], seen),
        "held-out pairs": score(images[len(seen) :], held_out),
        "machine": machine(),
    }
    if args.autoencoder:
        report["autoencoder"] = score(reconstruct(args.model), list(pictures()))
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    if args.sheet:
        found = nearest_emoji(images)[:, 0]
        misses = [i for i, picture in enumerate(asked) if found[i] != picture.emoji][:60]
        truth = dict(zip(((p.emoji, p.background) for p in pictures()), gallery(), strict=True))
        pairs = [np.concatenate([truth[asked[i].emoji, asked[i].background], images[i]], 1) for i in misses]
        pairs += [np.full((64, 128, 3), 255, np.uint8)] * (-len(pairs) % 6)
        if pairs:
            rows = [np.concatenate(pairs[i : i + 6], 1) for i in range(0, len(pairs), 6)]
            Image.fromarray(np.concatenate(rows)).save(args.sheet)


if __name__ == "__main__":
    main()
