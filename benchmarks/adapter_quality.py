"""What the demo model's adapters do: `python benchmarks/adapter_quality.py`.

Feature space and nearest neighbours are those of emoji_quality.py. Pictures: 20 steps DDIM, guidance 3.

subject: share of "sks alien on a ... background" whose nearest picture, among every emoji and the upright subject on every
background, is the subject; `new backgrounds` are the five that its training pictures do not have. `without` is the base
model on the same prompts and seeds.
prior: with the subject's adapter on, "alien on a ... background" is still the alien; other prompts keep their top-1;
`held out` are those of emoji that the adapter's training did not show.
style: over emoji that the style's training never saw, the share of pictures nearer to the stylised gallery than to the
plain one, and the share whose nearest stylised picture is the prompted emoji. `targets` scores the autoencoder's
reconstruction of the stylised pictures themselves.
style on subject: both adapters at once; the subject, stylised, is nearest among it and the stylised gallery.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
from emoji_quality import ROOT, features, nearest_emoji
from harness import machine
from PIL import Image

sys.path.append(str(ROOT / "examples" / "emoji"))
import subject
from data import BACKGROUNDS, emoji, gallery, pictures
from styles import HELD_OUT, STYLES, stylised

MODEL = ROOT / "examples/emoji/model"
ADAPTERS = ROOT / "examples/emoji/adapters"
FILES = {
    "thermal": ADAPTERS / "thermal",
    "poster": ADAPTERS / "poster" / "pytorch_lora_weights.safetensors",
    "subject": ADAPTERS / "subject.safetensors",
}
SHEET = ("fox face", "hamburger", "rocket", "sailboat", "guitar", "crown")
COLUMNS: tuple[dict[str, float], ...] = ({}, *({style: 1.0} for style in STYLES), {"subject": 1.0})


@cache
def pipeline(files: tuple[tuple[str, Path], ...]):
    """diffusers' pipeline with every adapter loaded, none of them active."""
    import torch
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file

    pipe = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for name, path in files:
        if path.is_dir():  # PEFT's layout
            config = json.loads((path / "adapter_config.json").read_text())
            state = load_file(path / "adapter_model.safetensors")
            state = {key.replace("base_model.model.", "unet."): value.float() for key, value in state.items()}
            metadata = {f"unet.{key}": config[key] for key in ("r", "lora_alpha", "target_modules")}
            pipe.load_lora_into_unet(state, None, pipe.unet, adapter_name=name, metadata=metadata)
        else:
            pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    return pipe


def draw(prompts: list[str], adapters: dict[str, float], seeds: list[int], files: dict = FILES) -> np.ndarray:
    """Pictures of the prompts with the named adapters at their strengths, uint8 [n, 64, 64, 3]."""
    import torch

    pipe = pipeline(tuple(files.items()))
    if adapters:
        pipe.enable_lora()
        pipe.set_adapters(list(adapters), list(adapters.values()))
    else:
        pipe.disable_lora()
    out = []
    for first in range(0, len(prompts), 32):
        chunk = slice(first, first + 32)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[chunk]]
        options = dict(num_inference_steps=20, guidance_scale=3.0, height=64, width=64, output_type="np")
        out.append(pipe(prompts[chunk], generator=generators, **options).images)
    return (np.concatenate(out) * 255).round().astype(np.uint8)


def squared_distances(images: np.ndarray, known: np.ndarray) -> np.ndarray:
    """[n, m] in feature space."""
    a, b = features(images), features(known)
    return (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)[None]


def percent(hits: np.ndarray) -> float:
    return round(100 * float(np.mean(hits)), 1)


def on_backgrounds(noun: str, rounds: int, first_seed: int) -> tuple[list[str], list[int]]:
    """`noun` on every background, `rounds` times, with seeds."""
    prompts = [f"{noun} on a {colour} background" for colour in BACKGROUNDS] * rounds
    return prompts, list(range(first_seed, first_seed + len(prompts)))


def is_subject(images: np.ndarray) -> np.ndarray:
    """Whether the upright subject on some background is nearer than any emoji on any."""
    renders = np.stack([subject.render(colour) for colour in BACKGROUNDS])
    return squared_distances(images, renders).min(1) < squared_distances(images, gallery()).min(1)


def subject_report(adapters: dict[str, float], files: dict[str, Path], rounds: int) -> dict:
    prompts, seeds = on_backgrounds(subject.NAME, rounds, 3000)
    found = is_subject(draw(prompts, adapters, seeds, files))
    trained = {background for background, _ in subject.TRAINING}
    new = np.array([colour not in trained for colour in BACKGROUNDS] * rounds)
    return {"images": len(prompts), "subject": percent(found), "subject, new backgrounds": percent(found[new])}


