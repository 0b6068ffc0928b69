"""Records as rows, a Markdown page, JSON, and a plot."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from suite.cases import REFERENCE, Case, Record, Store
from suite.items import ITEMS, item

# dB to the reference's image: below it somebody draws something else. fp32: rounding to 8 bits alone is 58.9 dB, and engines
# sum in other orders; bf16 has 8 bits of significand; INT8 is approximate, and said to be
LIMITS = {"fp32": 40.0, "fp16": 30.0, "bf16": 25.0, "int8": 15.0}
HEAD = "| model | runner | precision | median | ratio | likeness | load | peak |"
NOBODYS = "bank without adapter"
UNSEEN = (
    "parity",
    "export",
    "overhead",
    "swap",
    "cold_start",
    "imports",
)  # nothing is drawn, or images are not compared


def reference(record: Record, records: Sequence[Record]) -> Record | None:
    """The record that another is compared with: diffusers' fp32 of the same item and model, and of the same kind of adapter."""
    _, _, kind = record.case.runner.partition(", ")
    own = [
        other
        for other in records
        if (other.case.item, other.case.model, other.case.precision) == (record.case.item, record.case.model, "fp32")
        and other.case.runner.startswith((REFERENCE, "spandrel"))
        and "compile" not in other.case.runner
        and not other.refused
    ]
    if (not own and record.case.item == "int8") or kind == NOBODYS:  # what txt2img draws
        return next((r for r in records if r.case == Case("txt2img", record.case.model, REFERENCE)), None)
    same = [other for other in own if other.case.runner.partition(", ")[2] == kind]
    return (same or own or [None])[0]


def likeness(record: Record, base: Record, store: Store) -> float | None:
    """PSNR in dB of the worst image; None where there are none, or others are meant."""
    ours, theirs = store.image(record.case), store.image(base.case)
    if record.case.item in UNSEEN or not (ours.exists() and theirs.exists()):
        return None
    a, b = np.load(ours).astype(np.float64), np.load(theirs).astype(np.float64)
    errors = [float(np.mean((one - other) ** 2)) for one, other in zip(a, b, strict=True)]
    return round(10 * np.log10(1 / max(*errors, 1e-12)), 1)


def rows(records: Sequence[Record], store: Store) -> list[dict[str, Any]]:
    """One row a case; `ratio` is how many times as fast as the reference it is, where the images are the same."""
    found = []
    for record in records:
        case = record.case
        row: dict[str, Any] = {
            "key": case.key, "item": case.item, "model": case.model, "runner": case.runner, "precision": case.precision,
            "machine": record.machine, "commit": record.commit, "command": record.command,
        }  # fmt: skip
        if record.refused:
            found.append({**row, "refused": record.refused})
            continue
        row |= {
            **record.notes, "unit": record.unit, "median": statistics.median(record.seconds), "low": min(record.seconds),
            "high": max(record.seconds), "runs": len(record.seconds), "load": record.load, "peak": record.peak,
            "weights": record.weights,
        }  # fmt: skip
        base = reference(record, records)
        if base is not None and record.unit == "s":
            row["psnr"] = None if base is record else likeness(record, base, store)
            if row["psnr"] is not None and row["psnr"] < LIMITS[case.precision]:
                row["differs"] = True
            else:
                row["ratio"] = round(statistics.median(base.seconds) / row["median"], 3)
        found.append(row)
    return found


def cells(row: dict[str, Any]) -> str:
    name = f"| {row['model']} | {row['runner']} | {row['precision']} |"
    if "refused" in row:
        return f"{name} {row['refused'].replace('|', '/')} | | | | |"
    if row["unit"] == "%":
        time = f"{row['median']:.2f} % ({row['low']:.2f}..{row['high']:.2f})"
    else:
        time = f"{row['median']:.4g} s ({row['low']:.4g}..{row['high']:.4g})"
    ratio = "another image" if row.get("differs") else f"{row['ratio']:.2f}" if "ratio" in row else ""
    likeness = "" if row.get("psnr") is None else f"{row['psnr']:.1f} dB"
    peak = f"{row['peak'] / 1e9:.2f} GB" if row["peak"] else ""
    if peak and row["weights"]:
        peak += f", {row['peak'] / row['weights']:.2f} x weights"
    load = "" if row["load"] is None else f"{row['load']:.2f} s"
    return f"{name} {time} | {ratio} | {likeness} | {load} | {peak} |"


