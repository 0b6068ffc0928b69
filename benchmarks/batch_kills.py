"""A batch that is killed again and again: SIGKILL at random moments, then the files against those of a run left alone.

    python benchmarks/batch_kills.py --kills 100 --images 500 --json benchmarks/results/batch_kills.json

On the fake bundle. A run is killed at a random moment of its work, the clock starting when the networks are loaded; one that
is done before is compared and begun anew in the same folder with --overwrite, so that each kill finds work. At the end one
run goes to its end, and one more must find nothing to do.
"""

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from stepforge.runtime.serve.store import OWN

CODE = """
import sys
from stepforge.runtime.cli.main import main
from stepforge.runtime.serve.batch import Batch
run = Batch.run
def told(self):
    print("start", file=sys.stderr, flush=True)
    return run(self)
Batch.run = told
main()
"""


def files(folder: Path) -> dict[str, str]:
    """sha256 of each file by its name, the journal's folder left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and OWN not in path.parts:
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def run(arguments: list[str], kill_after: float | None = None) -> tuple[bool, dict]:
    """Whether the run was killed, and its report if not. kill_after: seconds from the start of the work."""
    command = [sys.executable, "-c", CODE, "batch", "fake", *arguments, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        if process.stderr.readline() != b"start\n":
            sys.exit("the batch did not start")
        try:
            output, _ = process.communicate(timeout=kill_after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            output, _ = process.communicate()
    return process.returncode == -signal.SIGKILL, json.loads(output) if output else {}


def measure(layout: str, kills: int, images: int, seed: int) -> dict:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = folder / "jobs.jsonl"
        lines = ({"prompt": f"p{i}", "steps": 2, "width": 64, "height": 64} for i in range(images))
        jobs.write_text("".join(json.dumps(line) + "\n" for line in lines))
        common = [str(jobs), "--layout", layout, "--shard-size", "50"]
        _, alone = run([*common, "-o", str(folder / "whole")])
        killed = rounds = differences = 0
        expected, arguments = files(folder / "whole"), [*common, "-o", str(folder / "out")]
        fresh = False
        while killed < kills:
            again = ["--overwrite"] if fresh else []
            was_killed = run([*arguments, *again], chance.uniform(0, alone["seconds"] / 5))[0]
            killed += was_killed
            fresh = not was_killed
            if not was_killed:
                rounds += 1
                differences += files(folder / "out") != expected
        _, last = run(arguments)
        rounds += 1
        differences += files(folder / "out") != expected
        drawn_again = run(arguments)[1]["done"]
        own = [path.name for path in (folder / "out" / OWN).rglob("*") if path.is_file()]
    return {
        "layout": layout, "kills": killed, "images": images, "rounds_to_the_end": rounds, "rounds_that_differ": differences,
        "drawn_again_when_done": drawn_again, "left_in_the_journals_folder": own, "last_run": last,
        "run_left_alone_seconds": round(alone["seconds"], 2),
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", default="files,webdataset")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = [measure(name, options.kills, options.images, options.seed) for name in options.layouts.split(",")]
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    bad = [row for row in found if row["rounds_that_differ"] or row["drawn_again_when_done"]]
    sys.exit(1 if bad else 0)
