"""Parts of a model that the base model, its stages and its experts export alike: tokenizers, text encoders, VAEs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from stepforge.export.graph import modules, trace
from stepforge.export.models.pixel.t5 import t5_tokenizer_json
from stepforge.export.models.source import Source
from stepforge.export.models.tokenizer import Pad, tokenizer_json
from stepforge.runtime.bundle import ComponentId, TextEncoder


def text_trace(family: str, length: int) -> Callable[[Any], trace.Traced]:
    """How a text encoder of a family becomes a graph; length: tokens of one chunk."""
    if family == "if":
        return partial(modules.t5_encoder, length=length)
    return partial(modules.text_encoder, length=length, penultimate=family == "sdxl")


def write_tokenizer(
    tokens: Path, pad: Pad | None, folder: Path, encoder: ComponentId, *, t5: bool = False
) -> TextEncoder:
    text, card = tokenizer_json(tokens, pad) if not t5 else t5_tokenizer_json(tokens)
    name = encoder.name.replace("text_encoder", "tokenizer")
    path = (PurePosixPath(encoder.folder).with_name(name) / "tokenizer.json").as_posix()
    (folder / path).parent.mkdir(parents=True)
    (folder / path).write_text(text, encoding="utf-8")
    return TextEncoder(encoder.name, path, **card, stage=encoder.stage)


def load_vae(source: Source, dtype: torch.dtype) -> Any:
    """The VAEs of SDXL and the x4 upscaler overflow in fp16 unless their configs say otherwise; diffusers decodes with them in
    fp32 too."""
    assert source.vae is not None
    if dtype == torch.float16 and source.family in ("sdxl", "x4"):
        vae = source.vae(torch.float32)
        return vae if vae.config.force_upcast else vae.half()
    return source.vae(dtype)