def markdown(profile: str, records: Sequence[Record], store: Store) -> str:
    told = rows(records, store)
    wall = sum(record.notes.get("wall", 0) for record in records)
    commits = ", ".join(dict.fromkeys(record.commit for record in records))
    lines = [
        f"# Benchmarks, {profile}",
        "",
        f"Commit {commits}; {records[0].machine}. Command: `{records[0].command}`; {wall / 60:.1f} minutes in all.",
        "Median (lowest..highest) of the counted runs. Ratio: times as fast as diffusers in fp32 on the same work, given only "
        "where the image is the same (PSNR to diffusers' own, worst image). Peak: resident memory of the case's process, "
        "mapped files counted; of an export, its tree of processes, beside the UNet's weights.",
    ]
    for name in ITEMS:
        own = [row for row in told if row["item"] == name]
        if own:
            lines += ["", f"## {item(name).TITLE}", "", HEAD, "|---|---|---|---|---|---|---|---|", *map(cells, own)]
    return "\n".join(lines) + "\n"


def write(profile: str, records: Sequence[Record], store: Store, out: Path) -> None:
    told = rows(records, store)
    (out / f"{profile}.md").write_text(markdown(profile, records, store) + f"\n![ratios]({profile}.png)\n", "utf-8")
    (out / f"{profile}.json").write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    plot(told, out / f"{profile}.png")


def plot(told: Sequence[dict[str, Any]], path: Path) -> None:
    """Ratios by item and model as bars from 1, and peaks of memory beside them."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    drawn = [row for row in told if "ratio" in row and row["item"] not in ("parity", "export")]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in drawn:
        groups.setdefault(f"{item(row['item']).TITLE}: {row['model']}", []).append(row)
    labels, ratios, peaks, colours, heads = [], [], [], [], []
    for title, own in groups.items():
        heads.append((len(labels), title))
        labels.append("")
        ratios.append(0.0)
        peaks.append(0.0)
        colours.append("none")
        for row in own:
            labels.append(f"{row['runner']} {row['precision']}")
            ratios.append(row["ratio"])
            peaks.append(row["peak"] / 1e9)
            colours.append("#c2410c" if "stepforge" in row["runner"] else "#64748b")
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(13, 1 + 0.23 * len(labels)), sharey=True, width_ratios=(2, 1)
    )
    places = list(range(len(labels)))
    for axis, values, what in (
        (left, ratios, "times as fast as diffusers fp32"),
        (right, peaks, "peak resident memory, GB"),
    ):
        start = 1.0 if axis is left else 0.0
        axis.barh(places, [value - start if value else 0.0 for value in values], left=start, color=colours, height=0.72)
        axis.set_xlabel(what)
        axis.spines[["top", "right"]].set_visible(False)
        for place, value in zip(places, values, strict=True):
            if value:
                side = 1 if value >= start else -1
                axis.annotate(
                    f"{value:.3g}", (value, place), (3 * side, 0), textcoords="offset points", va="center",
                    ha="left" if side > 0 else "right", fontsize=7,
                )  # fmt: skip
    left.set_xscale("log")
    for told_by in (left.xaxis.set_major_formatter, left.xaxis.set_minor_formatter):
        told_by(ticker.FuncFormatter(lambda value, place: f"{value:g}"))
    left.margins(x=0.1)
    left.axvline(1, color="black", linewidth=0.8)
    left.set_yticks(places, labels, fontsize=8)
    for place, title in heads:
        left.text(0, place, title, transform=left.get_yaxis_transform(), fontsize=9, weight="bold", va="center")
    left.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
