"""`stepforge lora`: what a LoRA file is. Its offline commands join through the entry point group `stepforge.commands`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from stepforge.runtime.errors import RequestError
from stepforge.runtime.lora.layers import MAX_STRENGTH

lora = typer.Typer(help="Look into LoRA files, and convert them.", no_args_is_help=True, rich_markup_mode=None)


@lora.command()
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .safetensors file, or a PEFT folder.")],
    bundle: Annotated[Path | None, typer.Option(help="Say what each layer does to this bundle's model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Say what becomes of every layer in a LoRA file: bound at run time, merged only, or refused, and why."""
    from stepforge.runtime import open_bundle
    from stepforge.runtime.lora.report import report

    rows = report(file, None if bundle is None else open_bundle(bundle, check=False))
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    from stepforge.runtime.cli import print_table

    print_table(
        [
            {
                "layer": _shown(f"{row.component} {row.module}" if row.component else row.name),
                "kind": row.kind or "-",
                "rank": "-" if row.rank is None else row.rank,
                "scale": "-" if row.scale is None else row.scale,
                "fate": row.fate,
                "reason": _shown(row.reason),
            }
            for row in rows
        ],
        left=("layer", "kind", "fate", "reason"),
    )
    fates = Counter(row.fate for row in rows)
    print(f"{len(rows)} layers: " + ", ".join(f"{count} {fate}" for fate, count in fates.most_common()))


def file_and_strength(text: str) -> tuple[Path, float]:
    """FILE or FILE:STRENGTH, as on the command line; a colon before what is no number belongs to the file's name."""
    path, colon, number = text.rpartition(":")
    try:
        strength = float(number) if colon else 1.0
    except ValueError:
        return Path(text), 1.0
    if not abs(strength) <= MAX_STRENGTH:
        raise RequestError(
            f"the strength of {path} is {number}; it lies between -{MAX_STRENGTH:g} and {MAX_STRENGTH:g}"
        )
    return Path(path if colon else text), strength


def _shown(text: str) -> str:
    """Names come with the file: no control characters reach the terminal, and no line grows without end."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in text)
    return plain if len(plain) <= 100 else plain[:97] + "..."
