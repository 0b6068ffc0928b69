"""The door to super-resolution models on disk, for `--sr NAME=PATH`: examined before any weight is read.

Which kind a path holds is decided by what lies there: a diffusers folder by the class of its pipeline, see READERS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from stepforge.export.models import tokenizer
from stepforge.export.models.files import read_json, reading, refuse_code
from stepforge.export.models.networks import PLAIN_UNET, empty_clip, empty_network, empty_vae, levels
from stepforge.export.models.pixel.read import NOT_NEEDED, read_pixel_sr
from stepforge.export.models.scheduler import EXAMINED, noising_card, read_scheduler, scheduler_card
from stepforge.export.models.source import Source, Upscaler
from stepforge.export.models.stored import Stored, check_tokenizers
from stepforge.export.models.weights import read_header, variant_of, weight_files
from stepforge.runtime.bundle import UNET, ComponentId, sha256
from stepforge.runtime.errors import BundleError, CheckpointError
from stepforge.runtime.files import printable

X4_SCALING = 0.08333  # what diffusers' pipeline makes of any other scaling_factor
X2_FEATURES = 128  # numbers of timestep_cond before pooled text, see graph/upscaler.py
CLASSES = {  # component of a pipeline -> classes that it may have
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": tokenizer.CLASSES,
}
PARTS = tuple(CLASSES)


def read_upscaler(path: str | Path) -> Upscaler:
    """Examine a super-resolution model; no weights are read yet. Raises CheckpointError."""
    path = Path(path)
    with reading(path):
        if not path.exists():
            raise CheckpointError(f"{path} does not exist; give a diffusers folder")
        if not (path / "model_index.json").is_file():
            raise CheckpointError(f"{path} is not a diffusers pipeline: it has no model_index.json")
        refuse_code(path)
        index = read_json(path / "model_index.json")
        named = index.get("_class_name")
        if not isinstance(named, str) or named not in READERS:
            raise CheckpointError(
                f"{path} is a {printable(repr(named), 80)}; supported super-resolution: {', '.join(READERS)}"
            )
        try:
            return READERS[named](path, index)
        except BundleError as error:
            raise CheckpointError(f"{path}: {error}") from error


def read_x4(path: Path, index: Mapping[str, Any]) -> Upscaler:
    """Stable Diffusion x4 upscaler: the noised image beside the latents, its noise level as class label."""
    configs = _configs(path, index)
    corrected = []
    if (factor := configs["vae"].get("scaling_factor", 0.18215)) != X4_SCALING:
        configs["vae"]["scaling_factor"] = X4_SCALING
        corrected.append(
            f"vae: scaling_factor {X4_SCALING} instead of {printable(repr(factor), 80)}, as the pipeline's"
        )
    source, unet, vae, text = _source(
        path, index, configs, "x4", partial(_unet, configs["unet"], ("num_class_embeds",)), corrected
    )
    _check(
        unet.in_channels == vae.latent_channels + 3, f"its UNet takes {unet.in_channels} channels, not latents and RGB"
    )
    _check(unet.out_channels == vae.latent_channels, f"its UNet makes {unet.out_channels} channels, not latents")
    _check(unet.num_class_embeds is not None, "its UNet has no num_class_embeds, so that it is told no noise level")
    _check(unet.cross_attention_dim == text.hidden_size, "its UNet does not read its text encoder")
    most = index.get("max_noise_level", 350)
    if type(most) is not int or not 0 <= most < unet.num_class_embeds:
        raise CheckpointError(
            f"{path}: max_noise_level is {printable(repr(most), 80)}; the UNet knows {unet.num_class_embeds}"
        )
    entry = index.get("low_res_scheduler")
    if entry != ["diffusers", "DDPMScheduler"]:
        raise CheckpointError(
            f"{path}: low_res_scheduler is {printable(repr(entry), 80)}; supported: diffusers' DDPMScheduler"
        )
    return Upscaler(
        kind="x4",
        scale=source.vae_scale,
        source=source,
        size_multiple=source.vae_scale,
        steps=75,
        guidance=9.0,
        noise_level=min(20, most),
        most_noise=most,
        noising=noising_card(read_json(path / "low_res_scheduler" / "scheduler_config.json")),
    )


def read_x2(path: Path, index: Mapping[str, Any]) -> Upscaler:
    """x2 latent upscaler: latents of Stable Diffusion 1 or 2, doubled, beside the latents; pooled text in the time embedding.

    Its pipeline makes the clean latent itself, which the graph writes as v (graph/upscaler.py): so says its scheduler's card.
    """
    configs = _configs(path, index)
    build = partial(_unet, configs["unet"], ("time_cond_proj_dim",))
    source, unet, vae, text = _source(path, index, configs, "x2", build, [])
    _check(
        unet.in_channels == 2 * vae.latent_channels, f"its UNet takes {unet.in_channels} channels, not latents twice"
    )
    _check(
        unet.out_channels == vae.latent_channels + 1,
        f"its UNet makes {unet.out_channels} channels, not latents and one",
    )
    _check(unet.time_embedding_type == "fourier", f"its UNet embeds times by {unet.time_embedding_type}, not fourier")
    _check(
        unet.time_cond_proj_dim == X2_FEATURES + text.hidden_size,
        "its UNet does not read its text encoder's pooled text",
    )
    _check(unet.cross_attention_dim == text.hidden_size, "its UNet does not read its text encoder")
    scheduler = dict(source.scheduler)
    _check(
        scheduler["_class_name"] == "EulerDiscreteScheduler"
        and scheduler.get("prediction_type") in ("sample", "original_sample"),
        "its scheduler is not an EulerDiscreteScheduler that predicts the sample",
    )
    source = replace(source, scheduler=scheduler | {"prediction_type": "v_prediction"})
    halvings = len(unet.block_out_channels) - 1
    return Upscaler(
        kind="x2", scale=2, source=source, size_multiple=source.vae_scale * 2**halvings, steps=75, guidance=9.0
    )


READERS: dict[str, Callable[[Path, Mapping[str, Any]], Upscaler]] = {  # class of a pipeline -> its reader
    "StableDiffusionUpscalePipeline": read_x4,
    "StableDiffusionLatentUpscalePipeline": read_x2,
    "IFSuperResolutionPipeline": read_pixel_sr,
}


def _configs(path: Path, index: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Configs of the networks, after the index: every part is there, of a class that we know. Raises CheckpointError."""
    for name, classes in CLASSES.items():
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] not in classes:
            shown = printable(repr(entry), 80)
            raise CheckpointError(f"{path}: {name} is {shown}; supported: {', '.join(classes)}")
    for name in (*PARTS, "scheduler"):
        if not (path / name).is_dir():
            raise CheckpointError(f"{path} lacks the component {name}")
    return {name: read_json(path / name / "config.json") for name in ("unet", "vae", "text_encoder")}


