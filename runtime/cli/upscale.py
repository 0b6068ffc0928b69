"""`stepforge upscale`: pictures through one stage of a bundle, or several, to PNG files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from stepforge.runtime.cli import options
from stepforge.runtime.cli.generate import Drawing, rows_of
from stepforge.runtime.cli.targets import claimed
from stepforge.runtime.errors import RequestError


@options.grouped
def upscale(
    bundle: options.BundlePath,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="One or more PNG, JPEG or WebP files.")],
    *,
    stages: options.StageOptions,
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="What the pictures show, for stages that read text.")
    ] = "",
    negative: options.Negative = "",
    out: options.Out = Path("out"),
    seed: Annotated[int, typer.Option(metavar="N", help="Picture i uses seed + i.")] = 0,
    engine_options: options.EngineOptions,
    metadata: options.Metadata = True,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Enlarge pictures by super-resolution stages of a bundle.

    Without --sr the bundle's only stage is run. Each picture is written as soon as it is ready; failures are reported at
    the end and make the exit code 1.
    """
    from stepforge.runtime.imaging.save import image_paths
    from stepforge.runtime.load import open_bundle
    from stepforge.runtime.request import Request, Upscale

    names = list(open_bundle(bundle, check=False).stages)
    if not stages.sr and len(names) != 1:
        have = f"the bundle has {', '.join(names)}; name one" if names else "the bundle was exported without any"
        raise RequestError(f"--sr NAME is needed: {have}")
    first, *rest = stages.stages(names)
    requests = [
        Request(
            prompt=prompt, negative=negative, seed=seed + index, upscale=[Upscale(**first, image=image), *rest]
        )
        for index, image in enumerate(images)
    ]  # fmt: skip
    paths = image_paths(out, [(index, request.seed) for index, request in enumerate(requests)])
    with claimed({"--out": paths}, overwrite=overwrite), engine_options.load(bundle) as engine:
        drawing = Drawing(paths, metadata=metadata, overwrite=overwrite, quiet=as_json)
        drawing.run(engine, requests)
    if as_json:
        rows = rows_of(requests, list(range(len(requests))), drawing)
        print(json.dumps([{"image": str(image), **row} for image, row in zip(images, rows, strict=True)], indent=1))
    drawing.report()
