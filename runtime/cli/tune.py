"""`stepforge tune`: find a plan that runs fewer rows, and keep it in the bundle as a preset."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image, ImageDraw, ImageFont

from stepforge.runtime.bundle import NAME
from stepforge.runtime.cli.inputs import parse_controls, read_lines
from stepforge.runtime.cli.table import print_table
from stepforge.runtime.errors import RequestError, StepforgeError

if TYPE_CHECKING:
    from stepforge.runtime.request import Request
    from stepforge.runtime.tune.search import Trial, Tuning

LIMIT = 0.06


def tune(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle directory.")],
    prompt_file: Annotated[Path, typer.Option("--prompts", help="A text file, one prompt a line; a dozen or more.")],
    name: Annotated[str, typer.Option(help="Of the preset, for --plan.")] = "fast",
    steps: Annotated[int, typer.Option("--steps", "-n", help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option("--guidance", "-g", help="Weight of the full plan.")] = 7.5,
    sampler: Annotated[str | None, typer.Option(help="Sampler. [default: model's]")] = None,
    seeds: Annotated[int, typer.Option(help="Images for each prompt.")] = 1,
    limit: Annotated[float, typer.Option(help="Largest mean distance to the full plan's pictures, 0 to 1.")] = LIMIT,
    budget: Annotated[int, typer.Option(help="Most images to draw.")] = 400,
    parts: Annotated[
        str, typer.Option(help="What may change: guidance,tgate,deepcache,control. [default: all that there is]")
    ] = "",
    control: Annotated[
        list[str] | None, typer.Option(metavar="NAME=IMAGE[:SCALE]", help="Tune with this ControlNet; repeatable.")
    ] = None,
    preprocessor: Annotated[str, typer.Option(help="Makes hints of the images, as in `generate`.")] = "none",
    plot: Annotated[Path | None, typer.Option(help="Write the frontier as a .png picture.")] = None,
    backend: Annotated[str, typer.Option(help="auto, openvino, onnxruntime, torch, torch-exact or fake.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16, or fp16 (torch on CUDA).")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Processor threads. [default: all that may be used]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Find a cheaper plan whose pictures stay close to the full plan's, and store it in the bundle as a preset.

    Tries guidance windows, ControlNet windows and reuse variants by drawing the prompts with them.
    """
    from stepforge.runtime.load import load
    from stepforge.runtime.presets import store
    from stepforge.runtime.request import Request
    from stepforge.runtime.tune.search import tune as search

    if str(bundle) == "fake":
        raise RequestError("the test model has no files that a preset could be stored in")
    if not 0.0 < limit < 1.0:
        raise RequestError(f"--limit is {limit:g}; a distance lies between 0 and 1")
    if not NAME.fullmatch(name):
        raise RequestError(f"preset name {name!r} is not allowed; use letters, digits, ., - and _")
    if plot is not None and (plot.suffix.lower() != ".png" or not plot.parent.is_dir()):
        raise RequestError(f"--plot {plot} is no .png file in an existing folder")
    lines = read_lines(prompt_file)
    controls = parse_controls(control or (), preprocessor, "0..1", False)
    requests = [
        Request(
            prompt=prompt, steps=steps, guidance=guidance, sampler=sampler, images=seeds, seed=i * seeds,
            controls=controls,  # type: ignore[arg-type]  # mappings are taken too
        )
        for i, (_, prompt) in enumerate(lines)
    ]  # fmt: skip
    chosen_parts = [part.strip() for part in parts.split(",")] if parts else []
    with load(bundle, backend=backend, precision=precision, threads=threads) as engine, _bar(budget) as on_image:
        tuning = search(engine, requests, limit=limit, budget=budget, parts=chosen_parts, on_image=on_image)
        opened, machine = engine.bundle, f"{engine.backend.name} {engine.backend.precision}"
    if plot is not None:
        draw_frontier(tuning).save(plot)
    if as_json:
        print(json.dumps({**summary(tuning, requests[0]), "preset": name if tuning.chosen else None}, indent=1))
    else:
        _print(tuning, requests[0], machine)
    if (chosen := tuning.chosen) is None:
        raise StepforgeError(
            f"no cheaper plan stays within {limit:g}; raise --limit or --budget (no preset is written)"
        )
    found = {
        "prompts": len(requests),
        "prompts_sha256": hashlib.sha256("\n".join(prompt for _, prompt in lines).encode()).hexdigest(),
        "seeds": seeds,
        "steps": steps,
        "sampler": sampler or "model's own",
        "controls": [c.name for c in requests[0].controls],
        "backend": machine,
        "limit": limit,
        "distance": round(chosen.distance, 4),
        "rows": chosen.rows,
        "rows_full": tuning.full.rows,
        "cost": round(chosen.cost, 2),
        "cost_full": round(tuning.full.cost, 2),
    }
    store(opened, name, {**chosen.candidate.preset(requests[0]), "found": found})
    if not as_json:
        print(f"stored as {name}: `stepforge generate {bundle} PROMPT --plan {name}`")


