"""A batch against the engine's own rate: the same requests through `Engine.stream`, whose pictures are dropped, and through a
batch that encodes, writes, syncs and journals them. One engine, one process, in turn.

    python benchmarks/bench_batch.py BUNDLE [--images 96] [--runs 5] [--json benchmarks/results/batch_rate.json]

A run's time is from the first request to the last picture, or until lists and journal are on disk; `processor` is the time of
the process's threads in it, which other work on the machine changes less. The first run of each is not counted. `busy` is what
a batch's own report says: the share of the time that the busier of the engine's threads worked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from harness import machine

from stepforge import Engine, Request, load
from stepforge.runtime.serve.batch import Batch, Settings
from stepforge.runtime.serve.draw import Encoding, EngineDrawer
from stepforge.runtime.serve.manifest import Manifest
from stepforge.runtime.serve.room import Room
from stepforge.runtime.serve.store import SIDECAR, Store

PROMPTS = Path(__file__).parents[1] / "examples/emoji/prompts.txt"
LAYOUTS = ("files", "webdataset")


class Clock:
    """Seconds since it was made, of the wall and of the process."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._wall, time.process_time() - self._processor


def alone(engine: Engine, requests: list[Request]) -> tuple[tuple[float, float], list[str]]:
    """Seconds, and digests of the pictures."""
    found = {}
    clock = Clock()
    for outcome in engine.stream(requests):
        assert outcome.result is not None, outcome.error
        found[outcome.index] = outcome.result.images[0]
    seconds = clock.read()
    return seconds, [hashlib.sha256(found[i].tobytes()).hexdigest() for i in range(len(found))]


def batch(engine: Engine, jobs: Path, options: dict, layout: str) -> tuple[tuple[float, float], float, list[str]]:
    """Seconds, the engine's share of them, and digests of the pictures of single files."""
    from PIL import Image

    with tempfile.TemporaryDirectory(dir=jobs.parent) as name:
        out = Path(name)
        clock = Clock()
        store = Store(out, layout=layout, kind="png", shard_size=50, overwrite=False)
        settings = Settings(options, layout, 50, Encoding("png", 90, True))
        with EngineDrawer(engine, store.files, settings.encoding) as drawer:
            work = Batch(
                drawer, Manifest(jobs), store, settings, pictures=out, room=Room(4 * engine.max_rows)
            )  # fmt: skip
            report = work.run()
        seconds = clock.read()
        assert report.failed == report.left == 0
        digests = []
        if layout == "files":
            for line in (out / SIDECAR).read_text().splitlines():
                with Image.open(out / json.loads(line)["file"]) as image:
                    digests.append(hashlib.sha256(image.tobytes()).hexdigest())
        return seconds, report.busy, digests


def spread(name: str, values: list[float]) -> dict[str, list[float]]:
    """Median, least and most."""
    return {name: [round(value, 4) for value in (statistics.median(values), min(values), max(values))]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prompts = PROMPTS.read_text(encoding="utf-8").split("\n")
    prompts = [prompt for prompt in prompts if prompt.strip()]
    jobs = [{"prompt": prompts[i % len(prompts)], "seed": i} for i in range(args.images)]
    options = {"steps": args.steps, "guidance": 3.0}
    requests = [Request(**options, **job) for job in jobs]
    times: dict[str, list[tuple[float, float]]] = {"engine": [], **{layout: [] for layout in LAYOUTS}}
    busy: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    differences = 0
    with tempfile.TemporaryDirectory() as name, load(args.bundle, backend=args.backend, threads=args.threads) as engine:
        manifest = Path(name) / "jobs.jsonl"
        manifest.write_text("".join(json.dumps(job) + "\n" for job in jobs))
        for run in range(args.runs + 1):
            seconds, expected = alone(engine, requests)
            found = {"engine": seconds}
            for layout in LAYOUTS:
                found[layout], share, digests = batch(engine, manifest, options, layout)
                differences += sum(a != b for a, b in zip(expected, digests, strict=False))
                if run:
                    busy[layout].append(share)
            if run:
                for what, value in found.items():
                    times[what].append(value)
            print({what: f"{args.images / wall:.3f} images/s" for what, (wall, _) in found.items()}, flush=True)
        backend = {"backend": engine.backend.name, "precision": engine.backend.precision, "max_rows": engine.max_rows}
    rows = {
        what: spread("images_per_second", [args.images / wall for wall, _ in each])
        | spread("processor_seconds_an_image", [processor / args.images for _, processor in each])
        for what, each in times.items()
    }
    for layout in LAYOUTS:
        for place, name in enumerate(("of_the_engines_rate", "of_the_engines_processor_rate")):
            pairs = zip(times["engine"], times[layout], strict=True)  # runs beside each other
            rows[layout] |= spread(name, [a[place] / b[place] for a, b in pairs])
        rows[layout] |= spread("busy", busy[layout])
    report = {
        "bundle": args.bundle.name, "images": args.images, "steps": args.steps, "runs": args.runs, **backend, "rates": rows,
        "pictures_that_differ": differences, "machine": machine(), "load_average": os.getloadavg()[1],
    }  # fmt: skip
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
