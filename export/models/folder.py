"""A diffusers folder to a Source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from stepforge.export.models import tokenizer
from stepforge.export.models.files import read_json, refuse_code
from stepforge.export.models.ldm_config import WIDTHS
from stepforge.export.models.networks import empty_clip, empty_unet, empty_vae, levels
from stepforge.export.models.pixel.read import read_if
from stepforge.export.models.scheduler import read_scheduler
from stepforge.export.models.source import Source
from stepforge.export.models.stored import Stored, check_model
from stepforge.export.models.weights import State, read_header, variant_of, weight_files
from stepforge.runtime.bundle import UNET, ComponentId, sha256
from stepforge.runtime.errors import BundleError, CheckpointError
from stepforge.runtime.files import printable

XL = ("StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline")
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline", *XL)
COMPONENTS = {  # component of a pipeline -> classes that it may have
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": tokenizer.CLASSES,
    "tokenizer_2": tokenizer.CLASSES,
}
NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")  # never opened
# Latents that a UNet was trained with, where its config does not say; diffusers' pipelines ask for a size then.
SAMPLE_SIZE = {"sd1": 64, "sd2": 64, "sdxl": 128}
SAMPLE_SIZE_V = 96  # SD 2 with v-prediction
SMALLEST = 64  # what SD's pipeline makes of a smaller sample_size that diffusers before 0.9 wrote
MOST_LATENTS = 1024  # a side


def read_folder(path: Path, prediction_type: str | None) -> Source:
    """Examine index, configs and the headers of weights; weights are read by the loaders. Raises CheckpointError."""
    if not (path / "model_index.json").exists():
        hint = " (a LoRA adapter, not a model)" if (path / "adapter_config.json").is_file() else ""
        raise CheckpointError(f"{path} is not a diffusers pipeline{hint}: it has no model_index.json")
    refuse_code(path)
    index = read_json(path / "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline == "IFPipeline":
        return read_if(path, index, prediction_type)
    if pipeline not in PIPELINES:
        raise CheckpointError(
            f"{path} is a {printable(repr(pipeline), 80)}; supported pipelines: {', '.join(PIPELINES)}, IFPipeline"
        )
    xl = pipeline in XL
    texts = ("text_encoder", "text_encoder_2") if xl else ("text_encoder",)
    names = [name.replace("text_encoder", "tokenizer") for name in texts]
    for name in ("unet", "vae", "scheduler", *texts, *names):
        if not (path / name).is_dir():
            raise CheckpointError(f"{path} lacks the component {name}")
    _check_index(path, index, ("unet", "vae", *texts, *names))
    assumed: list[str] = []
    corrected: list[str] = []
    files = {name: weight_files(path / name) for name in ("unet", "vae", *texts)}
    for name, found in files.items():
        if variant := variant_of(found):
            assumed.append(f"{name}: the weights of the variant {printable(variant, 40)}; there are no plain ones")
    config = read_json(path / "scheduler" / "scheduler_config.json")
    if prediction_type is not None:
        config["prediction_type"] = prediction_type
    try:
        scheduler, *said = read_scheduler(config, index["scheduler"], pipeline)
    except BundleError as error:
        raise CheckpointError(f"{path}: {error}") from error
    assumed += said[0]
    corrected += said[1]
    configs = {name: read_json(path / name / "config.json") for name in ("unet", "vae", *texts)}
    family = "sdxl" if xl else _family(configs["unet"])
    _size(path, configs["unet"], family, scheduler, assumed, corrected)
    encoder = any(key.startswith("encoder.") for file in files["vae"] for key in read_header(file).shapes)
    if not encoder:
        assumed.append("vae: only its decoder, because the files have no encoder")
    zeros = index.get("force_zeros_for_empty_prompt", True)  # default of the pipeline class
    if not isinstance(zeros, bool):
        raise CheckpointError(
            f"{path}: force_zeros_for_empty_prompt is {printable(repr(zeros), 80)}; true or false is expected"
        )
    if pipeline == XL[1] and index.get("requires_aesthetics_score", False) is not False:
        raise CheckpointError(
            f"{path}: requires_aesthetics_score is {printable(repr(index['requires_aesthetics_score']), 80)}; only SDXL's "
            "refiner reads an aesthetic score, see --expert"
        )
    if xl and "force_zeros_for_empty_prompt" not in index:
        assumed.append("force_zeros_for_empty_prompt: true, the default of diffusers' pipeline")
    if "scaling_factor" not in configs["vae"]:
        assumed.append(
            "vae scaling_factor: the default of diffusers' AutoencoderKL, because vae/config.json states none"
        )
    if index.get("safety_checker") not in (None, [None, None]):
        assumed.append("safety_checker: none; the model's own is not exported, images are not filtered")

    builds = {
        "unet": partial(empty_unet, configs["unet"]),
        "vae": partial(empty_vae, configs["vae"], encoder=encoder),
        **{name: partial(empty_clip, configs[name], projection=name == "text_encoder_2") for name in texts},
    }
    stored = {name: Stored(f"{path.name}/{name}", configs[name], builds[name], files[name]) for name in builds}
    if not encoder:
        stored["vae"] = replace(stored["vae"], rename=_without_quant_conv)
    encoders = [stored[name] for name in texts]
    tokenizers = tuple(path / name for name in names)
    pads = (None,) * len(texts)
    scale = 2 ** (levels(configs["vae"], (64,)) - 1)
    corrected += check_model(stored["unet"], stored["vae"], encoders, tokenizers, pads)
    return Source(
        name=path.resolve().name,
        family=family,
        unet=stored["unet"].load,
        vae=stored["vae"].load,
        text_encoders=tuple(each.load for each in encoders),
        tokenizers=tokenizers,
        pads=pads,
        scheduler=scheduler,
        provenance={
            "kind": "diffusers",
            "file": path.resolve().name,
            "sha256": {f.relative_to(path).as_posix(): sha256(f) for name in sorted(files) for f in files[name]},
        },
        empty={
            UNET: stored["unet"].build,
            **{ComponentId("text_encoder", name): stored[name].build for name in texts},
        },
        vae_scale=scale,
        force_zeros_for_empty_prompt=xl and zeros,
        assumed=tuple(assumed),
        corrected=tuple(corrected),
    )


def _check_index(path: Path, index: Mapping[str, Any], needed: tuple[str, ...]) -> None:
    """Every entry of model_index.json is a component we know, of a class that we know."""
    for name in (*needed, "scheduler"):
        if name not in index:
            raise CheckpointError(f"{path}: model_index.json does not name the component {name}")
    for name, entry in index.items():
        known = name in COMPONENTS or name == "scheduler"
        if (
            name in NOT_NEEDED
            or not (known or isinstance(entry, list))
            or (entry == [None, None] and name not in needed)
        ):
            continue
        if not known:
            raise CheckpointError(
                f"{path} has the unknown component {printable(repr(name), 80)}; known: {', '.join(COMPONENTS)}"
            )
        shown = printable(repr(entry), 80)
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            raise CheckpointError(
                f"{path}: model_index.json gives {shown} for {name}; a library and a class are expected"
            )
        if name in COMPONENTS and entry[-1] not in COMPONENTS[name]:  # the scheduler's is judged with its options
            raise CheckpointError(
                f"{path}: {name} is a {printable(repr(entry[-1]), 80)}; supported: {', '.join(COMPONENTS[name])}"
            )


def _without_quant_conv(state: State, network: nn.Module) -> State:
    """Weights of a VAE without encoder, whose last convolution some files still have."""
    return {key: value for key, value in state.items() if not key.startswith("quant_conv.")}


def _family(unet: Mapping[str, Any]) -> str:
    """SD 1 or SD 2, by the width of the text that the UNet reads; small models by their projections."""
    width = unet.get("cross_attention_dim")
    known = WIDTHS.get(width) if isinstance(width, int) else None
    return known if known in ("sd1", "sd2") else "sd2" if unet.get("use_linear_projection") else "sd1"


def _size(
    path: Path,
    unet: dict[str, Any],
    family: str,
    scheduler: Mapping[str, Any],
    assumed: list[str],
    corrected: list[str],
) -> None:
    """Latents of an image without a size, into the UNet's config; as the pipelines' constructors and calls take them."""
    size = unet.get("sample_size")
    if size is None:
        v = family == "sd2" and scheduler.get("prediction_type") == "v_prediction"
        unet["sample_size"] = SAMPLE_SIZE_V if v else SAMPLE_SIZE[family]
        assumed.append(f"size: sample_size {unet['sample_size']}, as {family}'s, because unet/config.json states none")
        return
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= MOST_LATENTS for side in sides):
        raise CheckpointError(
            f"{path}: the UNet's sample_size is {printable(repr(size), 80)}; one side or height and width, each from 1 to "
            f"{MOST_LATENTS}, are expected"
        )
    if family != "sdxl" and isinstance(size, int) and size < SMALLEST and _before_0_9(unet.get("_diffusers_version")):
        unet["sample_size"] = SMALLEST
        corrected.append(f"size: sample_size {SMALLEST} instead of {size}, which diffusers before 0.9 wrote by default")


def _before_0_9(version: Any) -> bool:
    """Whether diffusers' version, if it is stated, is before 0.9."""
    parts = str(version).split(".")[:2]
    return len(parts) == 2 and all(part.isdecimal() for part in parts) and tuple(map(int, parts)) < (0, 9)
