"""`stepforge triton`: a bundle as models of NVIDIA Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepforge.runtime.checks import choice, whole
from stepforge.runtime.cli import options
from stepforge.runtime.cli.inputs import parse_adapters
from stepforge.runtime.errors import RequestError


def triton(
    bundle: options.BundlePath,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="The model repository.")],
    name: Annotated[str, typer.Option(metavar="NAME", help="Model's name. [default: the bundle's]")] = "",
    mode: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="unary: one response a request, HTTP and gRPC; decoupled: steps too, gRPC streams alone; both: a second "
            "model NAME_stream, and a second engine.",
        ),
    ] = "unary",
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]FILE", help="Load a LoRA file that requests may use; repeatable."),
    ] = None,
    bundle_path: Annotated[
        str, typer.Option(metavar="PATH", help="Where the server finds the bundle, if not where it is here.")
    ] = "",
    environment: Annotated[
        str,
        typer.Option(
            metavar="PATH", help="Python that has stepforge: a venv or a packed archive; the server's own if empty."
        ),
    ] = "",
    gpu: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="An instance on this GPU; repeatable. [default: one on the CPU]"),
    ] = None,
    max_rows: Annotated[int | None, typer.Option(metavar="N", help="Most denoiser rows in a call.")] = None,
    queue_limit: Annotated[
        int, typer.Option(metavar="N", help="Waiting requests of an instance; one more is refused as UNAVAILABLE.")
    ] = 64,
    backend: options.Backend = "auto",
    precision: options.Precision = "auto",
    threads: options.Threads = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace models of these names.")] = False,
) -> None:
    """Write a model repository for Triton's Python backend; docs/scale.md has its tensors and how to start the server."""
    from stepforge.runtime.backends import check_names
    from stepforge.runtime.engine import MAX_ROWS
    from stepforge.runtime.load import open_bundle
    from stepforge.runtime.serve.triton.repository import KINDS, Settings, write_repository

    check_names(backend, precision)
    opened = open_bundle(bundle, check=False)
    adapters = parse_adapters(adapter or ())
    if any(strength != 1.0 for _, strength in adapters.values()):
        raise RequestError("--adapter takes no strength here; requests say it")
    settings = Settings(
        bundle=bundle_path or (str(bundle) if str(bundle) == "fake" else str(bundle.resolve())),
        backend=backend,
        precision=precision,
        threads=threads or 0,
        max_rows=whole("--max-rows", MAX_ROWS if max_rows is None else max_rows, 2, 1 << 16),
        queue_limit=whole("--queue-limit", queue_limit, 1, 1 << 16),
        adapters={name: str(Path(file).resolve()) for name, (file, _) in adapters.items()},
        environment=environment,
        gpus=tuple(whole("--gpu", number, 0, 1 << 10) for number in gpu or ()),
    )
    mode = choice("--mode", mode, KINDS)
    for folder in write_repository(out, name or opened.card.name, mode, settings, overwrite=overwrite):
        print(folder)
