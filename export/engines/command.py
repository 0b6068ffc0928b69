"""`stepforge build`: TensorRT plans of a bundle."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from stepforge.runtime.backends.tensorrt.library import LIBRARIES, BuildOptions
from stepforge.runtime.backends.tensorrt.plans import PRECISIONS
from stepforge.runtime.bundle import ComponentId, read
from stepforge.runtime.errors import BackendError, BundleError
from stepforge.runtime.files import printable


def build_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle directory.")],
    engine: Annotated[str, typer.Option(help=f"Library: {' or '.join(LIBRARIES)}.")],
    rows: Annotated[
        list[str] | None,
        typer.Option(metavar="LOW..HIGH", help="Rows of a call (an image with guidance has two): a profile for each range, "
                     "tuned for its highest number; repeatable. [default: 1..2 and 3..8]"),
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="LOW..HIGH", help="Sides of images in pixels. [default: the model's own size]")
    ] = None,
    precision: Annotated[str, typer.Option(help=f"{', '.join(PRECISIONS)}; text encoders stay in fp32.")] = "bf16",
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="sm_XX", help="Build for this compute capability, which this machine need not have "
                     "(tensorrt-rtx); repeatable. [default: this machine's GPU]"),
    ] = None,
    component: Annotated[
        list[str] | None, typer.Option(help="Build this one only, as `stepforge info` names it; repeatable.")
    ] = None,
    strip_weights: Annotated[
        bool, typer.Option(help="Leave weights out of the plans; they are read from the bundle when a plan is loaded.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option(help="Plans that later releases and the lean runtime can load (tensorrt).")
    ] = False,
    hardware_compatible: Annotated[
        bool, typer.Option(help="Plans for every GPU from Ampere on (tensorrt); slower.")
    ] = False,
    lora_plugin: Annotated[
        bool, typer.Option(help="Multiply by the first matrices of LoRA banks in our own kernel (tensorrt, fp16 and bf16).")
    ] = False,
    level: Annotated[
        int | None, typer.Option(min=0, max=5, help="Effort of the search for kernels. [default: the library's]")
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(min=1, help="MiB that a layer may use for itself. [default: the library's]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:  # fmt: skip
    """Build TensorRT engines of a bundle's networks. `--backend tensorrt` or `tensorrt-rtx` runs them."""
    from stepforge.export.engines.build import Order, build_plans
    from stepforge.runtime.backends.tensorrt.profiles import Use

    if precision not in PRECISIONS:
        raise BackendError(f"precision {printable(precision, 40)} is unknown; choose one of {', '.join(PRECISIONS)}")
    opened = read(bundle)
    options = BuildOptions(
        tuple(target or ()), strip_weights, version_compatible, hardware_compatible, level,
        workspace and workspace << 20, lora_plugin,
    )  # fmt: skip
    order = Order(engine, precision, Use.parse(opened, rows or ("1..2", "3..8"), size), options)
    wanted = _components(tuple(opened.components), component)
    built = []
    with _Bars() as bars:
        for one in build_plans(opened, order, wanted, bars.show):
            bars.end(str(one.component))
            card = one.plan.card
            built.append({"component": str(one.component), "is_new": one.is_new, "plan": one.plan.folder.name,
                          **{n: v for n, v in asdict(card).items() if n in ("precision", "targets", "bytes", "seconds",
                                                                            "peak_bytes")}})  # fmt: skip
            if not as_json:
                what = f"{card.seconds:.1f} s, {card.peak_bytes / 1e9:.1f} GB" if one.is_new else "there already"
                print(f"{printable(one.component):28} {card.precision} {card.bytes / 1e6:9.1f} MB  {what}")
    if as_json:
        print(json.dumps(built, indent=1))


def _components(known: tuple[ComponentId, ...], asked: list[str] | None) -> tuple[ComponentId, ...]:
    by_name = {str(key): key for key in known}
    for name in asked or ():
        if name not in by_name:
            raise BundleError(f"component {printable(name, 80)} is unknown; the bundle has {', '.join(by_name)}")
    return tuple(by_name[name] for name in asked) if asked else known


class _Bars:
    """A bar for the component that is being built, on standard error where that is a terminal."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._progress = Progress(
            *columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, component: str, phase: str, done: int, total: int) -> None:
        text = f"{printable(component, 40)}: {printable(phase, 40)}"
        if component not in self._tasks:
            self._tasks[component] = self._progress.add_task(text)
        self._progress.update(self._tasks[component], description=text, completed=done, total=total or 1)

    def end(self, component: str) -> None:
        if component in self._tasks:
            self._progress.remove_task(self._tasks.pop(component))
