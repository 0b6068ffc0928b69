"""A batch that is killed again and again: SIGKILL at random moments, then the files against those of a run left alone.

    python benchmarks/batch_kills.py [--bundle out/emoji.bundle] [--kills 100] [--images 500] [--json FILE]

Each run is a process of its own, forked from this one so that Python starts once, and is killed at a random moment of its work,
the clock starting when the networks are loaded. A run that is done before is compared and begun anew in the same folder with
--overwrite, so that each kill finds work. At the end one run goes to its end, and one more must find nothing to do. Compared
are all files byte by byte, and the journal: a job that has two lines was drawn again after it was finished.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from harness import machine

from stepforge.runtime.cli.main import main as stepforge
from stepforge.runtime.serve.batch import Batch
from stepforge.runtime.serve.store import OWN


def files(folder: Path) -> dict[str, str]:
    """sha256 of each file by its name, the journal's folder left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and OWN not in path.parts:
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def run(arguments: list[str], kill_after: float | None = None) -> tuple[bool, dict]:
    """Whether the run was killed, and its report if not. kill_after: seconds from the start of the work."""
    ready, told = os.pipe()
    output, written = os.pipe()
    if (child := os.fork()) == 0:
        for number, replacement in ((0, os.open(os.devnull, os.O_RDONLY)), (1, written)):
            os.dup2(replacement, number)
        sys.stdout = os.fdopen(1, "w", closefd=False)  # this process's was another kind of file
        started = Batch.run

        def signalling(self: Batch) -> object:
            os.write(told, b"!")
            return started(self)

        Batch.run = signalling  # type: ignore[method-assign, assignment]
        try:
            stepforge(["batch", *arguments, "--json"])
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(int(end.code or 0))
        os._exit(99)
    os.close(told)
    os.close(written)
    try:
        if os.read(ready, 1) != b"!":
            sys.exit("the batch did not start")
        ends, _, _ = select.select([output], [], [], kill_after)  # the report, or the end of the process
        if not ends:
            os.kill(child, signal.SIGKILL)
        with os.fdopen(output, "rb", closefd=False) as stream:
            report = stream.read()
    finally:
        os.close(ready)
        os.close(output)
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True, {}
    if os.waitstatus_to_exitcode(status):
        sys.exit("a run failed")
    return False, json.loads(report)


def drawn_twice(folder: Path) -> int:
    """Jobs that have more than one line in the journal."""
    lines = [json.loads(line) for line in (folder / OWN / "journal.jsonl").read_text().splitlines()]
    return sum(count > 1 for count in Counter(line["job"] for line in lines if "job" in line).values())


def measure(bundle: str, layout: str, kills: int, images: int, seed: int, steps: int) -> dict:
    chance = random.Random(seed)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = folder / "jobs.jsonl"
        lines = ({"prompt": f"p{i}", "steps": steps, "width": 64, "height": 64} for i in range(images))
        jobs.write_text("".join(json.dumps(line) + "\n" for line in lines))
        common = [bundle, str(jobs), "--layout", layout, "--shard-size", "50"]
        _, alone = run([*common, "-o", str(folder / "whole")])
        killed = rounds = differences = twice = 0
        expected, arguments = files(folder / "whole"), [*common, "-o", str(folder / "out")]
        assert len(expected) > images or layout != "files"
        fresh = False
        while killed < kills:
            again = ["--overwrite"] if fresh else []
            was_killed = run([*arguments, *again], chance.uniform(0, alone["seconds"] / 5))[0]
            killed += was_killed
            fresh = not was_killed
            if not was_killed:
                rounds += 1
                differences += files(folder / "out") != expected
                twice += drawn_twice(folder / "out")
        _, last = run(arguments)
        rounds += 1
        differences += files(folder / "out") != expected
        twice += drawn_twice(folder / "out")
        drawn_again = run(arguments)[1]["done"]
        own = [path.name for path in (folder / "out" / OWN).rglob("*") if path.is_file()]
    return {
        "bundle": Path(bundle).name, "layout": layout, "kills": killed, "images": images, "steps": steps,
        "rounds_to_the_end": rounds, "rounds_that_differ": differences, "jobs_drawn_twice": twice,
        "drawn_again_when_done": drawn_again, "left_in_the_journals_folder": own,
        "resumed_by_the_last_run": last["resumed"], "run_left_alone_seconds": round(alone["seconds"], 2),
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def keep(path: Path, row: dict) -> None:
    """Write a row at once; those of other bundles and layouts stay."""
    rows = json.loads(path.read_text())["runs"] if path.exists() else []
    rows = [other for other in rows if (other["bundle"], other["layout"]) != (row["bundle"], row["layout"])]
    path.write_text(json.dumps({"machine": machine(), "runs": [*rows, row]}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="also files of this bundle, beside the fake one's")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", default="files,webdataset")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cases = [("fake", layout) for layout in options.layouts.split(",")]
    if options.bundle is not None:
        cases.append((str(options.bundle), "files"))
    found = []
    for bundle, layout in cases:
        found.append(measure(bundle, layout, options.kills, options.images, options.seed, options.steps))
        print(json.dumps(found[-1], indent=1), flush=True)
        if options.json:
            keep(options.json, found[-1])
    bad = [row for row in found if row["rounds_that_differ"] or row["jobs_drawn_twice"] or row["drawn_again_when_done"]]
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
