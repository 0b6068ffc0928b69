"""A diffusers `tokenizer/` folder to the one file that the run time reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from stepforge.export.models.files import read_json, read_small, reading
from stepforge.export.models.weights import first_line
from stepforge.export.oracle import silent
from stepforge.runtime.errors import CheckpointError
from stepforge.runtime.files import printable

Pad = Literal["end", "zero"]  # what fills up a prompt: OpenAI's CLIP takes its end of text, OpenCLIP the id 0

CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
MAX_LENGTH = 77  # what CLIP was trained with
LONGEST = 4096  # above this, model_max_length is transformers' "unknown" (1e30) and not a length
MOST_IDS = 1_000_000  # CLIP has 49,408; transformers writes a line for every number below the highest id
FILES = (  # all that transformers may read of a tokenizer; nothing else of the folder is shown to it
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenizer as a bundle stores it."""

    text: str  # content of tokenizer.json
    card: dict[str, int]  # max_length, bos_id, eos_id, pad_id
    vocabulary: int  # highest id, and one
    corrected: str = ""  # how the padding differs from the folder's; empty: it does not


def tokenizer_json(folder: Path, pad: Pad | None = None) -> tuple[str, dict[str, int]]:
    """The text of `tokenizer.json`, and its card: max_length, bos_id, eos_id, pad_id. As `read_tokenizer`."""
    tokenizer = read_tokenizer(folder, pad)
    return tokenizer.text, tokenizer.card


def read_tokenizer(folder: Path, pad: Pad | None = None) -> Tokenizer:
    """Read vocab.json and merges.txt, or tokenizer.json, through transformers' CLIPTokenizer, from this folder only.

    pad: what the text encoder was trained with; None: what the folder says.
    Raises CheckpointError if the folder holds no CLIP tokenizer.
    """
    from transformers import CLIPTokenizer

    with reading(folder), TemporaryDirectory() as copy:
        _copy(folder, Path(copy))
        try:
            with silent():
                tokenizer = CLIPTokenizer.from_pretrained(copy, local_files_only=True)
        except Exception as error:  # tokenizers raises bare Exception, transformers a dozen others
            reason = printable(first_line(error).replace(copy, str(folder)))
            raise CheckpointError(f"{folder} cannot be read as a CLIP tokenizer: {reason}") from error
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    longest = tokenizer.model_max_length
    card = {
        "max_length": int(longest) if isinstance(longest, int | float) and 2 < longest <= LONGEST else MAX_LENGTH,
        "bos_id": tokenizer.bos_token_id,
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
    }
    corrected = ""
    if pad is not None:
        own, card["pad_id"] = card["pad_id"], card["eos_id"] if pad == "end" else 0
        if own != card["pad_id"]:
            kind = "OpenAI's CLIP" if pad == "end" else "OpenCLIP"
            corrected = f"pad_id {card['pad_id']}, which {kind} was trained with, instead of the tokenizer's {own}"
    if missing := [name for name, value in card.items() if value is None]:
        raise CheckpointError(f"{folder} defines no {', '.join(missing)}; a CLIP tokenizer has all of them")
    return Tokenizer(backend.to_str(), card, 1 + max(tokenizer.get_vocab().values(), default=-1), corrected)


def _copy(folder: Path, to: Path) -> None:
    """Copy the files of a CLIP tokenizer. Raises CheckpointError unless they are here, and small JSON or text."""
    names = [name for name in FILES if (folder / name).exists()]
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= set(names):
        raise CheckpointError(f"{folder} has neither tokenizer.json nor vocab.json with merges.txt")
    for name in names:
        if name.endswith(".json"):
            data = read_json(folder / name)
            if any(type(each) is not int or not 0 <= each < MOST_IDS for each in ids_of(name, data)):
                raise CheckpointError(f"{folder / name} has an id that is no whole number from 0 to {MOST_IDS}")
            named = data.get("tokenizer_class") if name == "tokenizer_config.json" else None
            if named is not None and named not in CLASSES:
                raise CheckpointError(f"{folder} holds a {named!r:.80}; only {' and '.join(CLASSES)} are supported")
            (to / name).write_text(json.dumps(data), encoding="utf-8")
        else:
            (to / name).write_bytes(read_small(folder / name))


def ids_of(name: str, data: dict[str, Any]) -> list[Any]:
    """The ids of tokens that a file of a tokenizer gives."""
    match name:
        case "vocab.json" | "added_tokens.json":
            return list(data.values())
        case "tokenizer.json":
            model, added = data.get("model"), data.get("added_tokens")
            vocabulary = model.get("vocab") if isinstance(model, dict) else None
            ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
            return ids + [token.get("id") for token in added or () if isinstance(token, dict)]
        case "tokenizer_config.json":
            decoder = data.get("added_tokens_decoder")
            return [int(id) if id.isdecimal() else -1 for id in decoder] if isinstance(decoder, dict) else []
    return []
