"""`stepforge serve`: bundles behind OpenAI's image API."""

from __future__ import annotations

import asyncio
import os
import ssl
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from stepforge.runtime.bundle import NAME
from stepforge.runtime.checks import whole
from stepforge.runtime.cli import options
from stepforge.runtime.cli.inputs import parse_adapters
from stepforge.runtime.cli.signals import Stopped
from stepforge.runtime.errors import RequestError, StepforgeError
from stepforge.runtime.files import printable

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    bundles: Annotated[
        list[str], typer.Argument(metavar="[NAME=]BUNDLE", help="Bundle directories; the first is the default model.")
    ],
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    keys: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="API keys, one a line; read again on SIGHUP. See docs/serving.md."),
    ] = None,
    open_to_all: Annotated[
        bool, typer.Option("--open", help="Answer other machines without keys: behind a proxy that checks its users.")
    ] = False,
    allowed_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Host header that is answered; repeatable.")
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option(metavar="ALIAS=NAME", help="Another name of a model; repeatable.")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]FILE", help="Load a LoRA file at the start; repeatable.")
    ] = None,
    adapters: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder from which adapters may be loaded by clients.")
    ] = None,
    page: Annotated[bool | None, typer.Option(help="Demo page at /. [default: on without --keys]")] = None,
    queue_limit: Annotated[int, typer.Option(metavar="N", help="Waiting requests of a model.")] = 32,
    max_images: Annotated[int, typer.Option(metavar="N", help="Images of one request.")] = 10,
    max_pixels: Annotated[int, typer.Option(metavar="N", help="Pixels of one image.")] = 1 << 22,
    max_steps: Annotated[int, typer.Option(metavar="N", help="Steps of a request, and of each stage.")] = 150,
    max_prompt: Annotated[int, typer.Option(metavar="N", help="Characters of a prompt.")] = 4000,
    max_body: Annotated[int, typer.Option(metavar="BYTES", help="Bytes of a request.")] = 32 << 20,
    max_memory: Annotated[
        int, typer.Option(metavar="BYTES", help="Bytes of all requests and finished images together.")
    ] = 1 << 30,
    deadline: Annotated[float, typer.Option(metavar="SECONDS", help="Time of one request, waiting included.")] = 600.0,
    drain: Annotated[
        float, typer.Option(metavar="SECONDS", help="Time for what is under way after SIGTERM; then it is cut.")
    ] = 60.0,
    grace: Annotated[
        float, typer.Option(metavar="SECONDS", help="Time for which 503 is answered after SIGTERM, at least.")
    ] = 0.0,
    ssl_certfile: Annotated[Path | None, typer.Option(metavar="FILE", help="TLS certificate chain, PEM.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(metavar="FILE", help="Its private key, PEM.")] = None,
    warm_up: Annotated[bool, typer.Option(help="Draw an image with each model before it is ready.")] = True,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log.")] = False,
    max_rows: Annotated[int | None, typer.Option(metavar="N", help="Most denoiser rows in a call.")] = None,
    backend: options.Backend = "auto",
    precision: options.Precision = "auto",
    threads: options.Threads = None,
    tile_memory: options.TileMemory = None,
    tiling: options.Tiling = "even",
) -> None:
    """Answer HTTP with images: OpenAI's /v1/images/generations and /v1/images/edits.

    The log is JSON on standard error. SIGTERM and SIGINT finish what is under way, and answer 503 meanwhile; a second one cuts
    it. The exit code is 0, or 1 where requests were cut.
    """
    from stepforge.runtime.backends import check_names
    from stepforge.runtime.engine import MAX_ROWS, Engine
    from stepforge.runtime.load import load

    try:
        from stepforge.runtime.serve.http.keys import Keys
        from stepforge.runtime.serve.http.logs import json_logs
        from stepforge.runtime.serve.http.models import Model, Models
        from stepforge.runtime.serve.http.server import Server
        from stepforge.runtime.serve.http.service import Service
        from stepforge.runtime.serve.http.settings import Settings
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("stepforge"):
            raise
        raise RequestError(f"serve needs the package {error.name}; pip install 'stepforge[server]'") from error

    places = named(bundles)
    check_names(backend, precision)
    rows = whole("--max-rows", MAX_ROWS if max_rows is None else max_rows, 2, 1 << 16)
    known = None if keys is None else Keys(keys)
    if known is None and host not in LOOPBACK and not open_to_all:
        raise RequestError(f"--host {printable(host)} is open to other machines: give --keys FILE, or --open")
    if adapters is not None and not adapters.is_dir():
        raise RequestError(f"--adapters {printable(adapters)} is not a folder")
    tls = check_tls(ssl_certfile, ssl_keyfile)
    preloaded = parse_adapters(adapter or ())
    if preloaded and len(places) > 1:
        raise RequestError("--adapter is for a server of one bundle; give --adapters FOLDER and load them by the API")
    if any(strength != 1.0 for _, strength in preloaded.values()):
        raise RequestError("--adapter takes no strength here; requests say it")
    if ports := [name for name in allowed_host or () if ":" in name and not name.startswith("[")]:
        raise RequestError(f"--allowed-host {printable(ports[0])} has a port; give the name alone")
    hosts = None
    if allowed_host or (known is None and not open_to_all):
        hosts = frozenset(name.lower() for name in (*(allowed_host or ()), host, "localhost", "127.0.0.1", "[::1]"))
    settings = Settings(
        max_body=max_body, max_memory=max_memory, max_prompt=max_prompt, max_images=max_images,
        max_pixels=max_pixels, max_steps=max_steps, queue_limit=queue_limit, deadline=deadline, drain=drain,
        grace=grace, adapter_folder=adapters, hosts=hosts, page=known is None if page is None else page,
        log_prompts=log_prompts, aliases=aliases(alias or [], places),
    )  # fmt: skip

    def opened(path: str) -> Engine:
        engine = load(
            path, backend=backend, precision=precision, threads=threads, tile_memory=tile_memory, tiling=tiling,
            max_rows=rows, queue_limit=queue_limit,
        )  # fmt: skip
        for name, (file, _) in preloaded.items():
            engine.adapters.load(name, file)
        if warm_up:
            engine.warm_up()
        return engine

    models = Models({name: Model(name, partial(opened, path)) for name, path in places.items()}, settings.aliases)
    with json_logs():
        server = Server(Service(models, settings, known), host=host, port=port, **tls)
        try:
            asyncio.run(server.serve())
        except SystemExit as error:
            if isinstance(error, Stopped):
                raise
            raise StepforgeError(f"cannot listen on {printable(host)}, port {port}; the log says why") from error
    if models.failure is not None:
        raise models.failure
    if server.was_cut:
        raise typer.Exit(1)


def check_tls(certificate: Path | None, key: Path | None) -> dict[str, str]:
    """uvicorn's options. Raises RequestError for one without the other, and for files that are no certificate and its key."""
    if certificate is None and key is None:
        return {}
    if certificate is None or key is None:
        raise RequestError("--ssl-certfile and --ssl-keyfile go together")
    for option, file in (("--ssl-certfile", certificate), ("--ssl-keyfile", key)):
        if not os.access(file, os.R_OK):
            raise RequestError(f"{option} {printable(file)} cannot be read")
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except OSError as error:
        raise RequestError(f"--ssl-certfile and --ssl-keyfile are no PEM certificate and its key: {error}") from error
    return {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}


def named(texts: list[str]) -> dict[str, str]:
    """[NAME=]BUNDLE -> path by name; the directory's own name without its ending if none is given. Raises RequestError."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not NAME.fullmatch(name):
            name, path = Path(text).name.removesuffix(".bundle"), text
        if not NAME.fullmatch(name):
            raise RequestError(f"{printable(text)} gives no name for the model; write NAME=BUNDLE")
        if name in found:
            raise RequestError(f"two models are named {name}; write NAME=BUNDLE")
        found[name] = path
    return found


def aliases(texts: list[str], models: dict[str, str]) -> dict[str, str]:
    """ALIAS=NAME -> name by alias. Raises RequestError."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, target = text.partition("=")
        if not equals or not NAME.fullmatch(name) or target not in models or name in models or name in found:
            raise RequestError(f"--alias {printable(text)} is not understood; give ALIAS=NAME, where NAME is a model")
        found[name] = target
    return found
