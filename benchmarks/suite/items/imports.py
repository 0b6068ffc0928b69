"""Import of each library in a fresh interpreter, with what it takes to name its pipeline."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

from suite.cases import Case, Record
from suite.items import Context

TITLE = "Import"
LINES = {
    "diffusers": "from diffusers import StableDiffusionPipeline",
    "openvino genai": "from openvino_genai import Text2ImagePipeline",
    "openvino": "import openvino",
    "stepforge": "import stepforge; stepforge.load",
}
TIMED = """
import time; started = time.perf_counter()
{line}
taken = time.perf_counter() - started
import json, resource; print(json.dumps([taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""


def cases(quick: bool, precisions: Sequence[str]) -> list[Case]:
    return [Case("imports", "-", name) for name in LINES]


def measure(case: Case, context: Context) -> Record:
    command = [sys.executable, "-c", TIMED.format(line=LINES[case.runner])]
    found = [
        json.loads(subprocess.check_output(command, text=True)) for _ in range(2 if context.quick else context.runs + 1)
    ][1:]
    return Record(case, [seconds for seconds, _ in found], peak=max(peak for _, peak in found))
