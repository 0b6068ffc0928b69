"""`stepforge generate`: prompts to PNG files, each written when it is ready."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepforge.runtime.checks import whole
from stepforge.runtime.cli import options
from stepforge.runtime.cli.inputs import read_requests
from stepforge.runtime.cli.output import complain, progress_bar
from stepforge.runtime.cli.signals import Stopped, on_signal
from stepforge.runtime.cli.targets import claimed
from stepforge.runtime.errors import Cancelled, RequestError
from stepforge.runtime.files import escaped, printable

if TYPE_CHECKING:
    from stepforge.runtime.engine import Engine, Outcome
    from stepforge.runtime.imaging.sheet import Sheet
    from stepforge.runtime.request import Request, Result

MOST_FAILURES = 20  # lines about failed images


@options.grouped
def generate(
    bundle: options.BundlePath,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="One or more prompts.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="A text file, one prompt a line.")
    ] = None,
    request_file: Annotated[
        Path | None,
        typer.Option(
            "--requests",
            metavar="FILE",
            help="A JSON-lines file; fields of Request, what is missing comes from the options.",
        ),
    ] = None,
    *,
    asked: options.RequestOptions,
    seed: Annotated[int, typer.Option(metavar="N", help="Image i of a prompt uses seed + i.")] = 0,
    out: options.Out = Path("out"),
    engine_options: options.EngineOptions,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write all images as one contact sheet.")
    ] = None,
    columns: Annotated[
        int | None, typer.Option(metavar="N", help="Images in a row of the sheet. [default: about square]")
    ] = None,
    metadata: options.Metadata = True,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Draw images from prompts.

    Each image is written as soon as it is ready. If one fails, the others are written all the same; failures are reported
    at the end and make the exit code 1. Ctrl-C and SIGTERM stop after the current step and keep what is finished.

    Compiled networks are kept in the folder that STEPFORGE_CACHE names, or ~/.cache/stepforge; STEPFORGE_CACHE= keeps none.
    """
    from stepforge.runtime.imaging.save import image_paths

    if columns is not None and sheet is None:
        raise RequestError("--columns needs --sheet")
    if columns is not None:
        whole("--columns", columns, 1, 1 << 16)
    requests = read_requests(prompts, prompt_file, request_file, {**asked.fields(), "seed": seed})
    singles = [
        (index, replace(request, images=1, seed=request.seed + i))
        for index, request in enumerate(requests)
        for i in range(request.images)
    ]
    paths = image_paths(out, [(index, request.seed) for index, request in singles])
    targets = {"--out": paths, "--sheet": [sheet] if sheet else []}
    with claimed(targets, overwrite=overwrite), engine_options.load(bundle) as engine:
        for name, (file, _) in asked.adapters().items():
            engine.adapters.load(name, file)
        drawing = Drawing(paths, metadata=metadata, overwrite=overwrite, quiet=as_json)
        if sheet is not None:
            drawing.sheet = _sheet(engine, [request for _, request in singles], columns)
        drawing.run(engine, [request for _, request in singles])
        if sheet is not None and drawing.done and not drawing.signal:
            drawing.write_sheet(sheet)
    if as_json:
        print(json.dumps(rows_of(requests, [index for index, _ in singles], drawing), indent=1))
    drawing.report()


@dataclass(slots=True)
class Drawing:
    """Images on their way to their files."""

    paths: Sequence[Path]
    metadata: bool
    overwrite: bool
    quiet: bool  # no paths on standard output
    sheet: Sheet | None = None
    done: dict[int, dict[str, Any]] = field(default_factory=dict)  # image -> facts of what was written
    failures: dict[int, Exception] = field(default_factory=dict)
    sheet_failure: str = ""
    signal: int = 0

    def run(self, engine: Engine, requests: Sequence[Request]) -> None:
        """Write each image when it is ready. Raises RequestError, before anything is computed, for a wrong request."""
        with (
            progress_bar("denoising", lambda: sum(steps_of(engine, request) for request in requests)) as bar,
            _closer(engine) as close,
        ):

            def stop(number: int) -> None:
                self.signal = number
                close()

            with on_signal(stop):
                for outcome in engine.stream(requests, on_step=_Counter(bar) if bar else None):
                    self._take(outcome, close)

    def _take(self, outcome: Outcome, close: Callable[[], None]) -> None:
        """Write an image, or note why there is none."""
        try:
            if outcome.error is not None:
                raise outcome.error
            assert outcome.result is not None
            self._write(outcome.index, outcome.result)
        except OSError as error:  # the next image would meet it too; what is finished is still tried
            self.failures[outcome.index] = error
            close()
        except Exception as error:
            self.failures[outcome.index] = error

    def _write(self, index: int, result: Result) -> None:
        from stepforge.runtime.imaging.metadata import describe_image
        from stepforge.runtime.imaging.png import save_png

        path, (image,) = self.paths[index], result.images
        save_png(image, path, describe_image(result, 0) if self.metadata else None, overwrite=self.overwrite)
        self.done[index] = {"file": str(path), "seed": result.seeds[0], "model": result.model,
                            "digest": result.digest, "stats": asdict(result.stats)}  # fmt: skip
        if self.sheet is not None:
            self.sheet.place(index, image)
        if not self.quiet:
            print(escaped(str(path)))

    def write_sheet(self, path: Path) -> None:
        from stepforge.runtime.imaging.png import save_png

        assert self.sheet is not None
        try:
            save_png(self.sheet.picture, path, None, overwrite=self.overwrite)
        except (OSError, RequestError) as error:
            self.sheet_failure = f"{printable(path)}: {_reason(error)}"

    def report(self) -> None:
        """What failed, one line each, and the exit code."""
        told = [index for index, error in sorted(self.failures.items()) if not isinstance(error, Cancelled)]
        for index in told[:MOST_FAILURES]:
            complain(f"{printable(self.paths[index])}: {_reason(self.failures[index])}")
        if len(told) > MOST_FAILURES:
            complain(f"{len(told) - MOST_FAILURES} more images failed")
        if self.sheet_failure:
            complain(self.sheet_failure)
        if self.failures and len(self.paths) > 1:
            complain(f"{len(self.done)} of {len(self.paths)} images are written")
        if self.signal:
            raise Stopped(self.signal)
        if self.failures or self.sheet_failure:
            raise typer.Exit(1)


