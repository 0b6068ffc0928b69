"""The gate: `stepforge verify` of the demo model on both engines. Without its pass there are no figures of speed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence

from suite.cases import Case, Record
from suite.items import Context
from suite.models import EMOJI, export_command, run

TITLE = "Parity with diffusers (the gate)"


def cases(quick: bool, precisions: Sequence[str]) -> list[Case]:
    return [Case("parity", "demo", f"stepforge {engine}", "fp32") for engine in ("openvino", "onnxruntime")]


def measure(case: Case, context: Context) -> Record:
    model = context.model("demo")
    bundle = model.bundle("full")
    if not bundle.exists():
        run(export_command(model, "full"))
    command = [
        sys.executable, "-m", "stepforge.runtime", "verify", bundle, model.folder, "--backend", case.runner.split()[1],
        "--precision", case.precision, "--steps", "10", "--control", f"{model.control_name}={model.control}", "--json",
        *(("--prompt", context.workload(case).prompt) if context.quick else ()),
    ]  # fmt: skip
    started = time.perf_counter()
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"parity failed: {(done.stderr or done.stdout)[-500:]}")
    verdict = json.loads(done.stdout)
    image = [check.get("value") for check in verdict.get("checks", []) if "image" in str(check.get("name"))]
    return Record(case, [seconds], notes={"passed": True, "images": image, "model": str(EMOJI.name)})
