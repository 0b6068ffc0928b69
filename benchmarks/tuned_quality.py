"""What cheaper plans cost in recognised pictures: `python benchmarks/tuned_quality.py BUNDLE --preset fast`.

Draws the demo model's captions with the full plan, with each ingredient of cheaper plans alone, with all of them, and with
presets of the bundle; scores as emoji_quality.py does. Captions in `--tuned-on`, the file that `stepforge tune` was given, are
left out. distance: mean (of runtime/tune/distance.py) to the full plan's picture of the same caption and seed. cost: rows, each
weighed by what a row of its network takes here. lost and won: pictures that the full plan gets right and this one wrong, and
the other way round.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from emoji_quality import ROOT, choose, nearest_emoji
from harness import machine

from stepforge import Bundle, Engine, Request, Result, load
from stepforge.runtime.tune.distance import distance
from stepforge.runtime.tune.price import prices, row_counts

# name -> guidance and reuse; w stands for the full plan's weight
PLANS = {
    "full": ("w", ""),
    "window 0..0.7": ("interval(w, steps=0..0.7)", ""),
    "window 0..0.5": ("interval(w, steps=0..0.5)", ""),
    "window 0.1..0.5": ("interval(w, steps=0.1..0.5)", ""),
    "tgate 0.5": ("w", "tgate(0.5)"),
    "window + tgate": ("interval(w, steps=0..0.5)", "tgate(0.5)"),
    "deepcache 3": ("w", "deepcache(3)"),
    "deepcache 5": ("w", "deepcache(5)"),
    "window + deepcache": ("interval(w, steps=0..0.5)", "deepcache(3)"),
    "all three": ("interval(w, steps=0..0.5)", "deepcache(3)+tgate(0.5)"),
}


def draw(engine: Engine, requests: list[Request], name: str) -> list[Result]:
    results = engine.generate(requests)
    print(f"  {name} drawn", flush=True)
    return results


def row(
    results: list[Result], full: list[Result], wanted: np.ndarray, worth: dict[str, float], bundle: Bundle
) -> dict[str, Any]:
    """Figures of one plan; wanted: the index of each caption's emoji."""

    def right(drawn: list[Result]) -> np.ndarray:
        pictures = np.stack([np.asarray(result.images[0]) for result in drawn])
        found: np.ndarray = nearest_emoji(pictures)[:, 0] == wanted
        return found

    mine, theirs = right(results), right(full)
    plan = results[0].plan
    away = [distance(a.images[0], b.images[0]) for a, b in zip(results, full, strict=True)]
    return {
        "guidance": results[0].request.to_dict()["guidance"],
        "reuse": str(results[0].request.reuse),
        "rows": plan.rows,
        "cost": round(sum(n * worth[label] for label, n in row_counts(plan, results[0].request, bundle).items()), 2),
        "distance": round(float(np.mean(away)), 4),
        "top1": round(100 * float(mine.mean()), 1),
        "lost": int((theirs & ~mine).sum()),
        "won": int((mine & ~theirs).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--preset", action="append", default=[], help="a preset of the bundle; repeatable")
    parser.add_argument(
        "--plan", action="append", default=[], metavar="GUIDANCE;REUSE", help="one more plan; w: weight"
    )
    parser.add_argument("--only", action="store_true", help="leave the table of plans out")
    parser.add_argument("--tuned-on", type=Path, default=ROOT / "examples/emoji/prompts.txt")
    parser.add_argument("--trained", type=int, default=160, help="captions that training saw")
    parser.add_argument("--held-out", type=int, default=257, help="captions that it did not see, 257 at most")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()

    tuned = {line.strip() for line in args.tuned_on.read_text(encoding="utf-8").splitlines()}
    seen, held_out = choose(args.trained)
    asked = [picture for picture in (*seen, *held_out[: args.held_out]) if picture.caption not in tuned]
    wanted = np.array([picture.emoji for picture in asked])
    plans = dict(list(PLANS.items())[:1] if args.only else PLANS)
    for text in args.plan:
        guidance, _, reuse = text.partition(";")
        plans[text] = (guidance, reuse)
    common = {"steps": args.steps, "sampler": args.sampler}
    with load(args.bundle, precision=args.precision, threads=args.threads) as engine:
        worth = prices(engine, Request(prompt=asked[0].caption, guidance=args.guidance, **common))
        options = {
            name: {"guidance": guidance.replace("w", f"{args.guidance:g}", 1) if guidance[0] == "w" else
                   guidance.replace("(w,", f"({args.guidance:g},"), "reuse": reuse}
            for name, (guidance, reuse) in plans.items()
        } | {f"preset {name}": {"preset": name} for name in args.preset}  # fmt: skip
        report: dict[str, Any] = {
            "bundle": engine.bundle.digest,
            **common,
            "guidance": args.guidance,
            "captions": len(asked),
            "backend": f"{engine.backend.name} {engine.backend.precision}",
            "prices": worth,
            "presets": {name: engine.bundle.presets[name].to_dict() for name in args.preset},
            "plans": {},
            "machine": machine(),
        }
        full: list[Result] = []
        for name, values in options.items():
            requests = [Request(prompt=p.caption, seed=1000 + i, **common, **values) for i, p in enumerate(asked)]
            results = draw(engine, requests, name)
            full = full or results
            report["plans"][name] = row(results, full, wanted, worth, engine.bundle)
            print(f"  {json.dumps(report['plans'][name])}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