def steps_of(engine: Engine, request: Request) -> int:
    """Denoising steps of an image, in all its stages."""
    return sum(len(plan.steps) for _, plan in engine.plans(request))


class _Counter:
    """Denoising steps of all images so far, for the bar."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._steps = bar, 0

    def __call__(self, _: object) -> None:
        self._steps += 1
        self._bar(self._steps)


@contextmanager
def _closer(engine: Engine) -> Iterator[Callable[[], None]]:
    """A function that closes the engine from a thread of its own: a signal's handler may hold any lock. What is finished
    then still comes out of `Engine.stream`, what is not fails with Cancelled."""
    orders: queue.SimpleQueue[bool] = queue.SimpleQueue()  # its `put` is reentrant

    def wait() -> None:
        if orders.get():
            engine.close()

    thread = threading.Thread(target=wait, name="stepforge-close")
    thread.start()
    try:
        yield partial(orders.put, True)
    finally:
        orders.put(False)
        thread.join()


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be written: {error.strerror}"
    return "out of memory" if isinstance(error, MemoryError) else str(error) or type(error).__name__


def _sheet(engine: Engine, requests: Sequence[Request], columns: int | None) -> Sheet:
    from stepforge.runtime.imaging.sheet import LABEL_ROOM, Sheet

    sizes = [engine.size(request) for request in requests]
    cell = max(size.width for size in sizes), max(size.height for size in sizes)
    labels = [_label(request) for request in requests]
    return Sheet(len(requests), cell, columns=columns, labels=labels, upscale=max(1, LABEL_ROOM // cell[0]))


def _label(request: Request) -> str:
    """Adapters first: what is too long is cut at the end."""
    names = " + ".join(
        name if strength == 1.0 else f"{name} {strength:g}" for name, strength in request.adapters.items()
    )
    return f"{names}: {request.prompt}" if names else request.prompt


def rows_of(requests: Sequence[Request], owners: Sequence[int], drawing: Drawing) -> list[dict[str, Any]]:
    """What was written and what failed, for JSON: a row for each prompt. Rows of networks and seconds are summed over its
    images; `calls` and `total` are those of the image that took most."""
    rows = []
    images: dict[int, list[int]] = {}
    for image, owner in enumerate(owners):
        images.setdefault(owner, []).append(image)
    for index, request in enumerate(requests):
        own = images[index]
        done = [drawing.done[image] for image in own if image in drawing.done]
        failed = [_reason(drawing.failures[image]) for image in own if image in drawing.failures]
        first = done[0] if done else {}
        rows.append(
            {
                "files": [facts["file"] for facts in done],
                "prompt": request.prompt,
                "seeds": [facts["seed"] for facts in done],
                **{key: first.get(key) for key in ("model", "digest")},
                "stats": _summed([facts["stats"] for facts in done]),
                **({"errors": failed} if failed else {}),
            }
        )
    return rows


def _summed(stats: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    if not stats:
        return None
    summed: dict[str, Any] = {**stats[0], "calls": max(entry["calls"] for entry in stats)}
    for name in ("rows", "seconds"):
        labels = dict.fromkeys(label for entry in stats for label in entry[name])
        summed[name] = {label: sum(entry[name].get(label, 0) for entry in stats) for label in labels}
    summed["seconds"]["total"] = max(entry["seconds"]["total"] for entry in stats)
    return summed
