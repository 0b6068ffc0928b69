"""A diffusers `tokenizer/` folder to the one file that the run time reads."""

from __future__ import annotations

from pathlib import Path

from stepforge.export.models.weights import first_line, read_json, reading, refuse_lfs_pointer
from stepforge.runtime.errors import CheckpointError

CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
MAX_LENGTH = 77  # what CLIP was trained with
LONGEST = 4096  # above this, model_max_length is transformers' "unknown" (1e30) and not a length


def tokenizer_json(folder: Path) -> tuple[str, dict[str, int]]:
    """The text of `tokenizer.json`, and its card: max_length, bos_id, eos_id, pad_id.

    Reads vocab.json and merges.txt, or tokenizer.json, through transformers' CLIPTokenizer, from this folder only.
    Raises CheckpointError if the folder holds no CLIP tokenizer.
    """
    from transformers import CLIPTokenizer

    with reading(folder):
        _check(folder)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception, transformers a dozen others
        raise CheckpointError(f"{folder} cannot be read as a CLIP tokenizer: {first_line(error)}") from error
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    card = {
        "max_length": int(tokenizer.model_max_length) if 2 < tokenizer.model_max_length <= LONGEST else MAX_LENGTH,
        "bos_id": tokenizer.bos_token_id,
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
    }
    if missing := [name for name, value in card.items() if value is None]:
        raise CheckpointError(f"{folder} defines no {', '.join(missing)}; a CLIP tokenizer has all of them")
    return backend.to_str(), card


def _check(folder: Path) -> None:
    """Raises CheckpointError unless the files of a CLIP tokenizer are here."""
    files = [folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt")]
    whole, *parts = (file.is_file() for file in files)
    if not whole and not all(parts):
        raise CheckpointError(f"{folder} has neither tokenizer.json nor vocab.json with merges.txt")
    for file in files:
        if file.is_file():
            refuse_lfs_pointer(file)
    config = folder / "tokenizer_config.json"
    named = read_json(config).get("tokenizer_class") if config.is_file() else None
    if named is not None and named not in CLASSES:
        raise CheckpointError(f"{folder} holds a {named!r:.80}; only {' and '.join(CLASSES)} are supported")
