"""Folders of diffusers' IF pipelines: the base model, and super-resolution in the layout of stage II.

A stage of super-resolution need not read text: text_encoder and tokenizer are then null in model_index.json, and its UNet has
no block that attends to text. One that does read text may leave its encoder to the base model, as diffusers' pipelines are
used with prompt_embeds of stage I.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stepforge.export.models.files import read_json
from stepforge.export.models.networks import empty_network, reads_text, size_multiple
from stepforge.export.models.pixel import t5
from stepforge.export.models.scheduler import EXAMINED, noising_card, read_scheduler, scheduler_card
from stepforge.export.models.source import Source, Upscaler
from stepforge.export.models.stored import Stored
from stepforge.export.models.weights import variant_of, weight_files
from stepforge.runtime.bundle import UNET, sha256
from stepforge.runtime.errors import BundleError, CheckpointError
from stepforge.runtime.files import printable

CHANNELS = 3
STEPS, GUIDANCE, NOISE_LEVEL = 50, 4.0, 250  # defaults of diffusers' IFSuperResolutionPipeline
CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "text_encoder": ("T5EncoderModel",),
    "tokenizer": t5.CLASSES,
}
NOT_NEEDED = ("safety_checker", "feature_extractor", "watermarker")  # images are neither filtered nor marked
MOST_SIDE = 4096
# Options of a UNet that would need further inputs; those that IF has are checked one by one.
REFUSED = ("num_class_embeds", "time_cond_proj_dim", "class_embeddings_concat")
TEXT_OPTIONS = {"encoder_hid_dim_type": ("text_proj",), "addition_embed_type": ("text",)}


def read_if(path: Path, index: Mapping[str, Any], prediction_type: str | None = None) -> Source:
    """The base model of a cascade, diffusers' IFPipeline. Raises CheckpointError."""
    return _read(path, index, CHANNELS, None, prediction_type).source


def read_pixel_sr(path: Path, index: Mapping[str, Any]) -> Upscaler:
    """Super-resolution on pixels, diffusers' IFSuperResolutionPipeline. Raises CheckpointError."""
    found = _read(path, index, 2 * CHANNELS, "timestep", None)
    entry = index.get("image_noising_scheduler")
    if entry != ["diffusers", "DDPMScheduler"]:
        shown = printable(repr(entry), 80)
        raise CheckpointError(f"{path}: image_noising_scheduler is {shown}; supported: diffusers' DDPMScheduler")
    noising = noising_card(read_json(path / "image_noising_scheduler" / "scheduler_config.json"))
    most = noising.num_train_timesteps - 1
    return Upscaler(
        kind="pixel",
        scale=0,
        source=found.source,
        size_multiple=found.multiple,
        steps=STEPS,
        guidance=GUIDANCE if found.text_width else 1.0,
        noise_level=min(NOISE_LEVEL, most),
        most_noise=most,
        noising=noising,
        size=found.size,
        text_width=found.text_width,
    )


def shares_text(upscaler: Upscaler, base: Source) -> bool:
    """Whether a stage on pixels takes the text encoder of the base model: it has none of its own, or the same files.

    Raises CheckpointError if it reads text that neither makes.
    """
    if not upscaler.text_width:
        return False
    own, theirs = (_text_files(source) for source in (upscaler.source, base))
    if own:
        return base.family == "if" and own == theirs
    width = base.empty_text().d_model if base.family == "if" and base.empty_text is not None else 0
    if width != upscaler.text_width:
        raise CheckpointError(
            f"{upscaler.source.name} reads text of width {upscaler.text_width} and has no text encoder; the base model's "
            f"makes {width or 'none for it'}"
        )
    return True


@dataclass(frozen=True, slots=True)
class _Found:
    source: Source
    size: int  # side of the images that the model was trained for
    multiple: int  # sides must be multiples of this
    text_width: int  # numbers a token that the UNet reads; 0: it reads no text


