"""Texts of a request: guidance, guiders, reuse, preprocessors and prompts, of the languages' own pieces in any order.

What is read is printed and read again, and must be the same; prompts keep their tokens.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
from mutate import NAMES, STRANGE

from stepforge.runtime.backends.fake import fake_bundle
from stepforge.runtime.engine.conditions.prompts import MAX_CHUNKS, ClipTokenizer, warn_of_tags
from stepforge.runtime.errors import RequestError
from stepforge.runtime.request import Control, Request

ERRORS = (RequestError,)
QUICK, SOAK = 400, 3000

WORDS = {
    "guidance": ["7.5", "1", "0", "-3", "1e2", "1e400", "0x1", "inf", "nan", "interval(", "linear(", "cosine(", "pcs(",
                 "clamp(", "sigma=", "steps=", "s=", "base=", "0.28..5.42", "0..1", "1..12", "@0-0.6", "@0.6-1", ",", ";",
                 "unet=", "[", "]", "(", ")", " ", "interval(7.5, sigma=0.28..5.42)", "clamp(linear(7.5), 2)",
                 "7.5@0-0.6,1@0.6-1"],
    "guider": ["cfg", "zero_star", "zero=1", "apg", "momentum=-0.5", "norm=15", "eta=1", "adaptive", "rescale", "dynamic",
               "p=0.9", "max=2", "(", ")", "+", ",", "0.7", "1e9", " ", "apg(eta=0)+adaptive(0.9)", "rescale(0.7)"],
    "reuse": ["deepcache", "tgate", "(", ")", "+", "3", "0.5", ",", "steps=0..1", "1e9", " ", "deepcache(3)", "tgate(0.5)"],
    "preprocessor": ["none", "canny", "silhouette", "(", ")", "100", "200", ",", "+", "crop", "fill", "stretch", "low=", "1e9"],
    "prompt": ["a cat", "(", ")", "[", "]", ":1.3)", ":-1)", ":1e9)", ":", "\\", "\\(", "BREAK", " BREAK ", ", ", "!", "é",
               "\u2028", "\u0301", "\r\n", "\x0b", "<lora:x:1>", "embedding:y", "😀", "a" * 200, "  ", "AND", "|", "0.5", "::"],
}  # fmt: skip


def start(folder: Path) -> ClipTokenizer:
    logging.getLogger("stepforge").addHandler(logging.NullHandler())  # its warnings are meant
    bundle = fake_bundle()
    (one,) = bundle.card.text_encoders
    return ClipTokenizer.from_file(bundle.path / one.tokenizer, one.max_length, one.bos_id, one.eos_id, one.pad_id)


def case(rng: random.Random, base: ClipTokenizer) -> tuple[str, Any]:
    field = rng.choice(list(WORDS))
    kind = rng.randrange(12)
    if kind == 0:
        return field, rng.choice(STRANGE)
    if kind == 1:
        return field, rng.choice((*WORDS[field], *NAMES)) * rng.choice((100, 2000, 300_000))
    pieces = rng.choices(WORDS[field], k=rng.choice((1, 1, 2, 3, 5, 9, 40)))
    if kind == 2:
        pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(NAMES))
    return field, rng.choice(("", "", " ")).join(pieces)


def check(case: tuple[str, Any], base: ClipTokenizer) -> None:
    field, text = case
    if field == "preprocessor":
        control = Control(name="a", image=b"", preprocessor=text)
        assert Control(name="a", image=b"", preprocessor=str(control.preprocessor)) == control
        return
    request = Request(**{"prompt": "", field: text})
    assert hash(request) == hash(Request.of(request.to_dict()))
    assert Request.of(request.to_dict()) == request
    if field == "prompt":
        _prompt(text, base)


def _prompt(text: str, tokenizer: ClipTokenizer) -> None:
    warn_of_tags(text)
    plain = tokenizer.encode(text, syntax="plain")
    assert plain.ids.shape == (1, tokenizer.max_length)
    found = tokenizer.encode(text)
    assert 1 <= len(found.ids) <= MAX_CHUNKS
    assert found.ids.shape == found.weights.shape
    assert np.isfinite(found.weights).all()
    if len(found.ids) == 1 and not set("()[]\\") & set(text) and "BREAK" not in text:
        assert (found.ids == plain.ids).all()
        assert (found.weights == 1).all()
