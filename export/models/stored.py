"""Networks on disk: how each is built, which files hold its weights, and under which names; and whether they fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepforge.export.models.networks import check_counts
from stepforge.export.models.tokenizer import Pad, read_tokenizer
from stepforge.export.models.weights import NOT_READ, State, check_fit, fill, first_line, header_state, read_weights
from stepforge.runtime.errors import CheckpointError
from stepforge.runtime.files import printable

Rename = Callable[[State, nn.Module], State]  # weights by the file's names, the empty network -> by the network's names
# errors of diffusers' converters on odd files
CONVERTERS_RAISE = (KeyError, IndexError, ValueError, RuntimeError, TypeError, AttributeError)
SIZES = 6  # numbers that tell SDXL of an image: its original size, its crop, its target size


@dataclass(frozen=True, slots=True)
class Stored:
    """One network: examined by `check` from its config and its files' headers, read by `load`."""

    what: str  # name in errors
    config: Mapping[str, Any]
    build: Callable[[], Any]  # network without weights
    files: Sequence[Path]
    prefix: str = ""
    rename: Rename = lambda state, network: state

    def load(self, dtype: torch.dtype) -> Any:
        """A `weights.Loader`."""
        network = self.build()
        state = self._renamed(read_weights(self.files, dtype, self.prefix), network)
        return fill(network, state, dtype, self.what)

    def check(self) -> Any:
        """The network on the meta device. Raises CheckpointError unless the files hold exactly its weights."""
        if self.config.get("quantization_config"):
            raise CheckpointError(f"{self.what} has a quantization_config; {NOT_READ}")
        state = header_state(self.files, self.prefix)
        try:
            check_counts(self.config, len(state))
            with torch.device("meta"):
                network = self.build()
        except CheckpointError as error:
            raise CheckpointError(f"{self.what}: {error}") from error
        with torch.device("meta"):
            check_fit(network, self._renamed(state, network), self.what)
        return network

    def _renamed(self, state: State, network: nn.Module) -> State:
        try:
            return self.rename(state, network)
        except CONVERTERS_RAISE as error:
            missing = printable(first_line(error), 120)
            raise CheckpointError(f"{self.what} is damaged or of an unknown layout: weight {missing}") from error


def check_model(
    unet: Stored, vae: Stored, texts: Sequence[Stored], tokenizers: Sequence[Path], pads: Sequence[Pad | None]
) -> list[str]:
    """Examine the networks of a model, and how they fit together, without reading weights.

    Returns what was corrected of the tokenizers, a line each. Raises CheckpointError.
    """
    own, decoder, *encoders = (stored.check().config for stored in (unet, vae, *texts))
    if own.out_channels != decoder.latent_channels:
        raise CheckpointError(f"the UNet makes {own.out_channels} channels, the VAE takes {decoder.latent_channels}")
    widths = [encoder.hidden_size for encoder in encoders]
    if own.cross_attention_dim != sum(widths):
        raise CheckpointError(
            f"the text encoders make {' + '.join(map(str, widths))} numbers a token, the UNet takes "
            f"{printable(own.cross_attention_dim, 80)}"
        )
    xl = own.addition_embed_type is not None
    if xl != (len(texts) == 2):
        raise CheckpointError(f"the UNet is {'' if xl else 'not '}an SDXL model's; it has {len(texts)} text encoders")
    if xl:
        added = encoders[-1].projection_dim + SIZES * (own.addition_time_embed_dim or 0)
        if own.projection_class_embeddings_input_dim != added:
            raise CheckpointError(
                f"pooled text and sizes are {added} numbers, the UNet takes {own.projection_class_embeddings_input_dim}"
            )
    return check_tokenizers(texts, encoders, tokenizers, pads)


def check_tokenizers(
    texts: Sequence[Stored], encoders: Sequence[Any], tokenizers: Sequence[Path], pads: Sequence[Pad | None]
) -> list[str]:
    """Whether each tokenizer makes what its text encoder reads; what was corrected of them, a line each.

    encoders: configs of the text encoders. Raises CheckpointError.
    """
    corrected = []
    for stored, encoder, folder, pad in zip(texts, encoders, tokenizers, pads, strict=True):
        tokenizer = read_tokenizer(folder, pad)
        if (length := tokenizer.card["max_length"]) > (longest := encoder.max_position_embeddings):
            raise CheckpointError(f"the tokenizer makes {length} tokens, the text encoder takes {longest}")
        if tokenizer.vocabulary > encoder.vocab_size:
            raise CheckpointError(
                f"{folder} makes {tokenizer.vocabulary} different tokens, {stored.what} knows {encoder.vocab_size}; "
                "give the tokenizer of a model of the same family"
            )
        if tokenizer.corrected:
            corrected.append(f"{stored.what.rpartition(' ')[2]}: {tokenizer.corrected}")
    return corrected
