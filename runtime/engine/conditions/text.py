"""Prompts to what the denoiser reads: run the text encoders once for a prompt and keep the result."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stepforge.runtime.backends import Backend, Graph
from stepforge.runtime.bundle import UNET, Bundle, ComponentId, ModelCard, TextEncoder
from stepforge.runtime.engine.adapters import NONE, Adapters, AdapterSet, row_inputs
from stepforge.runtime.engine.conditions.prompts import (
    ClipTokenizer,
    TokenChunks,
    apply_weights,
    pad_chunks,
    warn_of_tags,
)
from stepforge.runtime.engine.conditions.t5 import T5Tokenizer
from stepforge.runtime.errors import GenerationError

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

    @property
    def is_finite(self) -> bool:
        return all(math.isfinite(float(part.sum())) for part in (self.context, self.pooled) if part is not None)


NO_TEXT = Condition(np.zeros((0, 0), np.float32))  # of models that read no text


class Conditioner:
    """The text encoders of a bundle's models. Those of stages are opened when they are first used; models that have the same
    encoders share what these made of a prompt."""

    def __init__(self, bundle: Bundle, backend: Backend, adapters: Adapters) -> None:
        self._bundle, self._backend, self._adapters = bundle, backend, adapters
        self._tokenizers = {encoder: _tokenizer(bundle, card, encoder) for card, encoder in _encoders(bundle)}
        self._graphs: dict[ComponentId, Graph] = {}
        for component in bundle.text_encoders:
            self._open(component)
        self._cache: OrderedDict[Hashable, Condition] = OrderedDict()
        self._cached = 0  # bytes
        self.rows = 0  # text encoder rows run so far

    def tokenize(self, prompt: str, syntax: str, stage: str = "") -> list[TokenChunks]:
        """One TokenChunks for each text encoder. Raises RequestError for a prompt that cannot be read."""
        model = self._bundle.model(stage)
        encoders = () if model is None else model.text_encoders
        return [self._tokenizers[encoder].encode(prompt, syntax=syntax) for encoder in encoders]

    def prepare(self, job: Job) -> None:
        """Conditions of a job's prompts, for each leg that is a diffusion model; the negative one only if some step runs it.

        A leg's own prompts stand before the request's. LoRA sets are the base model's.
        """
        request, before = job.request, self.rows
        warn_of_tags(f"{request.prompt}\n{request.negative}")
        for leg in job.legs:
            job.go_on()
            if self._bundle.model(leg.stage) is None:
                continue
            prompt = request.prompt if leg.prompt is None else leg.prompt
            negative: str | None = request.negative if leg.negative is None else leg.negative
            if all(step.guidance == 1.0 for step in leg.plan.steps):
                negative = None
            adapters = None if leg.stage else job.adapters
            texts = partial(self, prompt, negative, request.prompt_syntax, adapters, job.bank_slot, leg.stage)
            leg.cond, leg.uncond = texts()
            for denoiser in dict.fromkeys(step.denoiser for step in leg.plan.steps):
                expert = None if leg.stage else self._bundle.experts.get(denoiser)
                if expert is not None and expert.text_encoders:
                    leg.texts[denoiser] = texts(denoiser)
        job.count("text_encoder", self.rows - before)

    def __call__(
        self,
        prompt: str,
        negative: str | None,
        syntax: str,
        adapters: AdapterSet | None = None,
        slot: int = NONE,
        stage: str = "",
        denoiser: str = UNET.name,
    ) -> tuple[Condition, Condition | None]:
        """Conditions of the prompt and of the negative prompt (None: not needed), padded to equal length.

        adapters, slot: the LoRA set that both prompts are encoded with, and where it stands in the banks. stage: whose model
        reads them; one that reads no text has no condition for a negative prompt. denoiser: an expert may read in its own way.
        """
        encoders, zero_empty_negative = self._bundle.reading(stage, denoiser)
        if not encoders:
            return NO_TEXT, None
        texts = [prompt] if negative is None else [prompt, negative]
        # all together: SDXL's tokenizers may cut one prompt into unequal numbers of chunks
        tokens = pad_chunks(
            *(self._tokenizers[encoder].encode(text, syntax=syntax) for text in texts for encoder in encoders)
        )
        positive = self._encode(encoders, prompt, syntax, tokens[: len(encoders)], adapters, slot)
        if negative is None:
            return positive, None
        if negative == "" and zero_empty_negative:
            pooled = None if positive.pooled is None else np.zeros_like(positive.pooled)
            return positive, Condition(np.zeros_like(positive.context), pooled)
        return positive, self._encode(encoders, negative, syntax, tokens[len(encoders) :], adapters, slot)

    def _encode(
        self,
        encoders: Sequence[TextEncoder],
        prompt: str,
        syntax: str,
        tokens: Sequence[TokenChunks],
        adapters: AdapterSet | None,
        slot: int,
    ) -> Condition:
        if adapters is not None and not adapters.changes_text:
            adapters = None
        adapted = None if adapters is None else (adapters.key, adapters.strength)
        key = (encoders, prompt, syntax, len(tokens[0].ids), adapted)
        if (found := self._cache.get(key)) is not None:
            self._cache.move_to_end(key)
            return found
        contexts, pooled = [], None
        for encoder, chunks in zip(encoders, tokens, strict=True):
            inputs: dict[str, NDArray[Any]] = {"input_ids": chunks.ids}
            if chunks.mask is not None:
                inputs["attention_mask"] = chunks.mask
            if self._bundle.components[encoder.component].bank is not None:
                rows, strength = len(chunks.ids), 0.0 if adapters is None else adapters.strength
                inputs |= row_inputs([NONE if adapters is None else slot] * rows, [strength] * rows)
            outputs = self._open(encoder.component)(inputs)
            hidden = apply_weights(outputs["hidden_states"], chunks.weights)  # [chunks, L, dim]
            contexts.append(hidden.reshape(-1, hidden.shape[-1]))
            if "pooled" in outputs:
                pooled = np.array(outputs["pooled"][0])
            self.rows += len(chunks.ids)
        condition = Condition(np.concatenate(contexts, axis=-1), pooled)
        if not condition.is_finite:  # never kept: the next request may fare better
            raise GenerationError("what the text encoder made of the prompt is not finite")
        self._keep(key, condition)
        return condition

    def _open(self, component: ComponentId) -> Graph:
        if component not in self._graphs:
            self._graphs[component] = self._backend.open(component, self._adapters.banks(component))
        return self._graphs[component]

    def _keep(self, key: Hashable, condition: Condition) -> None:
        self._cache[key] = condition
        self._cached += condition.nbytes
        while self._cached > CACHED_BYTES and len(self._cache) > 1:
            self._cached -= self._cache.popitem(last=False)[1].nbytes


def _encoders(bundle: Bundle) -> Iterator[tuple[ModelCard, TextEncoder]]:
    for card in bundle.models:
        yield from ((card, encoder) for encoder in card.text_encoders)
    for expert in bundle.experts.values():
        yield from ((bundle.card, encoder) for encoder in expert.text_encoders)


def _tokenizer(bundle: Bundle, card: ModelCard, encoder: TextEncoder) -> ClipTokenizer | T5Tokenizer:
    kind = T5Tokenizer if card.family == "if" else ClipTokenizer
    ids = encoder.bos_id, encoder.eos_id, encoder.pad_id
    return kind.from_file(bundle.file(encoder.tokenizer), encoder.max_length, *ids)