def prior_report(adapters: dict[str, float], files: dict[str, Path], rounds: int) -> dict:
    prompts, seeds = on_backgrounds(subject.CLASS, rounds, 4000)
    images = draw(prompts, adapters, seeds, files)
    wanted = [row.name for row in emoji()].index(subject.CLASS)
    report = {
        "class prompts": len(prompts),
        "class": percent(nearest_emoji(images)[:, 0] == wanted),
        "class drawn as the subject": percent(is_subject(images)),
    }
    random = np.random.RandomState(11)
    others = [row for row in pictures() if emoji()[row.emoji].name != subject.CLASS]
    asked = [others[i] for i in random.permutation(len(others))[: 50 * rounds]]
    images = draw([row.caption for row in asked], adapters, list(range(5000, 5000 + len(asked))), files)
    found = nearest_emoji(images)[:, 0] == [row.emoji for row in asked]
    apart = np.array([row.emoji in HELD_OUT for row in asked])
    return report | {
        "other prompts": len(asked),
        "other prompts, top-1": percent(found),
        "of them held out": int(apart.sum()),
        "held out, top-1": percent(found[apart]),
    }


def style_report(style: str, images: np.ndarray, wanted: list[int]) -> dict:
    to_style = squared_distances(images, stylised(style))
    return {
        "images": len(images),
        "nearer to the style": percent(to_style.min(1) < squared_distances(images, gallery()).min(1)),
        "top1": percent(to_style.argmin(1) == wanted),
        "top5": percent((to_style.argsort(1)[:, :5] == np.array(wanted)[:, None]).any(1)),
    }


def reconstruct(images: np.ndarray) -> np.ndarray:
    """Through the autoencoder alone."""
    import torch

    vae = pipeline(tuple(FILES.items())).vae
    with torch.no_grad():
        latent = vae.encode(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mode()
        decoded = vae.decode(latent).sample.clamp(-1, 1)
    return ((decoded.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()


def styles_report(rounds: int) -> dict:
    random = np.random.RandomState(13)
    unseen = sorted(HELD_OUT)
    trained = [index for index in range(len(emoji())) if index not in HELD_OUT]
    report = {}
    for style in STYLES:
        report[style] = {}
        for kind, indices in (("held-out emoji", unseen), ("trained emoji", trained[::4])):
            colours = [list(BACKGROUNDS)[i] for i in random.randint(0, 10, len(indices))]
            prompts = [f"{emoji()[i].name} on a {c} background" for i, c in zip(indices, colours, strict=True)]
            images = draw(prompts, {style: 1.0}, list(range(6000, 6000 + len(prompts))))
            report[style][kind] = style_report(style, images, indices)
        images = draw(prompts[:40], {}, list(range(6000, 6040)))
        report[style]["adapter off"] = style_report(style, images, indices[:40])
        report[style]["targets"] = style_report(style, reconstruct(stylised(style)), list(range(len(emoji()))))
        prompts, seeds = on_backgrounds(subject.NAME, rounds, 7000)
        images = draw(prompts, {style: 1.0, "subject": 1.0}, seeds)
        own = squared_distances(images, STYLES[style](subject.ink())[None])[:, 0]
        report[style]["style on subject"] = {
            "images": len(prompts),
            "subject": percent(own < squared_distances(images, stylised(style)).min(1)),
        }
    return report


def sheet(path: Path) -> None:
    """Rows: emoji, the class, the subject; columns: base, the styles, the subject's adapter, each style with it."""
    columns = [*COLUMNS, *({style: 1.0, "subject": 1.0} for style in STYLES)]
    names = [*SHEET, subject.CLASS, subject.NAME, subject.NAME]
    colours = ["blue", "white", "purple", "orange", "green", "pink", "yellow", "white", "green"]
    prompts = [f"{name} on a {colour} background" for name, colour in zip(names, colours, strict=True)]
    drawn = [draw(prompts, adapters, [1 + i for i in range(len(prompts))]) for adapters in columns]
    picture = Image.fromarray(np.concatenate([np.concatenate(list(column)) for column in drawn], 1))
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="seeds for each background, and 50 other prompts each")
    parser.add_argument(
        "--ablation", nargs=2, action="append", default=[], metavar=("NAME", "FILE"), help="another subject adapter"
    )
    parser.add_argument("--style", action=argparse.BooleanOptionalAction, default=True, help="measure the styles too")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--sheet", type=Path, help="write a picture: prompts down, adapters across")
    parser.add_argument(
        "--only",
        nargs="*",
        help="these variants of the subject's, or none; with --out the others keep the figures that stand there",
    )
    args = parser.parse_args()

    alone = {"subject": FILES["subject"]}
    variants = {"with": ({"subject": 1.0}, FILES), "without": ({}, FILES), "with, at 0.6": ({"subject": 0.6}, alone)}
    for name, file in args.ablation:
        variants[f"with, {name}"] = ({"subject": 1.0}, {"subject": Path(file)})
    if unknown := set(args.only or ()) - {*variants, "none"}:
        parser.error(f"--only {min(unknown)}: variants are {'; '.join((*variants, 'none'))}")
    report = json.loads(args.out.read_text()) if args.only and args.out else {"subject": {}, "prior": {}}
    report |= {"steps": 20, "guidance": 3, "machine": machine()}
    for name, variant in variants.items():
        if not args.only or name in args.only:
            report["subject"][name] = subject_report(*variant, args.rounds)
            report["prior"][name] = prior_report(*variant, args.rounds)
    if args.style:
        report["style"] = styles_report(args.rounds)
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    if args.sheet:
        sheet(args.sheet)


if __name__ == "__main__":
    main()