def _read(
    path: Path, index: Mapping[str, Any], channels: int, labels: str | None, prediction_type: str | None
) -> _Found:
    """channels: that the UNet reads. labels: its class_embed_type."""
    parts = [name for name in CLASSES if _is_given(path, index, name)]
    if "unet" not in parts or ("text_encoder" in parts) != ("tokenizer" in parts):
        raise CheckpointError(
            f"{path} has {', '.join(parts) or 'nothing'}; a UNet, and a text encoder with its tokenizer"
        )
    networks = [name for name in parts if name != "tokenizer"]
    for name in (*parts, "scheduler"):
        if not (path / name).is_dir():
            raise CheckpointError(f"{path} lacks the component {name}")
    configs = {name: read_json(path / name / "config.json") for name in networks}
    files = {name: weight_files(path / name) for name in networks}
    assumed = [
        f"{name}: the weights of the variant {printable(variant, 40)}; there are no plain ones"
        for name, found in files.items()
        if (variant := variant_of(found))
    ]
    builds = {"unet": partial(_empty_unet, configs["unet"], channels, labels)}
    if "text_encoder" in parts:
        builds["text_encoder"] = partial(t5.empty_t5, configs["text_encoder"])
    stored = {name: Stored(f"{path.name}/{name}", configs[name], builds[name], files[name]) for name in networks}
    if "text_encoder" in parts:
        stored["text_encoder"] = replace(stored["text_encoder"], rename=t5.with_embeddings)
    empty = {name: each.check() for name, each in stored.items()}
    unet = empty["unet"].config
    scheduler, corrected = _scheduler(path, index, unet, prediction_type, assumed)
    width = _text_width(unet)
    if "text_encoder" in parts:
        _check_text(path, width, empty["text_encoder"].config, path / "tokenizer")
    elif width and labels is None:
        raise CheckpointError(f"{path}: its UNet reads text of width {width}, and there is no text encoder")
    multiple = size_multiple(unet)
    size = unet.sample_size
    if type(size) is not int or not 0 < size <= MOST_SIDE or size % multiple:
        shown = printable(repr(size), 80)
        raise CheckpointError(f"{path}: the UNet's sample_size is {shown}; a multiple of {multiple} is expected")
    if any(index.get(name) not in (None, [None, None]) for name in NOT_NEEDED):
        assumed.append("safety_checker and watermarker: none; images are neither filtered nor marked")
    texts = ("text_encoder",) if "text_encoder" in parts else ()

    def text_encoder(_: torch.dtype) -> Any:
        """In fp32: T5 overflows in fp16 (transformers keeps parts of it in fp32, and clamps)."""
        return stored["text_encoder"].load(torch.float32)

    source = Source(
        name=path.resolve().name,
        family="if",
        unet=stored["unet"].load,
        vae=None,
        text_encoders=(text_encoder,) * len(texts),
        tokenizers=tuple(path / "tokenizer" for _ in texts),
        pads=(None,) * len(texts),
        scheduler=scheduler,
        provenance={
            "kind": "diffusers",
            "file": path.resolve().name,
            "sha256": {f.relative_to(path).as_posix(): sha256(f) for name in sorted(files) for f in files[name]},
        },
        empty={UNET: stored["unet"].build},
        vae_scale=1,
        size_multiple=multiple,
        empty_text=(lambda: empty["text_encoder"].config) if texts else None,
        assumed=tuple(assumed),
        corrected=tuple(corrected),
    )
    return _Found(source, size, multiple, width)


def _is_given(path: Path, index: Mapping[str, Any], name: str) -> bool:
    """Whether model_index.json names a component, which must be of a class that we know."""
    entry = index.get(name)
    if entry in (None, [None, None]):
        return False
    if not isinstance(entry, list) or len(entry) != 2 or entry[1] not in CLASSES[name]:
        shown = printable(repr(entry), 80)
        raise CheckpointError(f"{path}: {name} is {shown}; supported: {', '.join(CLASSES[name])}")
    return True


def _empty_unet(config: Mapping[str, Any], channels: int, labels: str | None) -> Any:
    from diffusers import UNet2DConditionModel

    refused = [name for name in REFUSED if config.get(name)]
    refused += [name for name, known in TEXT_OPTIONS.items() if config.get(name) not in (None, *known)]
    if config.get("class_embed_type") != labels:
        refused.append("class_embed_type")
    if config.get("in_channels", 4) != channels:
        refused.append("in_channels")
    if config.get("out_channels", 4) not in (CHANNELS, 2 * CHANNELS):
        refused.append("out_channels")
    if refused:
        name = refused[0]
        raise CheckpointError(f"the UNet has {name}={printable(repr(config.get(name)), 80)}, which is not IF's layout")
    return empty_network(UNet2DConditionModel, config)


def _text_width(unet: Any) -> int:
    if not reads_text(unet):
        return 0
    return int(unet.encoder_hid_dim if unet.encoder_hid_dim_type == "text_proj" else unet.cross_attention_dim)


def _check_text(path: Path, width: int, encoder: Any, folder: Path) -> None:
    if not width:
        raise CheckpointError(
            f"{path} has a text encoder, but its UNet reads no text; name it null in model_index.json"
        )
    if width != encoder.d_model:
        raise CheckpointError(f"the text encoder makes {encoder.d_model} numbers a token, the UNet takes {width}")
    if (found := t5.read_t5_tokenizer(folder).vocabulary) > encoder.vocab_size:
        raise CheckpointError(f"{folder} makes {found} different tokens, the text encoder knows {encoder.vocab_size}")


def _scheduler(
    path: Path, index: Mapping[str, Any], unet: Any, prediction_type: str | None, assumed: list[str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    config = read_json(path / "scheduler" / "scheduler_config.json")
    if prediction_type is not None:
        config["prediction_type"] = prediction_type
    try:
        scheduler, said, corrected = read_scheduler(config, index.get("scheduler"), str(index["_class_name"]))
        card = scheduler_card(scheduler, EXAMINED)
    except BundleError as error:
        raise CheckpointError(f"{path}: {error}") from error
    assumed += said
    if card.learned_range and unet.out_channels != 2 * CHANNELS:
        raise CheckpointError(
            f"{path}: the scheduler's variance_type is learned_range, which needs {2 * CHANNELS} channels of the UNet; it has "
            f"{unet.out_channels}"
        )
    return scheduler, corrected


def _text_files(source: Source) -> dict[str, str]:
    """sha256 of the text encoder's weights by file name."""
    files: Mapping[str, str] = source.provenance["sha256"]
    return {name: value for name, value in files.items() if name.startswith("text_encoder/")}
