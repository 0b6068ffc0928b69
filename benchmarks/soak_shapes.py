"""Resident memory over requests of many sizes: does it reach a plateau?

    python benchmarks/soak_shapes.py BUNDLE [--requests 360] [--backend openvino] [--precision fp32] [--steps 1]

Requests of 1 to 3 images in 144 sizes, in a fixed random order. Prints MB resident after every 30 of them, and the seconds
of 20 steps of one size before and after.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import random
import time
from itertools import product
from pathlib import Path

from harness import machine

from stepforge import Engine, Request, load

SIZES = 12  # widths, and heights: the model's own size and multiples of `size_multiple` around it


def resident() -> int:
    """MB of this process in memory."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) // 1024


def sizes(engine: Engine) -> list[tuple[int, int]]:
    card = engine.bundle.card
    first = max(card.size_multiple, card.width - SIZES // 2 * card.size_multiple)
    sides = [first + i * card.size_multiple for i in range(SIZES)]
    return list(product(sides, sides))


def seconds(engine: Engine, runs: int = 3) -> float:
    """The fastest of some runs of 20 steps in the model's own size."""
    found = []
    for _ in range(runs):
        started = time.perf_counter()
        engine.generate(Request(prompt="x", steps=20, guidance=3.0))
        found.append(time.perf_counter() - started)
    return round(min(found), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=360)
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--steps", type=int, default=1)
    args = parser.parse_args()
    with load(args.bundle, backend=args.backend, precision=args.precision) as engine:
        order = random.Random(0)
        shapes = sizes(engine)
        before = seconds(engine)
        found = {0: resident()}
        for index in range(1, args.requests + 1):
            width, height = order.choice(shapes)
            images = order.randint(1, 3)
            engine.generate(
                Request(prompt="x", steps=args.steps, width=width, height=height, images=images, seed=index)
            )
            if index % 30 == 0:
                gc.collect()
                found[index] = resident()
                print(f"{index:5} requests: {found[index]:6} MB", flush=True)
        after = seconds(engine)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    print(
        json.dumps({"mb": found, "after_close": resident(), "seconds_20_steps": [before, after], "machine": machine()})
    )


if __name__ == "__main__":
    main()
