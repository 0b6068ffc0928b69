"""T5: the text encoder of DeepFloyd IF, and its tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from stepforge.export.models.files import read_json, read_small, reading
from stepforge.export.models.networks import built, check_option
from stepforge.export.models.tokenizer import MOST_IDS, Tokenizer, ids_of
from stepforge.export.models.weights import State, first_line
from stepforge.export.oracle import silent
from stepforge.runtime.errors import CheckpointError
from stepforge.runtime.files import printable

CLASSES = ("T5Tokenizer", "T5TokenizerFast")
MAX_LENGTH = 77  # tokens that IF was trained with; diffusers' pipelines ask for no others
EXTRA_IDS = 100  # T5's sentinels, behind the pieces of its vocabulary
MOST_EXTRA_IDS = 1000  # transformers makes a token of each
KEYS = (
    "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets",
    "relative_attention_max_distance", "layer_norm_epsilon", "feed_forward_proj",
)  # fmt: skip
TEXTS = ("feed_forward_proj",)  # members of KEYS that are not numbers
SHARED, OWN = "shared.weight", "encoder.embed_tokens.weight"  # one tensor; files hold it under either name, or both


def empty_t5(config: Mapping[str, Any]) -> Any:
    """T5's encoder without memory for its weights. Raises CheckpointError."""
    from transformers import T5Config, T5EncoderModel

    if (kind := config.get("model_type", "t5")) != "t5":
        raise CheckpointError(f"the text encoder is a {printable(repr(kind), 80)}; supported: t5")
    values = {key: config[key] for key in KEYS if config.get(key) is not None}
    for key, value in values.items():
        check_option("the text encoder", key, value, "" if key in TEXTS else math.pi)
        if isinstance(value, list):
            raise CheckpointError(f"the text encoder: {key} is {printable(repr(value), 80)}; a number is expected")
    return built(T5EncoderModel, lambda: T5EncoderModel(T5Config(**values, attn_implementation="eager")))


def with_embeddings(state: State, network: nn.Module) -> State:
    """Weights of a file that holds the embeddings once; and without the decoder of a whole T5."""
    state = {key: value for key, value in state.items() if not key.startswith("decoder.") and key != "lm_head.weight"}
    for name, other in ((SHARED, OWN), (OWN, SHARED)):
        if name not in state and other in state:
            state[name] = state[other]
    return state


def t5_tokenizer_json(folder: Path) -> tuple[str, dict[str, int]]:
    """The text of `tokenizer.json`, and its card, as `tokenizer.tokenizer_json`."""
    tokenizer = read_t5_tokenizer(folder)
    return tokenizer.text, tokenizer.card


def read_t5_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json, or the SentencePiece model spiece.model, through transformers' T5Tokenizer, from this folder only.

    Raises CheckpointError if the folder holds no T5 tokenizer.
    """
    from transformers import T5Tokenizer

    with reading(folder):
        has_json = (folder / "tokenizer.json").exists()
        if not has_json and not (folder / "spiece.model").exists():
            raise CheckpointError(f"{folder} has neither tokenizer.json nor spiece.model")
        try:
            with silent():
                tokenizer = _from_json(folder) if has_json else T5Tokenizer(**_pieces(folder / "spiece.model"))
        except CheckpointError:
            raise
        except Exception as error:  # tokenizers raises bare Exception, protobuf and transformers others
            raise CheckpointError(
                f"{folder} cannot be read as a T5 tokenizer: {printable(first_line(error))}"
            ) from error
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    ids = {"eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
    if missing := [name for name, value in ids.items() if value is None]:
        raise CheckpointError(f"{folder} defines no {', '.join(missing)}; a T5 tokenizer has all of them")
    card = {"max_length": MAX_LENGTH, "bos_id": ids["pad_id"], **ids}  # T5 begins with no token: nobody reads bos_id
    return Tokenizer(backend.to_str(), card, 1 + max(tokenizer.get_vocab().values(), default=-1))


def _from_json(folder: Path) -> Any:
    from transformers import T5Tokenizer

    with TemporaryDirectory() as copy:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if not (folder / name).exists():
                continue
            data = read_json(folder / name)
            named = data.get("tokenizer_class") if name == "tokenizer_config.json" else None
            if named is not None and named not in CLASSES:
                raise CheckpointError(f"{folder} holds a {named!r:.80}; only {' and '.join(CLASSES)} are supported")
            if any(type(each) is not int or not 0 <= each < MOST_IDS for each in ids_of(name, data)):
                raise CheckpointError(f"{folder / name} has an id that is no whole number from 0 to {MOST_IDS}")
            extra = data.get("extra_ids", EXTRA_IDS) if name == "tokenizer_config.json" else 0
            if type(extra) is not int or not 0 <= extra <= MOST_EXTRA_IDS:
                shown = printable(repr(extra), 80)
                raise CheckpointError(f"{folder / name}: extra_ids is {shown}; from 0 to {MOST_EXTRA_IDS} are possible")
            (Path(copy) / name).write_text(json.dumps(data), encoding="utf-8")
        return T5Tokenizer.from_pretrained(copy, local_files_only=True)


def _pieces(model: Path) -> dict[str, Any]:
    """Arguments of T5Tokenizer from a SentencePiece model. transformers' own way there needs the library sentencepiece; its
    copy of the file's schema does not."""
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    proto.ParseFromString(read_small(model))
    if len(proto.pieces) > MOST_IDS:
        raise CheckpointError(f"{model} has {len(proto.pieces)} pieces; at most {MOST_IDS} are read")
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    sentinels = [(f"<extra_id_{number}>", 0.0) for number in range(EXTRA_IDS - 1, -1, -1)]
    return {
        "vocab": pieces + sentinels,
        "extra_ids": EXTRA_IDS,
        "_spm_precompiled_charsmap": proto.normalizer_spec.precompiled_charsmap or None,
    }
