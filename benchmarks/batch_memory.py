"""Memory of a batch over thousands of mixed jobs: does it reach a plateau?

    python benchmarks/batch_memory.py [--jobs 2000] [--bundle out/emoji.bundle] [--json benchmarks/results/batch_memory.json]

Jobs of many sizes, samplers, guiders and image counts, super-resolution stages, init images and masks, and every tenth one bad:
JSON that is none, unknown names, pictures that are missing. Each fiftieth job or so the process is measured behind malloc_trim:
resident bytes, open files, threads, Python objects. The slope is a line fitted to the second half; what must not grow has the
same number at its begin and its end. A limit on the slope is the exit code.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from harness import machine
from PIL import Image
from soak_shapes import resident

from stepforge import load
from stepforge.runtime.serve.batch import Batch, Report, Settings
from stepforge.runtime.serve.draw import Encoding, EngineDrawer
from stepforge.runtime.serve.manifest import Manifest
from stepforge.runtime.serve.room import Room
from stepforge.runtime.serve.store import Store

SIDES = (32, 64, 96, 128)
MOST = 4.0  # KB a job: a leaked picture of 64×64 alone is 12
BAD = ("{", '{"prompt": 7}', '{"prompt": "x", "sampler": "no"}', '{"prompt": "x", "init": {"image": "none.png"}}',
       '{"prompt": "x", "upscale": "no"}', '{"prompt": "x", "adapters": {"no": 1}}')  # fmt: skip


def prompts(count: int) -> list[str]:
    """So few that the cache of texts, which is bounded in bytes, holds them all before the second half."""
    rng = random.Random(1)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 90))) for _ in range(count)]


WORDS = ("red", "fox", "(sun:1.2)", "on", "a", "hill")
PROMPTS = prompts(48)


def job(rng: random.Random, stages: dict[str, int], sides: tuple[int, ...]) -> str:
    if rng.random() < 0.1:
        return rng.choice(BAD)
    fields = {
        "prompt": rng.choice(PROMPTS),
        "steps": rng.randint(1, 4), "width": rng.choice(sides), "height": rng.choice(sides), "images": rng.randint(1, 3),
        "sampler": rng.choice(("ddim", "euler", "dpmpp_2m", "unipc", "lms", "euler_a")),
        "guidance": rng.choice((1, 3.0, 7.5, "linear(1..5)")), "guider": rng.choice(("cfg", "rescale(0.7)", "apg")),
    }  # fmt: skip
    kind = rng.randrange(6)
    if kind == 0 and stages:
        name = rng.choice(list(stages))
        fields["upscale"] = {"name": name, **({"steps": stages[name]} if stages[name] else {})}
    elif kind == 1:
        fields["init"] = {"image": f"{rng.randrange(4)}.png", "strength": 0.6}
        fields["sampler"] = "euler"
    elif kind == 2:
        fields["init"] = {"image": f"{rng.randrange(4)}.png", "mask": "mask.png", "overlay": rng.random() < 0.5}
        fields["sampler"] = "ddim"
    return json.dumps(fields)


def measured(jobs: int) -> dict[str, int]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return {
        "jobs": jobs, "resident_mb": resident(), "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(), "objects": len(gc.get_objects()), "resident_kb": kilobytes(),
    }  # fmt: skip


def kilobytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="fake")
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rng, rows = random.Random(0), []
    with tempfile.TemporaryDirectory() as name, load(args.bundle) as engine:
        folder = Path(name)
        stages = {stage: 2 if card.model else 0 for stage, card in engine.bundle.stages.items()}
        sides = SIDES if args.bundle == "fake" else tuple({engine.bundle.card.width, engine.bundle.card.width // 2})
        for index in range(4):
            Image.new("RGB", (rng.choice(SIDES), 64), (index, 9 * index, 99)).save(folder / f"{index}.png")
        mask = Image.new("L", (64, 64))
        mask.paste(255, (0, 0, 32, 64))
        mask.save(folder / "mask.png")
        manifest = folder / "jobs.jsonl"
        manifest.write_text("".join(job(rng, stages, sides) + "\n" for _ in range(args.jobs)))

        def tick(report: Report) -> None:
            ended = report.jobs - report.left
            if not rows or ended - rows[-1]["jobs"] >= 50:
                rows.append(measured(ended))

        started = time.perf_counter()
        store = Store(folder / "out", layout="files", kind="png", shard_size=1, overwrite=False)
        settings = Settings({}, "files", 1, Encoding("png", 90, True))
        with EngineDrawer(engine, store.files, settings.encoding) as drawer:
            report = Batch(
                drawer,
                Manifest(manifest),
                store,
                settings,
                pictures=folder,
                room=Room(4 * engine.max_rows),
                on_tick=tick,
            ).run()
        seconds = time.perf_counter() - started
    half = [row for row in rows if row["jobs"] >= args.jobs / 2]
    slope = float(np.polyfit([row["jobs"] for row in half], [row["resident_kb"] for row in half], 1)[0])
    found = {
        "bundle": Path(args.bundle).name, "jobs": report.jobs, "done": report.done, "failed": report.failed,
        "images": report.images, "seconds": round(seconds, 1), "kb_a_job_in_the_second_half": round(slope, 3),
        "rows": rows, "machine": machine(),
    }  # fmt: skip
    print(json.dumps({**found, "rows": rows[::8]}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    first, last = half[0], half[-1]
    grown = [name for name in ("files", "threads") if last[name] > first[name] + 1]
    sys.exit(1 if slope > MOST or grown or report.left else 0)


if __name__ == "__main__":
    main()
