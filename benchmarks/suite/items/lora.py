"""Text to image with one adapter: apart from the weights (a bank), merged into them, and a bank that nobody uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from suite.cases import Case, Record
from suite.items import Context, draw_and_time

TITLE = "One LoRA adapter of rank 16"
KINDS = {"apart": "full", "merged": "merged", "bank without adapter": "full"}


def cases(quick: bool, precisions: Sequence[str]) -> list[Case]:
    found = []
    for model in ("demo",) if quick else ("demo", "sd15"):
        kinds = [kind for kind in KINDS if model == "demo" or kind != "merged"]
        for precision in precisions:
            found += [Case("lora", model, f"diffusers, {kind}", precision) for kind in kinds[:2]]
            found += [Case("lora", model, f"stepforge openvino, {kind}", precision) for kind in kinds]
        if not quick:
            found += [Case("lora", model, f"stepforge onnxruntime, {kind}") for kind in kinds]
    return found


def measure(case: Case, context: Context) -> Record:
    runner, _, kind = case.runner.partition(", ")
    adapters = () if kind == "bank without adapter" else (("poster", 1.0),)
    workload = replace(context.workload(case), adapters=adapters)
    record = draw_and_time(replace(case, runner=runner), context, [workload], KINDS[kind])
    record.case = case
    return record
