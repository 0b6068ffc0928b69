"""Prompts to what the denoiser reads: run the text encoders once for a prompt and keep the result."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stepforge.runtime.backends import Backend
from stepforge.runtime.bundle import Bundle
from stepforge.runtime.engine.adapters import NONE, Adapters, AdapterSet, row_inputs
from stepforge.runtime.engine.conditions.prompts import (
    ClipTokenizer,
    TokenChunks,
    apply_weights,
    pad_chunks,
    warn_of_tags,
)

if TYPE_CHECKING:
    from stepforge.runtime.engine.state import Job

CACHED_BYTES = 256 << 20  # encoded prompts, LRU; SDXL's take 0.6 MB for each 77 tokens


@dataclass(frozen=True, slots=True, eq=False)
class Condition:
    """What one prompt contributes to a denoiser row."""

    context: NDArray[np.float32]  # [tokens, dim]
    pooled: NDArray[np.float32] | None = None  # [p], SDXL

    @property
    def nbytes(self) -> int:
        return self.context.nbytes + (0 if self.pooled is None else self.pooled.nbytes)


class Conditioner:
    """The text encoders of a bundle."""

    def __init__(self, bundle: Bundle, backend: Backend, adapters: Adapters) -> None:
        self._card = bundle.card
        encoders = bundle.card.text_encoders
        self._tokenizers = [
            ClipTokenizer.from_file(bundle.file(e.tokenizer), e.max_length, e.bos_id, e.eos_id, e.pad_id)
            for e in encoders
        ]
        self._graphs = [backend.open(e.component, adapters.banks(e.component)) for e in encoders]
        self._banked = [bundle.components[e.component].bank is not None for e in encoders]
        self._cache: OrderedDict[Hashable, Condition] = OrderedDict()
        self._cached = 0  # bytes
        self.rows = 0  # text encoder rows run so far

    def tokenize(self, prompt: str, syntax: str) -> list[TokenChunks]:
        """One TokenChunks for each text encoder. Raises RequestError for a prompt that cannot be read."""
        return [tokenizer.encode(prompt, syntax=syntax) for tokenizer in self._tokenizers]

    def prepare(self, job: Job) -> None:
        """Conditions of a job's prompts; the negative one only if some step runs it."""
        request, leg, before = job.request, job.legs[0], self.rows
        negative = request.negative if any(step.guidance != 1.0 for step in leg.plan.steps) else None
        warn_of_tags(f"{request.prompt}\n{negative or ''}")
        leg.cond, leg.uncond = self(request.prompt, negative, request.prompt_syntax, job.adapters, job.bank_slot)
        job.count("text_encoder", self.rows - before)

    def __call__(
        self, prompt: str, negative: str | None, syntax: str, adapters: AdapterSet | None = None, slot: int = NONE
    ) -> tuple[Condition, Condition | None]:
        """Conditions of the prompt and of the negative prompt (None: not needed), padded to equal length.

        adapters, slot: the LoRA set that both prompts are encoded with, and where it stands in the banks.
        """
        texts = [prompt] if negative is None else [prompt, negative]
        # all together: SDXL's tokenizers may cut one prompt into unequal numbers of chunks
        tokens = pad_chunks(*(chunks for text in texts for chunks in self.tokenize(text, syntax)))
        encoders = len(self._graphs)
        positive = self._encode(prompt, syntax, tokens[:encoders], adapters, slot)
        if negative is None:
            return positive, None
        if negative == "" and self._card.zero_empty_negative:
            pooled = None if positive.pooled is None else np.zeros_like(positive.pooled)
            return positive, Condition(np.zeros_like(positive.context), pooled)
        return positive, self._encode(negative, syntax, tokens[encoders:], adapters, slot)

    def _encode(
        self, prompt: str, syntax: str, tokens: Sequence[TokenChunks], adapters: AdapterSet | None, slot: int
    ) -> Condition:
        if adapters is not None and not adapters.changes_text:
            adapters = None
        key = (prompt, syntax, len(tokens[0].ids), None if adapters is None else (adapters.key, adapters.strength))
        if (found := self._cache.get(key)) is not None:
            self._cache.move_to_end(key)
            return found
        contexts, pooled = [], None
        for graph, banked, chunks in zip(self._graphs, self._banked, tokens, strict=True):
            inputs: dict[str, NDArray[Any]] = {"input_ids": chunks.ids}
            if banked:
                rows, strength = len(chunks.ids), 0.0 if adapters is None else adapters.strength
                inputs |= row_inputs([NONE if adapters is None else slot] * rows, [strength] * rows)
            outputs = graph(inputs)
            hidden = apply_weights(outputs["hidden_states"], chunks.weights)  # [chunks, L, dim]
            contexts.append(hidden.reshape(-1, hidden.shape[-1]))
            if "pooled" in outputs:
                pooled = np.array(outputs["pooled"][0])
            self.rows += len(chunks.ids)
        condition = Condition(np.concatenate(contexts, axis=-1), pooled)
        self._keep(key, condition)
        return condition

    def _keep(self, key: Hashable, condition: Condition) -> None:
        self._cache[key] = condition
        self._cached += condition.nbytes
        while self._cached > CACHED_BYTES and len(self._cache) > 1:
            self._cached -= self._cache.popitem(last=False)[1].nbytes
