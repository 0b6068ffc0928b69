"""Prompts to token ids: CLIP tokenisation without transformers, and prompt weights as in the A1111 web UI.

    (cat)        weight 1.1           (cat:1.3)   weight 1.3          ((cat))     weights multiply
    [cat]        weight 1/1.1         \\( \\) \\[ \\] \\\\   the character itself; a lone backslash is dropped
    BREAK        ends the chunk, inside brackets too (there A1111 reads it as a word)

Brackets left open close at the end of the prompt; brackets and weights with nothing to close are text, and so is a
weight that is no number. A1111's prompt editing `[a:b:0.5]`, alternation `[a|b]`, `AND` and `<lora:...>` are not special
here. A token of a saved textual inversion of several vectors stands for all of them, as in diffusers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from stepforge.runtime.checks import shown
from stepforge.runtime.errors import BundleError, RequestError

log = logging.getLogger(__name__)
SYNTAXES = ("a1111", "plain")
MAX_CHARACTERS = 100_000
MAX_CHUNKS = 32
MAX_DEPTH = 64  # brackets open at one time; keeps parsing linear, and 1.1^64 is beyond MAX_WEIGHT anyway
MAX_WEIGHT = 100.0
BACKTRACK = 20  # tokens; A1111's comma_padding_backtrack
ROUND = 1.1
SQUARE = 1 / 1.1

_MARK = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)"
    r"|:\s*(?P<weight>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))\s*\)"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<text>[^\\()\[\]:]+|:)"
)
_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>|\bembedding:[^\s,()]+")  # marks of A1111 and ComfyUI
_BREAK = re.compile(r"\bBREAK\b")


@dataclass(slots=True)
class Span:
    """A run of text of one weight. `text` is None where the prompt says BREAK."""

    text: str | None
    weight: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class TokenChunks:
    """A tokenised prompt: one row for each run of the text encoder."""

    ids: NDArray[np.int64]  # [chunks, max_length]
    weights: NDArray[np.float32]  # [chunks, max_length]; 1 at begin, end and padding
    empty: NDArray[np.int64]  # [max_length], the chunk of the empty prompt
    mask: NDArray[np.int64] | None = None  # [chunks, max_length], 0 at padding; None: the encoder attends to all


class ClipTokenizer:
    """A CLIP byte-pair tokenizer that gives the ids of transformers' CLIPTokenizer."""

    def __init__(self, tokenizer: Tokenizer, max_length: int, bos_id: int, eos_id: int, pad_id: int) -> None:
        """Raises BundleError if the ids or the length cannot belong to this tokenizer."""
        if max_length < 3:
            raise BundleError(f"tokenizer max_length is {max_length}; a chunk holds begin, end and at least one token")
        for name, token in (("bos_id", bos_id), ("eos_id", eos_id), ("pad_id", pad_id)):
            if tokenizer.id_to_token(token) is None:
                raise BundleError(f"tokenizer {name} is {token}, which its vocabulary does not have")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.max_length, self.bos_id, self.eos_id, self.pad_id = max_length, bos_id, eos_id, pad_id
        self._tokenizer = tokenizer
        self._comma = tokenizer.token_to_id(",</w>")
        self._vectors = _vectors({token.content for token in tokenizer.get_added_tokens_decoder().values()})

    @classmethod
    def from_file(cls, path: str | Path, max_length: int, bos_id: int, eos_id: int, pad_id: int) -> ClipTokenizer:
        """Read a `tokenizer.json`. Raises BundleError if it cannot be read."""
        return cls(read_tokenizer(path), max_length, bos_id, eos_id, pad_id)

    def encode(self, prompt: str, *, syntax: str = "a1111") -> TokenChunks:
        """Token ids and weights of a prompt.

        "a1111": weights, and as many chunks of max_length − 2 tokens as the prompt needs; a chunk ends after its last
        comma if at most 20 tokens follow that comma. A prompt of one chunk without ( ) [ ] \\ and BREAK has exactly the
        ids that a diffusers pipeline feeds; literal brackets must be escaped to get those.
        "plain": what diffusers does with any prompt: brackets are text and the prompt is cut after one chunk, with a
        warning in the log.
        Raises RequestError for a prompt that is too long or not text, and for weights that are beyond reason.
        """
        if syntax not in SYNTAXES:
            raise RequestError(f"prompt syntax {syntax!r} is unknown; choose one of {', '.join(SYNTAXES)}")
        check_prompt(prompt)
        size = self.max_length - 2
        if syntax == "plain":
            tokens = self._tokens(prompt)
            if len(tokens) > size:
                log.warning("prompt has %d tokens; plain syntax keeps %d, as diffusers does", len(tokens), size)
            return self._wrap([[(token, 1.0) for token in tokens[:size]]])
        chunks: list[list[tuple[int, float]]] = []
        for passage in _passages(parse(prompt)):
            weighted = [(token, span.weight) for span in passage for token in self._tokens(span.text or "")]
            chunks.extend(self._cut(weighted, size))
        if len(chunks) > 1 and not chunks[-1]:  # a BREAK at the end starts nothing
            chunks.pop()
        if len(chunks) > MAX_CHUNKS:
            raise RequestError(f"prompt fills {len(chunks)} chunks of {size} tokens; at most {MAX_CHUNKS} are allowed")
        return self._wrap(chunks)

    def _tokens(self, text: str) -> list[int]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if self._vectors and (found := [token for token in dict.fromkeys(encoding.tokens) if token in self._vectors]):
            for token in found:  # diffusers' rule: wherever its letters stand
                if len(text) + text.count(token) * len(self._vectors[token]) > MAX_CHARACTERS:
                    raise RequestError(
                        f"prompt has more than {MAX_CHARACTERS} characters once {shown(token)} is written out"
                    )
                text = text.replace(token, self._vectors[token])
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def _cut(self, tokens: list[tuple[int, float]], size: int) -> Iterator[list[tuple[int, float]]]:
        start = 0
        while len(tokens) - start > size:
            end = start + size
            if tokens[end][0] != self._comma:
                near = range(end - 1, max(end - BACKTRACK, start) - 1, -1)
                end = next((i + 1 for i in near if tokens[i][0] == self._comma), end)
            yield tokens[start:end]
            start = end
        yield tokens[start:]

    def _wrap(self, chunks: list[list[tuple[int, float]]]) -> TokenChunks:
        empty = np.full(self.max_length, self.pad_id, np.int64)
        empty[:2] = self.bos_id, self.eos_id
        ids = np.tile(empty, (len(chunks), 1))
        weights = np.ones(ids.shape, np.float32)
        for row, chunk in enumerate(chunks):
            end = len(chunk) + 1
            ids[row, 1:end] = [token for token, _ in chunk]
            ids[row, end] = self.eos_id
            weights[row, 1:end] = [weight for _, weight in chunk]
        return TokenChunks(ids, weights, empty)


