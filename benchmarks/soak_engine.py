"""Mixed requests from many threads: is memory on a plateau, and does every request end as it should?

    python benchmarks/soak_engine.py BUNDLE [--requests 2000] [--seconds S] [--side 64] [--adapter NAME=FILE ...] [--json FILE]

Sizes, samplers, guidance, numbers of images, init images, ControlNets, stages and adapters in a fixed random order; one in ten
requests is cancelled, late, or fails in its callback. After every 50 the process's resident memory is read, behind a
collection of garbage and malloc_trim. --seconds ends it early, behind fewer requests. --side: of the pictures, in place of the
model's own. Growth is the slope of a line through the second half of these, in KB a request,
with its standard error: with an engine library that keeps what it made for the shapes it saw last, readings differ by some MB
with the requests before them. Exit code 1 if growth exceeds `MOST_GROWTH` by more than twice its error, or if threads, open
files or requests are left over.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from harness import machine

from stepforge import Cancelled, DeadlineExceeded, Engine, Request, load

EVERY = 50  # requests between two readings
MOST_GROWTH = 4.0  # KB a request: a leak of one picture of 64 x 64, or of one latent, is 12 or 4 KB
SAMPLERS = ("ddim", "euler", "dpmpp_2m", "unipc", "heun", "lcm")
GUIDANCE = (1.0, 3.0, "interval(3, steps=0.2..0.8)", "linear(1..5)")
COLOURS, THINGS = ("red", "small", "angry"), ("cat", "moon", "tree", "house", "smile", "(car:1.3) on a road at night")
ENDS = ("cancelled", "late", "broken")


class Broken(Exception):
    """Raised by a callback of this script."""


def resident() -> int:
    """KB of this process in memory."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


def growth(readings: dict[int, int]) -> tuple[float, float]:
    """KB a request and its standard error, of the second half of the readings (KB behind so many requests)."""
    if len(readings) < 8:
        sys.exit(f"{len(readings) * EVERY} requests are too few to tell growth; {8 * EVERY} are needed")
    counts, kb = np.array(list(readings.items())[len(readings) // 2 :], np.float64).T
    line, covariance = np.polyfit(counts, kb, 1, cov=True)
    return float(line[0]), float(covariance[0, 0]) ** 0.5


def mixed(engine: Engine, chance: random.Random, adapters: list[str], side: int) -> Request:
    unit = engine.bundle.card.size_multiple
    width, height = (max(unit, side + chance.randint(-2, 2) * unit) for _ in range(2))
    asked: dict[str, Any] = {
        "prompt": f"{chance.choice(COLOURS)} {chance.choice(THINGS)}",  # few enough for the cache of prompts to fill early
        "negative": chance.choice(("", "blue")),
        "width": width,
        "height": height,
        "steps": chance.randint(2, 4),
        "sampler": chance.choice(SAMPLERS),
        "guidance": chance.choice(GUIDANCE),
        "seed": chance.randrange(1 << 32),
        "images": chance.choice((1, 1, 1, 2)),
    }  # fmt: skip
    image = np.random.default_rng(chance.randrange(20)).integers(0, 256, (height, width, 3), np.uint8)
    extra = chance.random()
    if extra < 0.2:
        asked["init"] = {"image": image, "strength": 0.6}
    elif extra < 0.4 and engine.bundle.controls:
        asked["controls"] = {"name": chance.choice(sorted(engine.bundle.controls)), "image": image}
    if adapters and chance.random() < 0.4:
        asked["adapters"] = {chance.choice(adapters): chance.choice((0.5, 1.0))}
    stages = [name for name, stage in engine.bundle.stages.items() if stage.kind != "x2"]
    if stages and chance.random() < 0.03:
        asked["upscale"] = {"name": chance.choice(stages)}
        asked["width"] = asked["height"] = side
        asked.pop("init", None), asked.pop("controls", None)
    return Request(**asked)


def run_one(engine: Engine, request: Request, end: str) -> str:
    """How the request ended, once it has."""

    def look(progress: Any) -> None:
        if progress.step == 1:
            progress.preview()
            if end == "broken":
                raise Broken

    future = engine.submit(request, wait=True, on_step=look, deadline=1e-3 if end == "late" else 600.0)
    if end == "cancelled":
        future.cancel()
    try:
        future.result()
    except (Cancelled, DeadlineExceeded, Broken) as error:
        return {"Cancelled": "cancelled", "DeadlineExceeded": "late", "Broken": "broken"}[type(error).__name__]
    return "done"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--side", type=int)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    chance = random.Random(0)
    engine = load(args.bundle, backend=args.backend, precision="fp32", queue_limit=16)
    for given in args.adapter:
        engine.adapters.load(*given.split("=", 1))
    adapters = [given.split("=", 1)[0] for given in args.adapter]
    started, readings = time.perf_counter(), {}
    ends: dict[str, int] = {}
    with ThreadPoolExecutor(args.threads) as pool:
        for first in range(0, args.requests, EVERY):
            if time.perf_counter() - started > args.seconds:
                break
            asked = [
                (
                    mixed(engine, chance, adapters, args.side or engine.bundle.card.width),
                    chance.choice(ENDS) if chance.random() < 0.1 else "",
                )
                for _ in range(EVERY)
            ]
            for end in pool.map(lambda one: run_one(engine, *one), asked):
                ends[end] = ends.get(end, 0) + 1
            readings[first + EVERY] = resident()
            threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
            print(
                f"{first + EVERY:6} requests: {readings[first + EVERY] // 1024:6} MB, {threads} threads, {files} files",
                flush=True,
            )
    seconds = time.perf_counter() - started
    stats = engine.stats()
    drained = engine.close(drain=True)
    grown, error = growth(readings)
    left = stats.waiting + stats.running + stats.decoding
    ours = [thread.name for thread in threading.enumerate() if thread.name.startswith("stepforge")]
    report = {
        "requests": sum(ends.values()),
        "ends": ends,
        "outcomes": dict(stats.requests),
        "failures": dict(stats.failures),
        "mb": {count: round(kb / 1024, 1) for count, kb in readings.items()},
        "growth_kb_a_request": round(grown, 2),
        "growth_error_kb": round(error, 2),
        "left_over": left,
        "threads_after_close": ours,
        "seconds": round(seconds, 1),
        "backend": f"{engine.backend.name} {engine.backend.precision}",
        "bundle": engine.bundle.card.name,
        "machine": machine(),
    }
    print(json.dumps(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    unexpected = set(stats.failures) - {"Broken"}
    if (
        grown - 2 * error > MOST_GROWTH
        or left
        or ours
        or unexpected
        or not drained
        or sum(ends.values()) != max(readings)
    ):
        sys.exit(f"not as it should be: {grown:.2f} ± {error:.2f} KB a request, {left} left over, {ours}, {unexpected}")


if __name__ == "__main__":
    main()
