"""What the demo ControlNet does: `python benchmarks/control_quality.py`.

A prompt and a plain shape, white on black, give a picture; 20 steps DDIM, guidance 3, ControlNet at scale 1. The emoji and
background pairs are those that no training saw, one picture each. `unseen shapes` are of kinds that the ControlNet's
training does not have, though a gear is near its flowers; `trained shapes` are of its families (`examples/emoji/warps.py`).

IoU: the picture's ink, pixels more than 40 of 255 in RGB from the median of its outer 3-pixel frame, against the hint.
`without` draws the same prompts and seeds at scale 0. `ceiling` is the autoencoder's reconstruction of the emoji pulled into
the shape: its outline does not fill the shape everywhere, and ink of the background's colour counts as background.
Recognition: feature space of emoji_quality.py, the nearest of all 257 emoji, pulled into the same shape, on ten backgrounds.
`in the shape`: the nearest of those is nearer than any emoji in its own shape.
`different prompts`: two pictures of the same hint and different prompts, both are taken for different emoji; of all pairs.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
from adapter_quality import MODEL, percent, squared_distances
from emoji_quality import ROOT, background
from harness import machine
from PIL import Image

sys.path.append(str(ROOT / "examples" / "emoji"))
from data import BACKGROUNDS, Picture, emoji, gallery, pictures
from warps import TRAINED_SHAPES, UNSEEN_SHAPES, Warp, composite, plain_hint, warp

CONTROL = ROOT / "examples/emoji/control/silhouette"
FAR = 40.0  # of 255, Euclidean in RGB
COLOURS = list(BACKGROUNDS)
SHAPES = TRAINED_SHAPES | UNSEEN_SHAPES
SHEET = ("cat face", "hamburger", "rocket", "pizza", "penguin", "crown", "cactus", "soccer ball")


@dataclass(frozen=True, slots=True)
class Ask:
    """One picture to draw."""

    picture: Picture
    shape: str
    seed: int
    scale: float = 1.0

    @property
    def hint(self) -> np.ndarray:
        return hint(self.shape)


@cache
def hint(shape: str) -> np.ndarray:
    return plain_hint(SHAPES[shape])


@cache
def pipeline(control: Path):
    import torch
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    pipe = StableDiffusionControlNetPipeline.from_pretrained(
        MODEL, controlnet=ControlNetModel.from_pretrained(control).float(), safety_checker=None, dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(asks: list[Ask], control: Path) -> np.ndarray:
    """uint8 [n, 64, 64, 3]; the asks share one scale."""
    import torch

    out = []
    for first in range(0, len(asks), 32):
        chunk = asks[first : first + 32]
        images = pipeline(control)(
            [ask.picture.caption for ask in chunk],
            image=[Image.fromarray(ask.hint) for ask in chunk],
            generator=[torch.Generator().manual_seed(ask.seed) for ask in chunk],
            controlnet_conditioning_scale=chunk[0].scale,
            num_inference_steps=20,
            guidance_scale=3.0,
            height=64,
            width=64,
            output_type="np",
        ).images
        out.append(images)
    return (np.concatenate(out) * 255).round().astype(np.uint8)


def ink_mask(images: np.ndarray) -> np.ndarray:
    """bool [n, 64, 64]: what is not the background."""
    frame = np.ones(images.shape[1:3], bool)
    frame[3:-3, 3:-3] = False
    colour = np.median(images[:, frame], axis=1)
    return ((images - colour[:, None, None]) ** 2).sum(-1) > FAR**2


def iou(images: np.ndarray, asks: list[Ask]) -> np.ndarray:
    drawn, wanted = ink_mask(images), np.stack([ask.hint[..., 0] > 127 for ask in asks])
    return (drawn & wanted).sum((1, 2)) / (drawn | wanted).sum((1, 2))


@cache
def pulled(shape: str) -> np.ndarray:
    """Every emoji in the shape on every background, uint8 [n · 10, 64, 64, 3], in the order of `pictures()`."""
    radii, aspect = SHAPES[shape]
    ink = warp([Warp(index, radii, aspect=aspect) for index in range(len(emoji()))])[0]
    return composite(ink.repeat_interleave(len(COLOURS), 0), COLOURS * len(emoji()))


def reconstruct(images: np.ndarray, control: Path) -> np.ndarray:
    """Through the autoencoder alone."""
    import torch

    vae, out = pipeline(control).vae, []
    with torch.no_grad():
        for chunk in torch.from_numpy(images).permute(0, 3, 1, 2).split(64):
            decoded = vae.decode(vae.encode(chunk.float() / 127.5 - 1).latent_dist.mode()).sample.clamp(-1, 1)
            out.append(((decoded.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy())
    return np.concatenate(out)


def score(images: np.ndarray, asks: list[Ask]) -> dict[str, float | int]:
    """Shares in percent, IoU as a share of 1."""
    found, inside = np.empty((len(asks), len(emoji())), int), np.empty(len(asks), bool)
    pairs, different = 0, 0
    for shape in sorted({ask.shape for ask in asks}):
        rows = [i for i, ask in enumerate(asks) if ask.shape == shape]
        distance = squared_distances(images[rows], pulled(shape)).reshape(len(rows), -1, len(COLOURS)).min(2)
        found[rows] = distance.argsort(1)
        inside[rows] = distance.min(1) < squared_distances(images[rows], gallery()).min(1)
        pairs += len(rows) * (len(rows) - 1) // 2
        different += sum(found[a, 0] != found[b, 0] for a, b in combinations(rows, 2))
    wanted = np.array([ask.picture.emoji for ask in asks])
    overlap = iou(images, asks)
    return {
        "images": len(asks),
        "IoU": round(float(overlap.mean()), 3),
        "IoU, lowest tenth below": round(float(np.quantile(overlap, 0.1)), 3),
        "top1": percent(found[:, 0] == wanted),
        "top5": percent((found[:, :5] == wanted[:, None]).any(1)),
        "in the shape": percent(inside),
        "background": percent(background(images) == [COLOURS.index(ask.picture.background) for ask in asks]),
        "different prompts": round(100 * different / pairs, 1),
    }


def choose(shapes: list[str], count: int, seed: int) -> list[Ask]:
    """`count` held-out pairs, each in one of the shapes, taken in turn."""
    held_out = [picture for picture in pictures() if picture.held_out]
    order = np.random.RandomState(seed).permutation(len(held_out))[:count]
    return [Ask(held_out[i], shapes[k % len(shapes)], 9000 + int(i)) for k, i in enumerate(order)]


def truth(asks: list[Ask]) -> np.ndarray:
    """The emoji itself pulled into the shape."""
    return np.stack(
        [pulled(a.shape)[a.picture.emoji * len(COLOURS) + COLOURS.index(a.picture.background)] for a in asks]
    )


def report(asks: list[Ask], control: Path) -> dict[str, dict]:
    images = draw(asks, control)
    by_shape = {
        shape: round(float(iou(images, asks)[[ask.shape == shape for ask in asks]].mean()), 3)
        for shape in dict.fromkeys(ask.shape for ask in asks)
    }
    return {
        "with": score(images, asks) | {"IoU by shape": by_shape},
        "without": score(draw([replace(ask, scale=0.0) for ask in asks], control), asks),
        "ceiling": score(reconstruct(truth(asks), control), asks),
    }


def sheet(path: Path, control: Path) -> None:
    """Hints across, prompts down; the first row and column are the hints, and the prompts without one."""
    shapes = list(SHAPES)
    names = [row.name for row in emoji()]
    asks = []
    for k, name in enumerate(SHEET):
        picture = Picture(names.index(name), COLOURS[(3 * k + 6) % len(COLOURS)], held_out=False)
        asks.append([Ask(picture, shape, 40 + k) for shape in shapes])
    alone = draw([replace(row[0], scale=0.0) for row in asks], control)
    drawn = draw([ask for row in asks for ask in row], control).reshape(len(asks), len(shapes), 64, 64, 3)
    top = [np.zeros((64, 64, 3), np.uint8), *(ask.hint for ask in asks[0])]
    rows = [np.concatenate([first, *row], 1) for first, row in zip(alone, drawn, strict=True)]
    picture = Image.fromarray(np.concatenate([np.concatenate(top, 1), *rows]))
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--control", type=Path, default=CONTROL, help="the ControlNet's folder")
    parser.add_argument(
        "--count", type=int, default=257, help="held-out pairs in unseen shapes; half as many in trained ones"
    )
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--sheet", type=Path, help="write a picture: prompts down, hints across")
    args = parser.parse_args()

    if args.count:
        figures = {
            "steps": 20,
            "guidance": 3,
            "scale": 1.0,
            "unseen shapes": report(choose(list(UNSEEN_SHAPES), args.count, 17), args.control),
            "trained shapes": report(choose(list(TRAINED_SHAPES), args.count // 2, 18), args.control),
            "machine": machine(),
        }
        print(json.dumps(figures, indent=1))
        if args.out:
            args.out.write_text(json.dumps(figures, indent=1) + "\n")
    if args.sheet:
        sheet(args.sheet, args.control)


if __name__ == "__main__":
    main()
