"""What the demo ControlNet does: `python benchmarks/control_quality.py out/emoji.bundle`.

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

from stepforge import Engine, Request, load

sys.path.append(str(ROOT / "examples" / "emoji"))
from data import BACKGROUNDS, Picture, emoji, gallery, pictures
from warps import TRAINED_SHAPES, UNSEEN_SHAPES, Warp, composite, plain_hint, warp

FAR = 40.0  # Euclidean distance in RGB, of 255
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


def draw(asks: list[Ask], engine: Engine) -> np.ndarray:
    """uint8 [n, 64, 64, 3]. Scale 0 runs without the ControlNet."""
    requests = [
        Request(
            prompt=ask.picture.caption,
            seed=ask.seed,
            steps=20,
            sampler="ddim",
            guidance=3.0,
            controls=({"name": "silhouette", "image": ask.hint, "scale": ask.scale},),
        )
        for ask in asks
    ]
    return np.stack([np.asarray(result.images[0]) for result in engine.generate(requests)])


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


def reconstruct(images: np.ndarray) -> np.ndarray:
    """Through the autoencoder alone."""
    import torch
    from diffusers import AutoencoderKL

    vae, out = AutoencoderKL.from_pretrained(MODEL / "vae", local_files_only=True).float().eval(), []
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


def report(asks: list[Ask], engine: Engine) -> dict[str, dict]:
    images = draw(asks, engine)
    by_shape = {
        shape: round(float(iou(images, asks)[[ask.shape == shape for ask in asks]].mean()), 3)
        for shape in dict.fromkeys(ask.shape for ask in asks)
    }
    return {
        "with": score(images, asks) | {"IoU by shape": by_shape},
        "without": score(draw([replace(ask, scale=0.0) for ask in asks], engine), asks),
        "ceiling": score(reconstruct(truth(asks)), asks),
    }


def sheet(path: Path, engine: Engine) -> None:
    """Hints across, prompts down; the first row and column are the hints, and the prompts without one."""
    shapes = list(SHAPES)
    names = [row.name for row in emoji()]
    asks = []
    for k, name in enumerate(SHEET):
        picture = Picture(names.index(name), COLOURS[(3 * k + 6) % len(COLOURS)], held_out=False)
        asks.append([Ask(picture, shape, 40 + k) for shape in shapes])
    alone = draw([replace(row[0], scale=0.0) for row in asks], engine)
    drawn = draw([ask for row in asks for ask in row], engine).reshape(len(asks), len(shapes), 64, 64, 3)
    top = [np.zeros((64, 64, 3), np.uint8), *(ask.hint for ask in asks[0])]
    rows = [np.concatenate([first, *row], 1) for first, row in zip(alone, drawn, strict=True)]
    picture = Image.fromarray(np.concatenate([np.concatenate(top, 1), *rows]))
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="the demo model with its ControlNet, as `make demo` exports it")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument(
        "--count", type=int, default=257, help="held-out pairs in unseen shapes; half as many in trained ones"
    )
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--sheet", type=Path, help="write a picture: prompts down, hints across")
    args = parser.parse_args()

    with load(args.bundle, precision=args.precision) as engine:
        if args.count:
            figures = {
                "backend": f"{engine.backend.name} {engine.backend.precision}",
                "steps": 20,
                "guidance": 3,
                "scale": 1.0,
                "unseen shapes": report(choose(list(UNSEEN_SHAPES), args.count, 17), engine),
                "trained shapes": report(choose(list(TRAINED_SHAPES), args.count // 2, 18), engine),
                "machine": machine(),
            }
            print(json.dumps(figures, indent=1))
            if args.out:
                args.out.write_text(json.dumps(figures, indent=1) + "\n")
        if args.sheet:
            sheet(args.sheet, engine)


if __name__ == "__main__":
    main()
