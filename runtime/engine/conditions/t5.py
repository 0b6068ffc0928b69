"""Prompts of DeepFloyd IF to token ids: T5's SentencePiece vocabulary without transformers.

As diffusers' IF pipelines without `clean_caption`: lower case, no spaces at the ends, brackets and commas are text, and what
is longer than the encoder was trained with is cut. `clean_caption`, which takes links, markup and file names out of captions
that were scraped from the web, is not done: prompts of people have none.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from stepforge.runtime.checks import shown
from stepforge.runtime.engine.conditions.prompts import TokenChunks, check_prompt, read_tokenizer
from stepforge.runtime.errors import BundleError

log = logging.getLogger(__name__)


class T5Tokenizer:
    """Gives the ids and the mask of transformers' T5Tokenizer with padding="max_length" and truncation."""

    def __init__(self, tokenizer: Tokenizer, max_length: int, eos_id: int, pad_id: int) -> None:
        """Raises BundleError if the ids cannot belong to this tokenizer."""
        for name, token in (("eos_id", eos_id), ("pad_id", pad_id)):
            if tokenizer.id_to_token(token) is None:
                raise BundleError(f"tokenizer {name} is {token}, which its vocabulary does not have")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.max_length, self.eos_id, self.pad_id = max_length, eos_id, pad_id
        self._tokenizer = tokenizer

    @classmethod
    def from_file(cls, path: str | Path, max_length: int, bos_id: int, eos_id: int, pad_id: int) -> T5Tokenizer:
        """Read a `tokenizer.json`. bos_id: not used, T5 has none. Raises BundleError if it cannot be read."""
        return cls(read_tokenizer(path), max_length, eos_id, pad_id)

    def encode(self, prompt: str, *, syntax: str = "plain") -> TokenChunks:
        """One chunk, with its end and its padding; all weights are 1, whatever the syntax.

        Raises RequestError for a prompt that is too long or not text.
        """
        check_prompt(prompt)
        encoding = self._tokenizer.encode(prompt.lower().strip(), add_special_tokens=False)
        size = self.max_length - 1
        if len(encoding.ids) > size:
            cut = encoding.offsets[size][0]
            log.warning("prompt is cut after %d tokens, before %s", size, shown(prompt.lower().strip()[cut:]))
        ids = encoding.ids[:size]
        empty = np.full(self.max_length, self.pad_id, np.int64)
        empty[0] = self.eos_id
        row = np.full((1, self.max_length), self.pad_id, np.int64)
        row[0, : len(ids) + 1] = [*ids, self.eos_id]
        mask = (np.arange(self.max_length) <= len(ids)).astype(np.int64)[None]
        return TokenChunks(row, np.ones(row.shape, np.float32), empty, mask)
