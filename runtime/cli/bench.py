"""`stepforge bench`: how fast a bundle draws on this machine."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepforge.runtime.checks import whole
from stepforge.runtime.cli import options
from stepforge.runtime.cli.output import print_table, progress_bar
from stepforge.runtime.files import printable

if TYPE_CHECKING:
    from stepforge.runtime.tune.speed import Line

PROMPT = "a photograph of a cat sitting on a wooden table"


@options.grouped
def bench(
    bundle: options.BundlePath,
    *,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What is drawn.")] = PROMPT,
    width: options.Pixels = None,
    height: options.Pixels = None,
    asked: options.PlanOptions,
    images: Annotated[int, typer.Option(metavar="N", help="Images at once, beside one at a time.")] = 8,
    runs: Annotated[int, typer.Option(metavar="N", help="Counted runs of each.")] = 5,
    engine_options: options.EngineOptions,
    max_rows: Annotated[int | None, typer.Option(metavar="N", help="Most denoiser rows in a call.")] = None,
    unverified: Annotated[bool, typer.Option("--unverified", help="Also without parity, which is then told.")] = False,
    as_json: options.Json = False,
) -> None:
    """Say how fast a bundle draws on this machine, once `stepforge verify` has passed on the same backend and precision."""
    from stepforge.runtime.engine import MAX_ROWS
    from stepforge.runtime.engine.warm_up import masked
    from stepforge.runtime.errors import BundleError
    from stepforge.runtime.request import Request
    from stepforge.runtime.tune.speed import check_verified, machine, measure, peak_memory

    whole("--images", images, 1, 1024)
    whole("--runs", runs, 1, 1000)
    rows = whole("--max-rows", MAX_ROWS if max_rows is None else max_rows, 2, 1 << 16)
    request = Request(prompt=prompt, width=width, height=height, **asked.fields())
    started = time.perf_counter()
    with engine_options.load(bundle, max_rows=rows) as engine:
        loaded = time.perf_counter() - started
        backend, request = engine.backend, masked(request, engine.bundle)
        parity = "passed"
        try:
            check_verified(engine.bundle, backend.name, backend.precision)
        except BundleError:
            if not unverified:
                raise
            parity = "not verified on this backend and precision"
        started = time.perf_counter()
        engine.generate(request)
        first = time.perf_counter() - started
        size = engine.size(request)
        total = (runs + 1) * (1 + images * (images > 1))
        with progress_bar("drawing", lambda: total) as bar:
            lines = measure(engine, request, images=images, runs=runs, on_image=bar)
        found = {
            "stepforge": version("stepforge"),
            "machine": machine(engine),
            "model": engine.bundle.card.name,
            "bundle": engine.bundle.digest,
            "parity": parity,
            "backend": backend.name,
            "precision": backend.precision,
            "width": size.width,
            "height": size.height,
            "steps": len(engine.plan(request).steps),
            "runs": runs,
            "load_seconds": round(loaded, 3),
            "first_image_seconds": round(first, 3),
            "peak_memory_bytes": peak_memory(),
            "lines": [_told(line) for line in lines],
        }
    if as_json:
        print(json.dumps(found, indent=1))
        return
    print(
        f"{printable(str(found['model']))}, {size.width}x{size.height}, {found['steps']} steps, {backend.name} "
        f"{backend.precision}, parity {parity}\n{printable(str(found['machine']), 500)}\n"
        f"loaded in {loaded:.2f} s, first image {first:.2f} s, peak memory {peak_memory() / 2**20:.0f} MiB"
    )
    print_table([_row(line) for line in lines])


def _told(line: Line) -> dict[str, Any]:
    """A line for JSON, which has no NaN."""
    values = {**asdict(line), "images_per_second": line.rate}
    values = {name: round(value, 5) if isinstance(value, float) else value for name, value in values.items()}
    return {**values, "outside": None if math.isnan(line.outside) else values["outside"]}


def _row(line: Line) -> dict[str, Any]:
    return {
        "what": line.name,
        "seconds": round(line.median, 3),
        "lowest": round(line.low, 3),
        "highest": round(line.high, 3),
        "images/s": round(line.rate, 3),
        "rows": line.rows,
        "denoisers %": round(100 * line.networks, 1),
        "outside %": "" if math.isnan(line.outside) else round(100 * line.outside, 1),
    }