def _source(
    path: Path,
    index: Mapping[str, Any],
    configs: Mapping[str, dict[str, Any]],
    family: str,
    unet: Callable[[], Any],
    corrected: list[str],
) -> tuple[Source, Any, Any, Any]:
    """Networks and sampler of a latent stage; the configs of UNet, VAE and text encoder as their classes read them."""
    files = {name: weight_files(path / name) for name in configs}
    assumed = [
        f"{name}: the weights of the variant {printable(variant, 40)}; there are no plain ones"
        for name, found in files.items()
        if (variant := variant_of(found))
    ]
    if any(index.get(name) not in (None, [None, None]) for name in NOT_NEEDED):
        assumed.append("safety_checker and watermarker: none; images are neither filtered nor marked")
    encoder = any(key.startswith("encoder.") for file in files["vae"] for key in read_header(file).shapes)
    builds: dict[str, Callable[[], Any]] = {
        "unet": unet,
        "vae": partial(empty_vae, configs["vae"], encoder=encoder),
        "text_encoder": partial(empty_clip, configs["text_encoder"], projection=False),
    }
    stored = {name: Stored(f"{path.name}/{name}", configs[name], builds[name], files[name]) for name in builds}
    networks = {name: each.check().config for name, each in stored.items()}
    config = read_json(path / "scheduler" / "scheduler_config.json")
    scheduler, said, changed = read_scheduler(config, index.get("scheduler"), str(index["_class_name"]))
    scheduler_card(scheduler, EXAMINED)
    corrected += changed
    corrected += check_tokenizers([stored["text_encoder"]], [networks["text_encoder"]], [path / "tokenizer"], [None])
    size = configs["unet"].get("sample_size")
    if type(size) is not int or not 0 < size <= 1024:
        raise CheckpointError(f"{path}: the UNet's sample_size is {printable(repr(size), 80)}; one side is expected")
    source = Source(
        name=path.resolve().name,
        family=family,
        unet=stored["unet"].load,
        vae=stored["vae"].load,
        text_encoders=(stored["text_encoder"].load,),
        tokenizers=(path / "tokenizer",),
        pads=(None,),
        scheduler=scheduler,
        provenance={
            "kind": "diffusers",
            "file": path.resolve().name,
            "sha256": {f.relative_to(path).as_posix(): sha256(f) for name in sorted(files) for f in files[name]},
        },
        empty={UNET: stored["unet"].build, ComponentId("text_encoder", "text_encoder"): stored["text_encoder"].build},
        vae_scale=2 ** (levels(configs["vae"], (64,)) - 1),
        assumed=(*assumed, *said),
        corrected=tuple(corrected),
    )
    return source, networks["unet"], networks["vae"], networks["text_encoder"]


def _unet(config: Mapping[str, Any], allowed: tuple[str, ...]) -> Any:
    """An empty UNet of a stage. Raises CheckpointError for options that would need other inputs than the stage gives."""
    from diffusers import UNet2DConditionModel

    for option in (*PLAIN_UNET, "addition_embed_type"):
        if option not in allowed and config.get(option):
            shown = printable(repr(config[option]), 80)
            raise CheckpointError(f"the UNet has {option}={shown}, which stepforge does not support here")
    return empty_network(UNet2DConditionModel, config)


def _check(fits: bool, fault: str) -> None:
    if not fits:
        raise CheckpointError(f"this is no such upscaler: {fault}")
