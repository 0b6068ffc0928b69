"""`stepforge batch`: a manifest of jobs to images, gone on with after whatever ended it."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepforge.runtime.checks import choice, whole
from stepforge.runtime.cli import options
from stepforge.runtime.cli.output import complain
from stepforge.runtime.cli.signals import Stopped, on_signal
from stepforge.runtime.errors import RequestError

if TYPE_CHECKING:
    from stepforge.runtime.bundle import Bundle
    from stepforge.runtime.request import Request
    from stepforge.runtime.serve.batch import Report
    from stepforge.runtime.serve.ray.pool import RayDrawer

MOST_FAILURES = 20  # lines about failed jobs; all of them are in failures.jsonl
QUALITY = 90
PAUSE = 30.0  # seconds between lines of progress where no terminal shows a bar


@options.grouped
def batch(
    bundle: options.BundlePath,
    jobs: Annotated[
        Path,
        typer.Argument(
            metavar="JOBS", help="A .jsonl, .csv or .parquet file; fields of Request, what is missing is the options'."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder of this batch.")],
    *,
    asked: options.RequestOptions,
    pictures: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the jobs' pictures are, and must be. [default: the folder of JOBS]"),
    ] = None,
    layout: Annotated[
        str, typer.Option(metavar="NAME", help="files: one an image; webdataset: tar shards; parquet: parts.")
    ] = "files",
    shard_size: Annotated[
        int, typer.Option(metavar="N", help="Jobs in a shard of webdataset or a part of parquet.")
    ] = 1000,
    image_format: Annotated[str, typer.Option("--format", metavar="NAME", help="png, webp or jpeg.")] = "png",
    quality: Annotated[int | None, typer.Option(metavar="N", help="Of WebP and JPEG, 1 to 100. [default: 90]")] = None,
    metadata: options.Metadata = True,
    max_rows: Annotated[
        int | None, typer.Option(metavar="N", help="Most denoiser rows in a call; 2 draws one image at a time.")
    ] = None,
    max_failures: Annotated[
        int | None, typer.Option(metavar="N", help="Stop once more jobs than that have failed. [default: never]")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try jobs again that failed in an earlier run.")
    ] = False,
    engine_options: options.EngineOptions,
    ray_options: options.RayOptions,
    limit_memory: Annotated[
        int | None,
        typer.Option(
            metavar="BYTES",
            parser=options.parse_bytes,
            help="Memory of jobs between manifest and disk, beside the networks, as 512M or 2G. [default: of 4 * --max-rows "
            "images]",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew; the files of an earlier batch in FOLDER go.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Draw the jobs of a manifest.

    The same command goes on where it was interrupted, killed or out of disk: what is finished is not drawn again, and the
    files are in the end those of a run that nothing interrupted. A job that fails is reported with its line and stops no
    other; the exit code is then 1. Ctrl-C and SIGTERM stop after the current step and keep what is finished.
    """
    from stepforge.runtime.engine import MAX_ROWS
    from stepforge.runtime.imaging.encode import FORMATS
    from stepforge.runtime.load import open_bundle
    from stepforge.runtime.request import Request
    from stepforge.runtime.serve.batch import Batch, Settings
    from stepforge.runtime.serve.draw import Drawer, Encoding, EngineDrawer
    from stepforge.runtime.serve.manifest import Manifest
    from stepforge.runtime.serve.ray.worker import setup
    from stepforge.runtime.serve.room import Room
    from stepforge.runtime.serve.store import LAYOUTS, Store

    choice("--layout", layout, tuple(LAYOUTS))
    choice("--format", image_format, tuple(FORMATS))
    if layout != "files" and retry_failed:
        raise RequestError("--retry-failed needs --layout files; a shard that is written stays as it is")
    if image_format == "png" and quality is not None:
        raise RequestError("--quality is for --format webp and jpeg")
    fields = asked.fields()
    stated = Request(prompt="", **fields)  # a wrong option would fail every job
    settings = Settings(
        options=fields,
        layout=layout,
        shard_size=whole("--shard-size", shard_size, 1, 1_000_000),
        encoding=Encoding(image_format, whole("--quality", QUALITY if quality is None else quality, 1, 100), metadata),
        tiling=(engine_options.tile_memory, engine_options.tiling),
    )
    rows = whole("--max-rows", MAX_ROWS if max_rows is None else max_rows, 2, 1 << 16)
    if max_failures is not None:
        whole("--max-failures", max_failures, 0, 1 << 62)
    ray_options.check()
    manifest = Manifest(jobs)
    stopped = 0
    told: list[int] = []

    def failed(line: int, reason: str) -> None:
        if len(told) < MOST_FAILURES:
            complain(f"{jobs.name}, line {line}: {reason}")
        told.append(line)

    adapters = {name: file for name, (file, _) in asked.adapters().items()}
    make_store = partial(
        Store, out, layout=settings.layout, kind=settings.encoding.format, shard_size=settings.shard_size,
        overwrite=overwrite,
    )  # fmt: skip
    with _progress() as tick, ExitStack() as opened:
        drawer: Drawer
        if ray_options.ray is None:
            engine = opened.enter_context(engine_options.load(bundle, max_rows=rows))
            for name, file in adapters.items():
                engine.adapters.load(name, file)
            model = engine.bundle
            _check_fits(stated, model)
            store = make_store()
            drawer = opened.enter_context(EngineDrawer(engine, store.files, settings.encoding))
        else:
            model = open_bundle(bundle)
            _check_fits(stated, model)
            opened.enter_context(redirect_stdout(sys.stderr))  # Ray prints what its processes complain of
            workers = opened.enter_context(_cluster(ray_options, engine_options, rows))
            store = make_store()
            workers.start(
                setup(bundle, {**asdict(engine_options), "max_rows": rows}, adapters, store.files, settings.encoding)
            )
            drawer = workers
        room = Room(4 * rows * ray_options.workers, model, limit_memory, engine_options.tile_memory)
        work = Batch(
            drawer, manifest, store, settings, pictures=(pictures or jobs.parent).absolute(), room=room,
            max_failures=max_failures, retry_failed=retry_failed, on_failure=failed, on_tick=tick,
        )  # fmt: skip

        def stop(number: int) -> None:
            nonlocal stopped
            stopped = number
            work.stop()

        with on_signal(stop):
            report = work.run()
    if len(told) > MOST_FAILURES:
        complain(f"{len(told) - MOST_FAILURES} more jobs failed; see failures.jsonl")
    _tell(report, as_json)
    if stopped:
        raise Stopped(stopped)
    if work.gave_up:
        complain(f"stopped: {report.failed} jobs failed, --max-failures is {max_failures}")
    if report.failed or report.left:
        raise typer.Exit(1)


