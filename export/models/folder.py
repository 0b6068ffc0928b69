"""A diffusers folder to a Source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from stepforge.export.models import tokenizer
from stepforge.export.models.networks import empty_clip, empty_unet, empty_vae
from stepforge.export.models.scheduler import read_scheduler
from stepforge.export.models.source import Source
from stepforge.export.models.weights import Loader, fill, read_json, read_weights, refuse_code, weight_files
from stepforge.runtime.bundle import UNET, ComponentId, sha256
from stepforge.runtime.errors import CheckpointError

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
COMPONENTS = {  # component of a pipeline -> classes that it may have
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": tokenizer.CLASSES,
    "tokenizer_2": tokenizer.CLASSES,
}
NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")  # never opened


def read_folder(path: Path, prediction_type: str | None) -> Source:
    """Examine index, configs and file names; weights are read by the loaders. Raises CheckpointError."""
    if not (path / "model_index.json").is_file():
        hint = " (a LoRA adapter, not a model)" if (path / "adapter_config.json").is_file() else ""
        raise CheckpointError(f"{path} is not a diffusers pipeline{hint}: it has no model_index.json")
    refuse_code(path)
    index = read_json(path / "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise CheckpointError(f"{path} is a {pipeline!r}; supported pipelines: {', '.join(PIPELINES)}")
    xl = pipeline == "StableDiffusionXLPipeline"
    _check_index(path, index)
    texts = ("text_encoder", "text_encoder_2") if xl else ("text_encoder",)
    tokenizers = tuple(path / name.replace("text_encoder", "tokenizer") for name in texts)
    for folder in (path / "unet", path / "vae", path / "scheduler", *(path / name for name in texts), *tokenizers):
        if not folder.is_dir():
            raise CheckpointError(f"{path} lacks the component {folder.name}")
    files = {name: weight_files(path / name) for name in ("unet", "vae", *texts)}
    config = read_json(path / "scheduler" / "scheduler_config.json")
    if prediction_type is not None:
        config["prediction_type"] = prediction_type
    scheduler, assumed, corrected = read_scheduler(config, index.get("scheduler"), pipeline)
    unet_config = read_json(path / "unet" / "config.json")

    def loader(name: str, build: Callable[[], Any]) -> Loader:
        return lambda dtype: fill(build(), read_weights(files[name], dtype), dtype, f"{path.name}/{name}")

    encoders = {
        name: partial(empty_clip, read_json(path / name / "config.json"), projection=name == "text_encoder_2")
        for name in texts
    }
    vae_config = read_json(path / "vae" / "config.json")
    return Source(
        name=path.resolve().name,
        family="sdxl" if xl else "sd2" if unet_config.get("use_linear_projection") else "sd1",
        unet=loader("unet", lambda: empty_unet(unet_config)),
        vae=loader("vae", lambda: empty_vae(vae_config)),
        text_encoders=tuple(loader(name, build) for name, build in encoders.items()),
        tokenizers=tokenizers,
        scheduler=scheduler,
        provenance={
            "kind": "diffusers",
            "file": path.resolve().name,
            "sha256": {f.relative_to(path).as_posix(): sha256(f) for name in sorted(files) for f in files[name]},
        },
        empty={
            UNET: lambda: empty_unet(unet_config),
            **{ComponentId("text_encoder", name): build for name, build in encoders.items()},
        },
        assumed=assumed,
        corrected=corrected,
        vae_scale=2 ** (len(vae_config.get("block_out_channels", (64,))) - 1),
        # the pipeline class's default, where an SDXL model does not say
        force_zeros_for_empty_prompt=xl and bool(index.get("force_zeros_for_empty_prompt", True)),
    )


def _check_index(path: Path, index: Mapping[str, Any]) -> None:
    """Every entry of model_index.json is a component we know, of a class that we know."""
    for name, entry in index.items():
        if not isinstance(entry, list) or name in NOT_NEEDED or entry == [None, None]:
            continue
        if name == "scheduler":
            continue  # judged with its options, by read_scheduler
        if name not in COMPONENTS:
            raise CheckpointError(f"{path} has the unknown component {name!r}; known: {', '.join(COMPONENTS)}")
        if entry[-1] not in COMPONENTS[name]:
            raise CheckpointError(f"{path}: {name} is a {entry[-1]!r}; supported: {', '.join(COMPONENTS[name])}")
