"""Further denoisers of a model: SDXL's refiner, and experts of the model's own architecture. Examined here, read by loaders."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stepforge.export.lora.merge import read_all, with_adapters
from stepforge.export.models.files import read_json, refuse_code
from stepforge.export.models.networks import empty_clip, empty_unet
from stepforge.export.models.source import Source
from stepforge.export.models.stored import Stored, check_tokenizers
from stepforge.export.models.weights import Loader, weight_files
from stepforge.runtime.bundle import TEXT_ENCODERS, UNET, WORD, sha256
from stepforge.runtime.errors import CheckpointError
from stepforge.runtime.files import printable

REFINER = "StableDiffusionXLImg2ImgPipeline"
START = 0.8  # share of the timesteps that the refiner leaves to the base model; diffusers' documentation has it so
AESTHETIC_IDS = 5  # height, width, top, left, score
SHAPE = (  # what of a UNet's config decides its graph
    "in_channels", "out_channels", "block_out_channels", "layers_per_block", "down_block_types", "up_block_types",
    "cross_attention_dim", "attention_head_dim", "transformer_layers_per_block", "addition_embed_type",
    "projection_class_embeddings_input_dim",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Text:
    """The refiner's text encoder."""

    load: Loader
    tokenizer: Path
    zero_empty_negative: bool


@dataclass(frozen=True, slots=True)
class Expert:
    """A denoiser beside the model's own, as the exporter sees it.

    unit, start, end: where it runs, see `bundle.ExpertCard`. text: the refiner's; None: it reads what the model's own denoiser
    reads, and has its architecture.
    """

    unet: Loader
    empty: Callable[[], Any]
    unit: str
    start: float
    end: float | None
    provenance: Mapping[str, Any]
    text: Text | None = None


def read_expert(name: str, path: Path, base: Source, window: tuple[str, float, float | None] | None) -> Expert:
    """A refiner's folder; a pipeline's or a UNet's folder; or a LoRA file over the model's own UNet.

    window: unit, start and end; None only for a refiner. Raises CheckpointError, AdapterError for a LoRA file.
    """
    if not WORD.fullmatch(name) or name in (UNET.name, "base"):
        raise CheckpointError(f"expert name {printable(repr(name), 80)} is not allowed; use letters, digits, - and _")
    try:
        if not path.exists():
            raise CheckpointError(f"{path} does not exist; give a pipeline's or a UNet's folder, or a LoRA file")
        index = read_json(path / "model_index.json") if (path / "model_index.json").is_file() else {}
        if index.get("_class_name") == REFINER and index.get("text_encoder", [None]) == [None, None]:
            return _refiner(path, index, base, window or ("timesteps", START, 1.0))
        if window is None:
            raise CheckpointError("it has no window; give it one, such as NAME=PATH@sigma=5..inf")
        if path.is_file():
            merged = with_adapters(base, read_all(base, [(path, 1.0)]))
            found = {"kind": "adapter", "file": path.name, "sha256": sha256(path)}
            return Expert(merged.unet, base.empty[UNET], *window, found)
        unet = _unet(path / "unet" if index else path, path.name)
    except CheckpointError as error:
        raise CheckpointError(f"expert {name}: {error}") from error
    mine, own = unet.check().config, base.empty[UNET]().config
    if odd := [key for key in SHAPE if mine.get(key) != own.get(key)]:
        raise CheckpointError(
            f"expert {name}: its UNet has another {odd[0]} than the model's: {printable(mine.get(odd[0]), 80)}, not "
            f"{printable(own.get(odd[0]), 80)}; only SDXL's refiner may differ"
        )
    return Expert(unet.load, unet.build, *window, _provenance(path, unet))


def _unet(folder: Path, what: str) -> Stored:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no UNet's folder: it has no config.json")
    refuse_code(folder)
    config = read_json(folder / "config.json")
    return Stored(f"{what}/unet", config, partial(empty_unet, config), weight_files(folder))


def _refiner(path: Path, index: Mapping[str, Any], base: Source, window: tuple[str, float, float | None]) -> Expert:
    refuse_code(path)
    if base.family != "sdxl":
        raise CheckpointError(f"it is SDXL's refiner, and {base.name} is {base.family}")
    if index.get("requires_aesthetics_score") is not True:
        raise CheckpointError(
            "a refiner reads an aesthetic score; its model_index.json says requires_aesthetics_score: true"
        )
    unet, second = _unet(path / "unet", path.name), TEXT_ENCODERS[1].name
    config = read_json(path / second / "config.json")
    text = Stored(
        f"{path.name}/{second}", config, partial(empty_clip, config, projection=True), weight_files(path / second)
    )
    own, encoder, model = unet.check().config, text.check().config, base.empty[UNET]().config
    if own.in_channels != model.in_channels or own.cross_attention_dim != encoder.hidden_size:
        raise CheckpointError(
            f"its UNet reads {own.in_channels} channels and {printable(own.cross_attention_dim, 80)} numbers a token; the base "
            f"model makes {model.in_channels}, its text encoder {encoder.hidden_size}"
        )
    added = encoder.projection_dim + AESTHETIC_IDS * (own.addition_time_embed_dim or 0)
    if own.projection_class_embeddings_input_dim != added:
        raise CheckpointError(
            f"pooled text, sizes and score are {added} numbers, the UNet takes {own.projection_class_embeddings_input_dim}"
        )
    tokens = path / "tokenizer_2"
    check_tokenizers([text], [encoder], [tokens], [None])
    zeros = index.get("force_zeros_for_empty_prompt", True)
    if not isinstance(zeros, bool):
        raise CheckpointError(
            f"force_zeros_for_empty_prompt is {printable(repr(zeros), 80)}; true or false is expected"
        )
    found = Text(text.load, tokens, zeros)
    return Expert(unet.load, unet.build, *window, _provenance(path, unet, text), found)


def _provenance(path: Path, *stored: Stored) -> dict[str, Any]:
    return {
        "kind": "diffusers",
        "file": path.resolve().name,
        "sha256": {file.relative_to(path).as_posix(): sha256(file) for one in stored for file in one.files},
    }


def same_weights(one: Loader, other: Loader) -> bool:
    """Whether two networks have the same weights and settings; one is in memory at a time."""
    return _digest(one) == _digest(other)


def _digest(load: Loader) -> tuple[Any, ...]:
    network = load(torch.float32)
    settings = {key: value for key, value in network.config.to_dict().items() if key not in ("dtype", "architectures")}
    settings = {key: value for key, value in settings.items() if not key.startswith(("_", "transformers"))}
    weights = {
        name: hashlib.sha256(value.detach().contiguous().numpy()).hexdigest()
        for name, value in network.state_dict().items()
    }
    return settings, weights
