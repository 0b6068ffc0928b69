"""`stepforge lora`: what a LoRA file is. Its offline commands join through the entry point group `stepforge.commands`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from stepforge.runtime.cli import options
from stepforge.runtime.cli.output import print_table

lora = typer.Typer(help="Look into LoRA files, and convert them.", no_args_is_help=True, rich_markup_mode=None)


@lora.command()
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .safetensors file, or a PEFT folder.")],
    bundle: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="Say what each layer does to this bundle's model.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Say what becomes of each layer in a LoRA file.

    It is bound at run time, merged at export only, or refused, with the reason.
    """
    from stepforge.runtime.load import open_bundle
    from stepforge.runtime.lora.report import report

    rows = report(file, None if bundle is None else open_bundle(bundle, check=False))
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    print_table(
        [
            {
                "layer": f"{row.component} {row.module}" if row.component else row.name,
                "kind": row.kind or "-",
                "rank": "-" if row.rank is None else row.rank,
                "scale": "-" if row.scale is None else row.scale,
                "fate": row.fate,
                "reason": row.reason,
            }
            for row in rows
        ],
        left=("layer", "kind", "fate", "reason"),
    )
    fates = Counter(row.fate for row in rows)
    print(f"{len(rows)} layers: " + ", ".join(f"{count} {fate}" for fate, count in fates.most_common()))