def row_of(trial: Trial, tuning: Tuning, base: Request) -> dict[str, Any]:
    """A trial as printable values."""
    preset = trial.candidate.preset(base)
    window = {"control": f"{preset['control_start']:g}..{preset['control_end']:g}"} if base.controls else {}
    return {
        "rows": trial.rows,
        "cost": round(trial.cost, 2),
        "saved %": round(100 * (1 - trial.cost / tuning.full.cost), 1),
        "distance": round(trial.distance, 4),
        "worst": round(trial.worst, 4),
        "guidance": preset["guidance"],
        "reuse": preset["reuse"],
        **window,
    }


def summary(tuning: Tuning, base: Request) -> dict[str, Any]:
    """What was found, for JSON."""
    return {
        "prices": dict(tuning.prices),
        "images": tuning.images,
        "limit": tuning.limit,
        "unlike": tuning.unlike,
        "trials": [row_of(trial, tuning, base) for trial in (tuning.full, *tuning.trials)],
        "frontier": [row_of(trial, tuning, base) for trial in tuning.frontier],
        "chosen": row_of(tuning.chosen, tuning, base) if tuning.chosen else None,
    }


def _print(tuning: Tuning, base: Request, machine: str) -> None:
    prices = ", ".join(f"{label} {price:g}" for label, price in tuning.prices.items())
    print(f"cost of a row on {machine}: {prices}")
    print_table(
        [{"": "*" if trial is tuning.chosen else "", **row_of(trial, tuning, base)} for trial in tuning.frontier],
        left=("guidance", "reuse"),
    )
    unlike = "" if tuning.unlike is None else f"; pictures of different prompts are {tuning.unlike:.3f} apart"
    print(f"{tuning.images} images drawn; distances within {tuning.limit:g} are allowed{unlike}")


def draw_frontier(tuning: Tuning, width: int = 640, height: int = 400) -> Image.Image:
    """All trials as dots, cost to the right and distance upwards; the frontier as a line, the chosen one as a ring."""
    picture = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    left, right, top, bottom = 64, width - 16, 24, height - 44
    trials = (tuning.full, *tuning.trials)
    most, far = tuning.full.cost, 1.1 * max(tuning.limit, *(trial.distance for trial in trials))

    def place(cost: float, away: float) -> tuple[float, float]:
        return left + (right - left) * cost / most, bottom - (bottom - top) * away / far

    for share in range(0, 101, 20):
        x = place(most * share / 100, 0)[0]
        draw.line((x, top, x, bottom), "#e4e4e4")
        draw.text((x, bottom + 6), f"{most * share / 100:.0f}", "black", font, anchor="mt")
        y = place(0, far * share / 100)[1]
        draw.line((left, y, right, y), "#e4e4e4")
        draw.text((left - 6, y), f"{far * share / 100:.3f}", "black", font, anchor="rm")
    y = place(0, tuning.limit)[1]
    draw.line((left, y, right, y), "#c02020", 2)
    draw.text((right - 4, y - 3), "limit", "#c02020", font, anchor="rb")
    draw.line([place(trial.cost, trial.distance) for trial in tuning.frontier], "#2060c0", 2)
    for trial in trials:
        x, y = place(trial.cost, trial.distance)
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), "#2060c0" if trial in tuning.frontier else "#a0a0a0")
        if trial is tuning.chosen:
            draw.ellipse((x - 8, y - 8, x + 8, y + 8), outline="#c02020", width=2)
    draw.text(((left + right) / 2, height - 6), "cost of an image, in rows of the whole denoiser", "black", font, "mb")
    draw.text((left, 6), "mean distance to the full plan's pictures", "black", font, "lt")
    return picture


class _bar:
    """A progress bar on a terminal's standard error; entering gives the callback."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._progress = Progress(console=console, disable=not sys.stderr.isatty())
        self._task = self._progress.add_task("drawing", total=total)

    def __enter__(self) -> Any:
        self._progress.start()
        return lambda images: self._progress.update(self._task, completed=images)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
