"""INT8 against float on the demo model, prompt by prompt: `python benchmarks/int8_quality.py BUNDLE --work FOLDER`.

BUNDLE is the demo model's, quantised. Every precision draws the same prompts from the same seeds. Judged by the recognition
rate of emoji_quality.py, by the pairs that one precision draws right and the other wrong, by PSNR between their pictures, and
by the distance of their latents after each step. Pictures are kept in FOLDER as they are drawn, so that a run that
stopped (`--minutes`) goes on when it is called again. The sheet has a row of pairs, float above integers.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from emoji_quality import Picture, choose, nearest_emoji, score
from harness import machine
from PIL import Image

from stepforge import Engine, Request, load
from stepforge.export.parity.measures import psnr, relative_error
from stepforge.runtime.bundle import read

TRAJECTORIES = 8
AT_ONCE = 16


def draw(args: argparse.Namespace, requests: list[Request]) -> dict[str, np.ndarray]:
    """Pictures by precision, uint8, of as many requests as the time allows."""
    until = time.monotonic() + 60 * args.minutes
    engines: dict[str, Engine] = {}
    drawn: dict[str, list[np.ndarray]] = {args.float: [], "int8": []}
    for start in range(0, len(requests), AT_ONCE):
        files = {precision: args.work / f"{args.backend}-{precision}-{start:03}.npy" for precision in drawn}
        if time.monotonic() > until and not all(file.exists() for file in files.values()):
            break
        for precision, file in files.items():
            if not file.exists():
                if precision not in engines:
                    engines[precision] = load(args.bundle, backend=args.backend, precision=precision)
                results = engines[precision].generate(requests[start : start + AT_ONCE])
                np.save(file, np.stack([np.asarray(result.images[0]) for result in results]))
            drawn[precision].append(np.load(file))
    for engine in engines.values():
        engine.close()
    return {precision: np.concatenate(images) for precision, images in drawn.items()}


def latents(args: argparse.Namespace, precision: str, requests: list[Request]) -> list[list[np.ndarray]]:
    """Latents after each step, of each request."""
    found = []
    with load(args.bundle, backend=args.backend, precision=precision) as engine:
        for request in requests[:TRAJECTORIES]:
            own: list[np.ndarray] = []
            engine.generate(request, on_step=lambda progress, own=own: own.append(np.array(progress.latents())))
            found.append(own)
    return found


def rates(drawn: dict[str, np.ndarray], asked: list[Picture], trained: int) -> dict[str, Any]:
    """Recognition rates by precision, of pairs that training showed and of those that it never showed together."""
    found = {}
    for name, images in drawn.items():
        found[f"{name}, trained pairs"] = score(images[:trained], asked[:trained])
        if trained < len(asked):
            found[f"{name}, held-out pairs"] = score(images[trained:], asked[trained:])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=320)
    parser.add_argument("--held-out", type=int, default=257)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--float", default="fp32", help="precision to compare with")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop before the next pictures after as many")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sheet", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    seen, held_out = choose(args.prompts)
    asked = [*seen, *held_out[: args.held_out]]
    common = {"steps": args.steps, "guidance": 3.0}
    requests = [Request(prompt=p.caption, seed=1000 + i, **common) for i, p in enumerate(asked)]
    drawn = draw(args, requests)
    plain, ints = drawn[args.float], drawn["int8"]
    asked = asked[: len(ints)]
    trained = min(len(seen), len(asked))
    wanted = np.array([picture.emoji for picture in asked])
    right = {name: nearest_emoji(images)[:, 0] == wanted for name, images in drawn.items()}
    noise = np.array([psnr(a, b) for a, b in zip(ints, plain, strict=True)])
    distances = [
        [relative_error(a, b) for a, b in zip(ours, floats, strict=True)]
        for ours, floats in zip(latents(args, "int8", requests), latents(args, args.float, requests), strict=True)
    ]
    mean = np.mean(distances, axis=0)
    bundle = read(args.bundle, check=False)
    report: dict[str, Any] = {
        "bundle": bundle.digest,
        "int8": bundle.source["int8"],
        "backend": args.backend,
        "steps": args.steps,
        "guidance": 3.0,
        **rates(drawn, asked, trained),
        "right in float alone": int((right[args.float] & ~right["int8"]).sum()),
        "right in int8 alone": int((~right[args.float] & right["int8"]).sum()),
        "images": len(asked),
        "psnr, dB": {f"percentile {p}": round(float(np.percentile(noise, p)), 1) for p in (5, 50, 95)},
        "trajectory, mean relative distance": {
            f"step {k + 1}": float(f"{mean[k]:.3g}") for k in (0, 4, 9, 14, 19) if k < len(mean)
        },
        "machine": machine(),
    }
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    if args.sheet:
        picked = np.linspace(0, len(asked) - 1, 24).astype(int)
        rows = [
            np.concatenate(images[picked[half]], 1)
            for half in (slice(0, 12), slice(12, 24))
            for images in (plain, ints)
        ]
        Image.fromarray(np.concatenate(rows)).resize((12 * 96, 4 * 96), Image.Resampling.LANCZOS).save(args.sheet)


if __name__ == "__main__":
    main()
