"""The authority for experts: diffusers' base and refiner pipelines one after the other, or its pipeline with another UNet at
some steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from transformers import CLIPTextModelWithProjection

from stepforge.export.expert_source import REFINER, Expert, read_expert
from stepforge.export.models.source import Source
from stepforge.export.parity.loaders import FP32, check_complete, quiet
from stepforge.export.parity.recorder import Call, Recorder, denoiser_calls
from stepforge.export.parity.reference import Reference, Settings
from stepforge.export.parity.staging import reason, stage_component, staging
from stepforge.runtime.arrays import Float32
from stepforge.runtime.bundle import TEXT_ENCODERS, UNET, Bundle, ComponentId
from stepforge.runtime.errors import CheckpointError
from stepforge.runtime.plan.switch import default_switch
from stepforge.runtime.request import Request


@dataclass(frozen=True, slots=True)
class ExpertReference:
    """The first prompt with the bundle's experts, the request that asks the engine for the same, and calls of each expert."""

    request: Request
    reference: Reference
    calls: Sequence[Call]


def check_experts(bundle: Bundle, paths: Mapping[str, Path]) -> None:
    """Raises CheckpointError unless the models given are those of the bundle's experts."""
    if bundle.experts.keys() != paths.keys():
        name = min(bundle.experts.keys() ^ paths.keys())
        have = ", ".join(bundle.experts) or "none"
        raise CheckpointError(f"the bundle's experts are {have}; give just their models, --expert {name}=PATH")


def run_experts(
    bundle: Bundle,
    pipeline: Any,
    source: Source,
    paths: Mapping[str, Path],
    settings: Settings,
    progress: Callable[[str], None],
) -> ExpertReference | None:
    """paths: those of `check_experts`. Raises CheckpointError for experts with other weights than the bundle's."""
    if not paths:
        return None
    networks, texts = {}, {}
    for name, path in paths.items():
        card = bundle.experts[name]
        expert = read_expert(name, path, source, (card.unit, card.start, card.end))
        if bundle.source.get("experts", {}).get(name) != dict(expert.provenance):
            raise CheckpointError(f"expert {name!r} was exported from other weights than those of {path}")
        networks[name], texts[name] = load_expert(path, expert)
    progress(f"reference: experts {', '.join(paths)}")
    switch = default_switch(bundle.experts)
    assert switch is not None
    request = Request(
        prompt=settings.prompts[0], prompt_syntax="plain", steps=settings.steps, guidance=settings.guidance,
        seed=settings.seed, experts=switch,
    )  # fmt: skip
    shares = [(share.denoiser, share.low, share.high) for share in switch.shares]
    try:
        with quiet(), Recorder(**networks) as recorder:
            if switch.in_sigma:
                reference = _in_sigma(pipeline, networks, shares, bundle, settings)
            else:
                reference = _one_by_one(pipeline, networks, texts, shares, bundle, settings)
    except CheckpointError:
        raise
    except Exception as error:  # pipelines raise whatever their settings run into
        raise CheckpointError(f"diffusers' pipelines of the experts do not draw: {reason(error)}") from error
    calls = [
        call
        for name in networks
        for call in denoiser_calls(ComponentId("denoiser", name), f"expert {name}", recorder.heard[name])
    ]
    return ExpertReference(request, reference, calls)


def load_expert(path: Path, expert: Expert) -> tuple[Any, Any]:
    """diffusers' UNet of an expert and, of a refiner, its text encoder."""
    if path.is_file():  # a LoRA file: merged as the export merged it
        return expert.unet(FP32), None
    weights = list(expert.provenance["sha256"])
    found: list[Any] = []
    with staging() as place:
        for name, kind in (
            (UNET.name, diffusers.UNet2DConditionModel),
            (TEXT_ENCODERS[1].name, CLIPTextModelWithProjection),
        ):
            folder = path / name if (path / name).is_dir() else path
            own = [file for file in weights if file.startswith(f"{name}/") or "/" not in file]
            if name != UNET.name and expert.text is None:
                found.append(None)
                continue
            try:
                stage_component(folder, own, place / name)
                network = kind.from_pretrained(
                    str(place / name), torch_dtype=FP32, use_safetensors=True, local_files_only=True
                )
                check_complete(network, name)
            except Exception as error:  # diffusers and transformers raise whatever a strange file runs into
                raise CheckpointError(f"{path} is not loaded by diffusers: {reason(error)}") from error
            found.append(network)
    unet, text = found
    return unet, text


