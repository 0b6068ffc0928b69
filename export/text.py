"""Text encoders into a bundle: their tokenizers, and how each becomes a graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from stepforge.export.graph import modules, trace
from stepforge.export.models.pixel.t5 import t5_tokenizer_json
from stepforge.export.models.tokenizer import Pad, tokenizer_json
from stepforge.runtime.bundle import ComponentId, TextEncoder


def text_trace(family: str, length: int) -> Callable[[Any], trace.Traced]:
    """How a text encoder of a family becomes a graph; length: tokens of one chunk."""
    if family == "if":
        return partial(modules.t5_encoder, length=length)
    return partial(modules.text_encoder, length=length, penultimate=family == "sdxl")


def tokenizer_card(
    tokens: Path, pad: Pad | None, folder: Path, encoder: ComponentId, *, t5: bool = False
) -> TextEncoder:
    """Write a tokenizer into the bundle's folder; card of the encoder that it feeds."""
    text, card = tokenizer_json(tokens, pad) if not t5 else t5_tokenizer_json(tokens)
    name = encoder.name.replace("text_encoder", "tokenizer")
    path = (PurePosixPath(encoder.folder).with_name(name) / "tokenizer.json").as_posix()
    (folder / path).parent.mkdir(parents=True)
    (folder / path).write_text(text, encoding="utf-8")
    return TextEncoder(encoder.name, path, **card, stage=encoder.stage)
