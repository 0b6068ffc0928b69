"""The demo model's image in INT8 beside fp32, on both engines; its quality is `int8_quality.py`'s to say."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from suite.cases import Case, Record
from suite.items import Context, draw_and_time
from suite.models import EMOJI, ready, run

TITLE = "INT8 (approximate)"


def cases(quick: bool, precisions: Sequence[str]) -> list[Case]:
    if quick:
        return []
    return [Case("int8", "demo", f"stepforge {engine}", "int8") for engine in ("openvino", "onnxruntime")]


def measure(case: Case, context: Context) -> Record:
    model = context.model("demo")
    bundle = model.bundle("int8")
    if not ready(bundle):
        command = [
            sys.executable, "-m", "stepforge.runtime", "quantize", model.bundle(), "-o", bundle, "--prompts",
            EMOJI / "prompts.txt", "--guidance", "3", "--steps", "8",
        ]  # fmt: skip
        run([*map(str, command)])
    return draw_and_time(case, context, [context.workload(case)], "int8")