def _in_sigma(
    pipeline: Any,
    networks: Mapping[str, Any],
    shares: Sequence[tuple[str, float, float]],
    bundle: Bundle,
    settings: Settings,
) -> Reference:
    """The pipeline with the UNet of each step's sigma; both evaluations of a step run that of the first."""
    own, latents, order = pipeline.unet, [], pipeline.scheduler.order

    def choose(scheduler: Any, index: int) -> None:
        """UNet of an evaluation, which the loop reads anew each time."""
        first = min(index - (index % order), len(scheduler.timesteps) - 1)
        if hasattr(scheduler, "sigmas") and len(scheduler.sigmas) > first:
            sigma = float(scheduler.sigmas[first])
        else:
            bar = float(scheduler.alphas_cumprod[int(scheduler.timesteps[first])])
            sigma = ((1 - bar) / bar) ** 0.5
        name = next((name for name, low, high in shares if low < sigma <= high), UNET.name)
        pipeline.unet = networks.get(name, own)

    def note(_: Any, index: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents.append(values["latents"][0].float().numpy().copy())
        if index + 1 < len(pipeline.scheduler.timesteps):
            choose(pipeline.scheduler, index + 1)
        return {}

    pipeline.scheduler.set_timesteps(settings.steps)
    choose(pipeline.scheduler, 0)
    try:
        output = pipeline(
            settings.prompts[0], num_inference_steps=settings.steps, guidance_scale=settings.guidance,
            generator=torch.Generator().manual_seed(settings.seed), callback_on_step_end=note, output_type="np",
            width=bundle.card.width, height=bundle.card.height,
        )  # fmt: skip
    finally:
        pipeline.unet = own
    return Reference(latents, (output.images[0] * 255).round().astype(np.uint8))


def _one_by_one(
    pipeline: Any,
    networks: Mapping[str, Any],
    texts: Mapping[str, Any],
    shares: Sequence[tuple[str, float, float]],
    bundle: Bundle,
    settings: Settings,
) -> Reference:
    """diffusers' pipelines by denoising_end and denoising_start, of one scheduler and generator; SDXL only."""
    if bundle.card.family != "sdxl":
        raise CheckpointError("diffusers hands over by fractions of the timesteps for SDXL only; give windows in sigma")
    generator = torch.Generator().manual_seed(settings.seed)
    trajectory: list[Float32] = []
    options = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance, "generator": generator}
    latents, image = None, None

    def note(_: Any, index: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        trajectory.append(values["latents"][0].float().numpy().copy())
        return {}

    for name, low, high in shares:
        refines = texts.get(name) is not None
        now = (
            pipeline
            if not low and name == UNET.name
            else _second(pipeline, networks.get(name), texts.get(name), bundle, name)
        )
        cut: dict[str, Any] = {} if not low else {"denoising_start": low, "image": latents}
        cut |= {"denoising_end": high} if high < 1 else {}
        cut |= {"output_type": "np"} if high == 1 else {"output_type": "latent"}
        if not low:
            if refines or now is not pipeline:
                raise CheckpointError("the first denoiser of the bundle's experts is the base model's")
            cut |= {"width": bundle.card.width, "height": bundle.card.height}
        output = now(settings.prompts[0], callback_on_step_end=note, **options, **cut)
        latents = image = output.images
    assert image is not None
    return Reference(trajectory, (image[0] * 255).round().astype(np.uint8))


def _second(pipeline: Any, unet: Any, text: Any, bundle: Bundle, name: str) -> Any:
    """diffusers' image-to-image pipeline of a later denoiser."""
    kind = getattr(diffusers, REFINER)
    expert = bundle.experts.get(name)
    own = text is not None
    zeros = expert.zero_empty_negative if own and expert is not None else bundle.card.zero_empty_negative
    found = kind(
        vae=pipeline.vae, unet=unet or pipeline.unet, scheduler=type(pipeline.scheduler).from_config(pipeline.scheduler.config),
        text_encoder=None if own else pipeline.text_encoder, tokenizer=None if own else pipeline.tokenizer,
        text_encoder_2=text if own else pipeline.text_encoder_2, tokenizer_2=pipeline.tokenizer_2,
        requires_aesthetics_score=own, force_zeros_for_empty_prompt=zeros, add_watermarker=False,
    )  # fmt: skip
    found.set_progress_bar_config(disable=True)
    return found