def _check_fits(stated: Request, model: Bundle) -> None:
    """Raises RequestError for a preset or stages that the bundle has not; the rest of a plan is each job's."""
    from stepforge.runtime.plan.stages import compile_stage
    from stepforge.runtime.request.presets import resolve

    resolve(stated, model)
    for upscale in stated.upscale:
        compile_stage(upscale, model)


def _cluster(asked: options.RayOptions, engine: options.EngineOptions, rows: int) -> RayDrawer:
    """Workers to be. Raises RequestError."""
    from stepforge.runtime.serve.ray.pool import Cluster, RayDrawer

    stall = {} if asked.stall is None else {"stall": asked.stall}
    return RayDrawer(Cluster(asked.ray or "", asked.workers, engine.threads, asked.worker_gpus, depth=rows, **stall))


def _tell(report: Report, as_json: bool) -> None:
    """What the run did, on standard output."""
    values: dict[str, Any] = {
        **{name: getattr(report, name) for name in ("jobs", "done", "resumed", "failed", "left", "images")},
        "seconds": round(report.seconds, 3),
        "images_per_second": round(report.rate, 3),
        "engine_busy": round(report.busy, 4),
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # bytes, of the whole process
        "part_seconds": {part: round(value, 3) for part, value in sorted(report.parts.items())},
    }
    if as_json:
        print(json.dumps(values, indent=1))
        return
    print(
        f"{report.done} of {report.jobs} jobs done, {report.resumed} by earlier runs, {report.failed} failed, "
        f"{report.left} left"
    )
    print(
        f"{report.images} images in {report.seconds:.1f} s, {report.rate:.2f} images/s; the engine worked "
        f"{min(report.busy, 1):.1%} of the time; at most {values['peak_memory'] >> 20} MiB were in memory"
    )
    if parts := values["part_seconds"]:
        print("seconds of the parts, which overlap: " + ", ".join(f"{part} {spent:g}" for part, spent in parts.items()))


@contextmanager
def _progress() -> Iterator[Callable[[Report], None]]:
    """A bar on standard error with rate, time left and failures; where that is no terminal, a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(file=getattr(sys.stderr, "raw", sys.stderr))
    pace = _Pace()
    if not console.is_terminal:
        yield pace.line
        return
    columns = (TextColumn("jobs"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=None)

        def tick(report: Report) -> None:
            bar.update(task, completed=report.jobs - report.left, total=report.jobs, description=pace.words(report))

        yield tick


class _Pace:
    """Rate since the start of the run, and what it promises."""

    def __init__(self) -> None:
        self._started = self._told = time.monotonic()
        self._before: int | None = None  # jobs that had ended when this run began

    def words(self, report: Report) -> str:
        ended = report.jobs - report.left
        if self._before is None:
            self._before, self._started = ended, time.monotonic()
        passed, own = time.monotonic() - self._started, ended - self._before
        if not own or not passed:
            return f"{report.failed} failed"
        left = int(report.left * passed / own)
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        return f"{report.images / passed:.2f} images/s, {clock} left, {report.failed} failed"

    def line(self, report: Report) -> None:
        words = self.words(report)
        if time.monotonic() - self._told >= PAUSE:
            self._told = time.monotonic()
            complain(f"{report.jobs - report.left} of {report.jobs} jobs, {words}")
