"""`stepforge upscale`: pictures through one stage of a bundle, or several, to PNG files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from stepforge.runtime.cli import options
from stepforge.runtime.cli.generate import Drawing, rows_of
from stepforge.runtime.cli.inputs import parse_stages
from stepforge.runtime.cli.targets import claimed
from stepforge.runtime.errors import RequestError


def upscale(
    bundle: options.BundlePath,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="One or more PNG, JPEG or WebP files.")],
    sr: options.StageNames = None,
    sr_steps: options.StageSteps = None,
    noise_level: options.NoiseLevel = None,
    sr_guidance: options.StageGuidance = None,
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="What the pictures show, for stages that read text.")
    ] = "",
    negative: Annotated[str, typer.Option(metavar="TEXT", help="Negative prompt.")] = "",
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="A .png file for one image, a name with {index} or {seed} in it, or a folder.",
        ),
    ] = Path("out"),
    seed: Annotated[int, typer.Option(metavar="N", help="Picture i uses seed + i.")] = 0,
    backend: options.Backend = "auto",
    precision: options.Precision = "auto",
    threads: options.Threads = None,
    tile_memory: options.TileMemory = None,
    tiling: options.Tiling = "even",
    metadata: Annotated[bool, typer.Option(help="Write the request into each PNG.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    as_json: options.Json = False,
) -> None:
    """Enlarge pictures by super-resolution stages of a bundle.

    Without --sr the bundle's only stage is run. Each picture is written as soon as it is ready; failures are reported at
    the end and make the exit code 1.
    """
    from stepforge.runtime.imaging.save import image_paths
    from stepforge.runtime.load import load, open_bundle
    from stepforge.runtime.request import Request, Upscale

    names = sr or list(open_bundle(bundle, check=False).stages)
    if not sr and len(names) != 1:
        have = f"the bundle has {', '.join(names)}; name one" if names else "the bundle was exported without any"
        raise RequestError(f"--sr NAME is needed: {have}")
    first, *rest = parse_stages(names, sr_steps, noise_level, sr_guidance)
    requests = [
        Request(
            prompt=prompt, negative=negative, seed=seed + index, upscale=[Upscale(**first, image=image), *rest]
        )
        for index, image in enumerate(images)
    ]  # fmt: skip
    paths = image_paths(out, [(index, request.seed) for index, request in enumerate(requests)])
    with (
        claimed({"--out": paths}, overwrite=overwrite),
        load(
            bundle, backend=backend, precision=precision, threads=threads, tile_memory=tile_memory, tiling=tiling
        ) as engine,
    ):
        drawing = Drawing(paths, metadata=metadata, overwrite=overwrite, quiet=as_json)
        drawing.run(engine, requests)
    if as_json:
        rows = rows_of(requests, list(range(len(requests))), drawing)
        print(json.dumps([{"image": str(image), **row} for image, row in zip(images, rows, strict=True)], indent=1))
    drawing.report()
