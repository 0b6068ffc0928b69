"""A model's files as diffusers' loaders may see them: the weight files that a bundle names, and JSON that selects no code.

diffusers and transformers import the libraries that model_index.json names and follow private keys of configs
(CVE-2026-4372). They are given a temporary folder instead of the model's own: links to safetensors files, and copies of the
configs without such keys. No other key is read, changed or added here, so that the reading is the loaders' own.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stepforge.export.models.files import read_json
from stepforge.export.models.pixel.t5 import read_t5_tokenizer
from stepforge.export.models.weights import first_line
from stepforge.runtime.errors import CheckpointError
from stepforge.runtime.files import printable

COMPONENTS = (
    "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler",
    "low_res_scheduler", "image_noising_scheduler",
)  # fmt: skip
PREFIX = "stepforge-"  # beginning of temporary folders
LIBRARIES = ("diffusers", "transformers")  # the only ones that a model_index.json may name
PUBLIC = ("_class_name", "_diffusers_version")  # keys with an underscore that are kept
CODE = (  # keys that make a loader import, download or rewrite something
    "auto_map", "attn_implementation", "custom_pipelines", "quantization_config", "trust_remote_code",
)  # fmt: skip
PIECES = "spiece.model"
TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "added_tokens.json", PIECES)
CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "special_tokens_map.json")


def stage_model(model: Path, weights: Iterable[str], out: Path) -> None:
    """Make `out` a copy of a diffusers folder for `from_pretrained`.

    weights: the safetensors files to link, relative to the folder; without them it serves as `config` of
    `from_single_file`. Raises CheckpointError if the index names a library other than diffusers and transformers.
    """
    index = read_json(model / "model_index.json")
    kept = {key: value for key, value in index.items() if not isinstance(value, list) and harmless(key)}
    for name in COMPONENTS:
        entry = index.get(name)
        if not isinstance(entry, list) or entry == [None, None]:
            continue
        if len(entry) != 2 or entry[0] not in LIBRARIES or not isinstance(entry[1], str):
            raise CheckpointError(f"{model}: {name} is of {entry!r:.80}; supported libraries: {', '.join(LIBRARIES)}")
        kept[name] = entry
        stage_component(model / name, [file for file in weights if file.startswith(f"{name}/")], out / name)
    if kept.get("_class_name") == "StableDiffusionPipeline":
        kept["requires_safety_checker"] = False
    write_json(out / "model_index.json", kept)


def stage_component(folder: Path, weights: Iterable[str], out: Path) -> None:
    """One component: its configs, its tokenizer files, links to its weight files and the index of its shards."""
    out.mkdir(parents=True, exist_ok=True)
    names = {Path(file).name for file in weights}
    for name in (*names, *TOKENIZER):
        if (folder / name).is_file():
            (out / name).symlink_to((folder / name).resolve())
    if assumed_tokenizer(folder):
        (out / PIECES).unlink()
        (out / "tokenizer.json").write_text(read_t5_tokenizer(folder).text, "utf-8")
    for name in CONFIGS:
        if (folder / name).is_file():
            write_json(out / name, {key: value for key, value in read_json(folder / name).items() if harmless(key)})
    for file in sorted(folder.glob("*.safetensors*.json")):
        shards = read_json(file).get("weight_map", {})
        if len(names) > 1 and isinstance(shards, dict) and set(shards.values()) <= names:
            write_json(out / file.name, {"metadata": {}, "weight_map": shards})


def assumed_tokenizer(folder: Path) -> tuple[str, ...]:
    """What is told of a SentencePiece tokenizer that transformers cannot read here: without the package sentencepiece it
    makes an empty vocabulary of a folder that lacks the file, and asks for tiktoken where it finds it."""
    if (
        not (folder / PIECES).is_file()
        or (folder / "tokenizer.json").is_file()
        or find_spec("sentencepiece") is not None
    ):
        return ()
    return (f"{folder.name}: {PIECES} as stepforge reads it; transformers reads it where sentencepiece is installed",)


def harmless(key: str) -> bool:
    """Whether a key of a config selects no code."""
    return key not in CODE and (not key.startswith("_") or key in PUBLIC)


@contextmanager
def staging() -> Iterator[Path]:
    """A temporary folder."""
    with tempfile.TemporaryDirectory(prefix=PREFIX) as place:
        yield Path(place)


def reason(error: Exception, limit: int = 150) -> str:
    """A loader's error in one line, without the name of the temporary folder."""
    return printable(re.sub(rf"\S*/{PREFIX}\w+", "MODEL", first_line(error)), limit)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), "utf-8")
