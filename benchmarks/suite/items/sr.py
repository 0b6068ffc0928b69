"""Super-resolution by a feed-forward network, 128 -> 512 pixels: an ESRGAN of 23 blocks and 64 channels, random weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from suite.cases import Case, Record
from suite.items import Context

TITLE = "Super-resolution, ESRGAN x4"
TASK = "network"


def cases(quick: bool, precisions: Sequence[str]) -> list[Case]:
    return [Case("sr", "esrgan", name) for name in ("spandrel", "stepforge openvino")]


def measure(case: Case, context: Context) -> Record:
    """bench_sr.py prepares and measures; its runner's peak is its own process's."""
    script = Path(__file__).resolve().parents[2] / "bench_sr.py"
    work = context.work / "sr"
    command = [sys.executable, "-c", PREPARE, str(script.parent), TASK, str(work)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    command = [sys.executable, str(script), "--task", TASK, "--work", str(work), "--one", f"{case.runner} fp32"]
    found = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    drawn = work / f"{TASK}-{case.runner.replace(' ', '-')}-fp32.npy"
    import numpy as np

    np.save(context.image, np.load(drawn)[None])
    return Record(case, [found["seconds"]], peak=int(found["peak, GiB"] * 2**30))


PREPARE = "import sys; sys.path.insert(0, sys.argv[1]); import bench_sr; from pathlib import Path; \
p = Path(sys.argv[3]); p.mkdir(parents=True, exist_ok=True); bench_sr.prepare(sys.argv[2], p)"
