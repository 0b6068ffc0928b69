"""Runs side by side: a line of JSON each, compared by ratio, which a slower hour of the machine leaves alone."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def append(path: Path, profile: str, rows: Sequence[dict[str, Any]]) -> None:
    """One run's ratios by case, with its commit and machine, in the place of an earlier report of the same run."""
    line = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "profile": profile,
        "commit": rows[0]["commit"],
        "machine": rows[0]["machine"],
        "ratios": {row["key"]: row["ratio"] for row in rows if row.get("ratio")},
    }
    same = ("profile", "commit", "machine")
    kept = [old for old in read(path) if any(old[key] != line[key] for key in same)]
    path.write_text("".join(json.dumps(one) + "\n" for one in [*kept, line]), "utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def compare(path: Path, profile: str, tolerance: float) -> int:
    """Print the newest run beside the one before it on the same machine; 1 if a ratio of ours fell by more than tolerance."""
    runs = [line for line in read(path) if line["profile"] == profile]
    before = [run for run in runs[:-1] if run["machine"] == runs[-1]["machine"]]
    if not before:
        print("no two runs of this profile on one kind of machine")
        return 0
    old, new = before[-1], runs[-1]
    print(f"{'ratio to diffusers':60}{old['commit']:>10}{new['commit']:>10}")
    fallen = 0
    for key, ratio in new["ratios"].items():
        was = old["ratios"].get(key)
        if was is None:
            continue
        low = "stepforge" in key and ratio < (1 - tolerance) * was
        fallen += low
        print(f"{key:60}{was:10.2f}{ratio:10.2f}{'  fell' if low else ''}")
    return 1 if fallen else 0