def read_tokenizer(path: str | Path) -> Tokenizer:
    """A `tokenizer.json`. Raises BundleError if it is none."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for every fault of the file
        raise BundleError(f"{path} is not a tokenizer file: {error}") from error


def _vectors(added: set[str]) -> dict[str, str]:
    """Textual inversions of several vectors, saved as the tokens `cat`, `cat_1`, `cat_2`, ...: first token -> all of them.

    diffusers, loaders/textual_inversion.py, maybe_convert_prompt.
    """
    found: dict[str, str] = {}
    for token in added:
        following = takewhile(added.__contains__, (f"{token}_{i}" for i in count(1)))
        if len(tokens := [token, *following]) > 1:
            found[token] = " ".join(tokens)
    return found


def warn_of_tags(prompt: str) -> None:
    """Log that a prompt has what other programs read as a file to load."""
    if (tag := _TAG.search(prompt)) is not None:
        log.warning(
            "prompt has %s, which is plain text here: adapters are given with --adapter or Request(adapters=...), "
            "textual inversions are loaded into the model before it is exported", shown(tag[0]),
        )  # fmt: skip


def check_prompt(prompt: str) -> None:
    """Raises RequestError for what is not text, or too long."""
    if not isinstance(prompt, str):
        raise RequestError(f"prompt must be text, not {type(prompt).__name__}")
    if len(prompt) > MAX_CHARACTERS:
        raise RequestError(f"prompt has {len(prompt)} characters; at most {MAX_CHARACTERS} are allowed")
    if "\0" in prompt:
        raise RequestError("prompt contains a NUL character; only text is allowed")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise RequestError("prompt contains half of a surrogate pair; only valid Unicode is allowed") from None


def parse(prompt: str) -> list[Span]:
    """The spans of a weighted prompt, in order; neighbours of equal weight are one span. Never empty.

    Raises RequestError for brackets nested deeper than 64 and for weights beyond ±100.
    """
    spans: list[Span] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # the span at which each open bracket starts

    def close(start: int, factor: float) -> None:
        for span in spans[start:]:
            span.weight *= factor

    for mark in _MARK.finditer(prompt):
        escaped, weight, bracket = mark["escaped"], mark["weight"], mark["bracket"]
        if escaped is not None:
            spans.append(Span(escaped))
        elif bracket is not None and bracket in opened:
            opened[bracket].append(len(spans))
            if len(opened["("]) + len(opened["["]) > MAX_DEPTH:
                raise RequestError(f"prompt has more than {MAX_DEPTH} open brackets; write \\( for a literal bracket")
        elif weight is not None and opened["("]:
            close(opened["("].pop(), float(weight))
        elif bracket == ")" and opened["("]:
            close(opened["("].pop(), ROUND)
        elif bracket == "]" and opened["["]:
            close(opened["["].pop(), SQUARE)
        else:
            spans.extend(_split_breaks(mark[0]))
    for start in opened["("]:
        close(start, ROUND)
    for start in opened["["]:
        close(start, SQUARE)
    for span in spans:
        if span.text is not None and not abs(span.weight) <= MAX_WEIGHT:
            raise RequestError(f"prompt gives {span.text!r:.40} weight {span.weight:g}; at most ±100 is allowed")
    return _merge(spans) or [Span("")]


def _split_breaks(text: str) -> Iterator[Span]:
    first, *rest = _BREAK.split(text)
    yield Span(first.rstrip() if rest else first)  # stripped here: \s* before BREAK in the pattern is quadratic
    for index, part in enumerate(rest, 1):
        yield Span(None)
        yield Span(part.strip() if index < len(rest) else part.lstrip())


def _merge(spans: list[Span]) -> list[Span]:
    """Join neighbours of equal weight before they are tokenised, so that `(un)(kind)` is the word `unkind`."""
    runs: list[tuple[list[str] | None, float]] = []
    for span in spans:
        last = runs[-1] if runs else None
        if span.text is None:
            runs.append((None, span.weight))
        elif last is not None and last[0] is not None and last[1] == span.weight:
            last[0].append(span.text)
        else:
            runs.append(([span.text], span.weight))
    return [Span(None if texts is None else "".join(texts), weight) for texts, weight in runs]


def _passages(spans: list[Span]) -> list[list[Span]]:
    """The spans between BREAKs."""
    passages: list[list[Span]] = [[]]
    for span in spans:
        if span.text is None:
            passages.append([])
        else:
            passages[-1].append(span)
    return passages


def apply_weights(embeddings: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Text encoder states times token weights, scaled back to the mean that each chunk had (A1111's "Original").

    embeddings: [chunks, L, C]; weights: [chunks, L]. A chunk whose weights are all 1 is returned bit for bit, and a
    chunk whose weighted mean is 0 is not scaled back. The input is left alone.
    """
    changed = np.flatnonzero((weights != 1).any(axis=1))
    if not len(changed):
        return embeddings
    result = embeddings.copy()
    for chunk in changed:
        weighted = embeddings[chunk] * weights[chunk, :, None]
        before, after = (float(states.mean(dtype=np.float64)) for states in (embeddings[chunk], weighted))
        result[chunk] = weighted * np.float32(before / after) if after else weighted
    return result


def pad_chunks(*prompts: TokenChunks) -> tuple[TokenChunks, ...]:
    """Every prompt with as many chunks as the longest, filled up with the chunk of its tokenizer's empty prompt.

    SDXL's two tokenizers must be padded together: one reads "!!!" as one token, the other as three.
    """
    count = max(len(prompt.ids) for prompt in prompts)
    return tuple(_pad(prompt, count) for prompt in prompts)


def _pad(chunks: TokenChunks, count: int) -> TokenChunks:
    missing = count - len(chunks.ids)
    if not missing:
        return chunks
    ids = np.concatenate((chunks.ids, np.tile(chunks.empty, (missing, 1))))
    weights = np.pad(chunks.weights, ((0, missing), (0, 0)), constant_values=1.0)
    return TokenChunks(ids, weights, chunks.empty)
