"""Guidance in the first half of the steps: the other half runs one row. diffusers by the recipe of its guide to callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from suite.cases import Case, Record
from suite.items import OURS, Context, draw_and_time

TITLE = "Guidance in the first half of the steps"


def cases(quick: bool, precisions: Sequence[str]) -> list[Case]:
    models = ("demo",) if quick else ("demo", "sd15")
    return [Case("interval", model, name) for model in models for name in ("diffusers", *(OURS[:1] if quick else OURS))]


def measure(case: Case, context: Context) -> Record:
    return draw_and_time(case, context, [replace(context.workload(case), guided=0.5)])
