"""`stepforge tune`: find a plan that runs fewer rows, and keep it in the bundle as a preset."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepforge.runtime.bundle import NAME
from stepforge.runtime.cli import options
from stepforge.runtime.cli.inputs import parse_controls, read_lines
from stepforge.runtime.cli.output import print_table, progress_bar
from stepforge.runtime.cli.targets import claimed
from stepforge.runtime.errors import RequestError, StepforgeError
from stepforge.runtime.files import printable, written

if TYPE_CHECKING:
    from stepforge.runtime.request import Request
    from stepforge.runtime.tune.search import Trial, Tuning

LIMIT = 0.06


def tune(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle directory.")],
    prompt_file: Annotated[
        Path, typer.Option("--prompts", metavar="FILE", help="A text file, one prompt a line; a dozen or more.")
    ],
    name: Annotated[str, typer.Option(metavar="NAME", help="Name of the preset, for --plan.")] = "fast",
    steps: options.Steps = 20,
    guidance: Annotated[
        float, typer.Option("--guidance", "-g", metavar="W", help="Guidance weight of the full plan.")
    ] = 7.5,
    sampler: options.Sampler = None,
    seeds: Annotated[int, typer.Option(metavar="N", help="Images for each prompt.")] = 1,
    limit: Annotated[
        float, typer.Option(metavar="D", help="Largest mean distance to the full plan's pictures, 0 to 1.")
    ] = LIMIT,
    budget: Annotated[int, typer.Option(metavar="N", help="Most images to draw.")] = 400,
    parts: Annotated[
        str,
        typer.Option(metavar="LIST", help="What may change: guidance,tgate,deepcache,control. [default: all there is]"),
    ] = "",
    control: options.ControlTexts = None,
    preprocessor: options.Preprocessor = "none",
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the frontier into a .png file, replacing it if it exists."),
    ] = None,
    backend: options.Backend = "auto",
    precision: options.Precision = "auto",
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Find a cheaper plan whose pictures stay close to the full plan's, and store it in the bundle as a preset.

    Tries guidance windows, ControlNet windows and reuse variants by drawing the prompts with them.
    """
    from stepforge.runtime.load import load
    from stepforge.runtime.request import Request
    from stepforge.runtime.request.presets import store
    from stepforge.runtime.tune.search import tune as search

    _check(bundle, name, limit, plot)
    prompts = [prompt for _, prompt in read_lines(prompt_file)]
    requests = [
        Request(
            prompt=prompt, steps=steps, guidance=guidance, sampler=sampler, images=seeds, seed=i * seeds,
            controls=parse_controls(control or (), preprocessor, "0..1", False),  # type: ignore[arg-type]
        )
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    chosen_parts = [part.strip() for part in parts.split(",")] if parts else []
    with claimed({"--plot": [plot] if plot else []}, overwrite=True):
        with (
            load(bundle, backend=backend, precision=precision, threads=threads) as engine,
            progress_bar("drawing", lambda: budget) as bar,
        ):
            tuning = search(engine, requests, limit=limit, budget=budget, parts=chosen_parts, on_image=bar)
        machine = f"{engine.backend.name} {engine.backend.precision}"
        if tuning.chosen is not None:
            store(engine.bundle, name, preset_of(tuning, requests, prompts, machine))
        if as_json:
            preset = None if tuning.chosen is None else name
            print(json.dumps({**summary(tuning, requests[0]), "preset": preset}, indent=1))
        else:
            _print(tuning, requests[0], machine)
        if plot is not None:
            _write_plot(tuning, plot)
    if tuning.chosen is None:
        raise StepforgeError(
            f"no cheaper plan stays within {limit:g}; raise --limit or --budget (no preset is written)"
        )
    if not as_json:
        print(f"stored as {name}: `stepforge generate {bundle} PROMPT --plan {name}`")


def _check(bundle: Path, name: str, limit: float, plot: Path | None) -> None:
    """What would be noticed only after the search. Raises RequestError."""
    if str(bundle) == "fake":
        raise RequestError("the test model has no files that a preset could be stored in")
    if not 0.0 < limit < 1.0:
        raise RequestError(f"--limit is {limit:g}; a distance lies between 0 and 1")
    if not NAME.fullmatch(name):
        raise RequestError(f"preset name {printable(name)!r} is not allowed; use letters, digits, ., - and _")
    if bundle.is_dir() and not os.access(bundle, os.W_OK):
        raise RequestError(f"{printable(bundle)} cannot be written to, and the preset is stored in it")
    if plot is not None:
        from stepforge.runtime.tune.plot import check_matplotlib

        check_matplotlib()


def _write_plot(tuning: Tuning, plot: Path) -> None:
    from stepforge.runtime.tune.plot import plot_frontier

    with written(plot, overwrite=True) as file:
        file.write(plot_frontier(tuning))


def preset_of(tuning: Tuning, requests: list[Request], prompts: list[str], machine: str) -> dict[str, Any]:
    """The chosen plan as presets.py stores it, with what was measured."""
    chosen, base = tuning.chosen, requests[0]
    assert chosen is not None
    found = {
        "prompts": len(requests),
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "seeds": base.images,
        "steps": base.steps,
        "sampler": base.sampler or "model's own",
        "controls": [control.name for control in base.controls],
        "backend": machine,
        "limit": tuning.limit,
        "distance": round(chosen.distance, 4),
        "rows": chosen.rows,
        "rows_full": tuning.full.rows,
        "cost": round(chosen.cost, 2),
        "cost_full": round(tuning.full.cost, 2),
    }
    return {**chosen.candidate.preset(base), "found": found}


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
