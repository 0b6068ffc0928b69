"""The authority for super-resolution stages: diffusers' own pipeline of each on a drawn picture, and its networks' calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from stepforge.export.graph.upscaler import NOISE_FEATURES
from stepforge.export.models.pixel.feedforward import FeedForward, read_feed_forward
from stepforge.export.models.source import Source
from stepforge.export.models.upscaler import read_upscaler
from stepforge.export.parity.loaders import FP32, check_complete, pretrained, quiet
from stepforge.export.parity.pixel import pixel_calls, pixel_recorder, run_pixel
from stepforge.export.parity.recorder import Call, Heard, Recorder, as_array, places
from stepforge.export.parity.reference import Reference, Settings, drawn_picture
from stepforge.export.parity.staging import reason
from stepforge.export.stages import told
from stepforge.runtime.arrays import Float32
from stepforge.runtime.bundle import TEXT_ENCODERS, UNET, VAE_DECODER, VAE_ENCODER, Bundle, ComponentId, StageCard
from stepforge.runtime.errors import CheckpointError
from stepforge.runtime.request import Request, Upscale

LARGEST = 64  # side in pixels of the picture that a stage is shown, rounded up to what its networks need


@dataclass(frozen=True, slots=True)
class StageReference:
    """One run of a stage's pipeline, and the request that asks the engine for the same."""

    request: Request
    reference: Reference
    calls: Sequence[Call]


def check_stages(bundle: Bundle, paths: Mapping[str, Path]) -> None:
    """Raises CheckpointError unless the models given are those of the bundle's stages."""
    if missing := bundle.stages.keys() - paths.keys():
        name = min(missing)
        raise CheckpointError(f"the bundle has the stage {name!r}; give its model too, --sr {name}=PATH")
    if unknown := paths.keys() - bundle.stages.keys():
        raise CheckpointError(f"the bundle has no stage {min(unknown)!r}; it has {', '.join(bundle.stages) or 'none'}")


def run_stages(
    bundle: Bundle,
    text: Mapping[str, Any],
    paths: Mapping[str, Path],
    settings: Settings,
    progress: Callable[[str], None],
) -> dict[str, StageReference]:
    """The first prompt through the pipeline of each stage, a picture through feed-forward networks.

    text: text encoder and tokenizer of IF's base model, for stages that read them. paths: those of `check_stages`.
    Raises CheckpointError for stages with other weights than the bundle's.
    """
    found = {}
    for name, path in paths.items():
        stage = read_upscaler(path) if path.is_dir() else read_feed_forward(path)
        exported = bundle.source.get("upscalers", {}).get(name, {})
        if exported.get("sha256") != told(stage)["sha256"]:
            raise CheckpointError(f"stage {name!r} was exported from other weights than those of {path}")
        progress(f"reference: stage {name}")
        if isinstance(stage, FeedForward):
            found[name] = run_network(name, stage, settings)
            continue
        pipeline = load_stage(path, stage.source)
        if stage.text_width and not stage.source.text_encoders:
            pipeline.register_modules(**text)
        found[name] = run_stage(name, bundle.stages[name], pipeline, settings)
    return found


def run_network(name: str, network: FeedForward, settings: Settings) -> StageReference:
    """spandrel's network on a drawn picture."""
    side = max(LARGEST, network.least) // network.size_multiple * network.size_multiple
    picture = drawn_picture(side, side)
    image = torch.from_numpy(np.asarray(picture, np.float32).transpose(2, 0, 1)[None].copy() / 255)
    with torch.no_grad():
        pixels = network.load(FP32).model(image)
    drawn = as_array(pixels.clamp(0, 1)[0] * 255).round().astype(np.uint8).transpose(1, 2, 0)
    key = ComponentId("upscaler", "upscaler", stage=name)
    call = Call(key, f"{name} network", {"image": as_array(image)}, {"pixels": as_array(pixels)})
    request = Request(prompt="", seed=settings.seed, upscale=Upscale(name=name, image=picture))
    return StageReference(request, Reference([], drawn), [call])


def load_stage(path: Path, source: Source) -> Any:
    """diffusers' pipeline of a folder that the exporter has examined. Raises CheckpointError."""
    with quiet():
        try:
            pipeline = pretrained(path, source)
            for name, network in pipeline.components.items():
                if isinstance(network, torch.nn.Module):
                    check_complete(network, name)
        except Exception as error:  # diffusers and transformers raise whatever a strange file runs into
            raise CheckpointError(f"{path} is not loaded by diffusers: {reason(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_stage(name: str, card: StageCard, pipeline: Any, settings: Settings) -> StageReference:
    """The pipeline on a drawn picture. Raises CheckpointError if it does not draw."""
    assert card.model is not None
    multiple = max(1, card.model.size_multiple // card.scale)
    side = -(-min(LARGEST, card.model.width // card.scale) // multiple) * multiple
    picture = drawn_picture(side, max(multiple, side * 3 // 4 // multiple * multiple))
    prompt = settings.prompts[0]
    if not card.model.text_encoders:
        settings = replace(settings, guidance=1.0)
    options: dict[str, Any] = {"noise_level": card.noise_level} if card.noising else {}
    request = Request(
        prompt=prompt,
        prompt_syntax="plain",
        seed=settings.seed,
        upscale=Upscale(name=name, image=picture, steps=settings.steps, guidance=settings.guidance, **options),
    )
    with pixel_recorder(pipeline) if card.kind == "pixel" else _recorder(pipeline) as recorder:
        try:
            with quiet():
                if card.kind == "pixel":
                    reference = run_pixel(pipeline, picture, prompt, settings, options, card.scale)
                else:
                    reference = _run_latent(pipeline, picture, prompt, settings, options)
        except Exception as error:  # a pipeline raises whatever its settings run into
            raise CheckpointError(f"diffusers' pipeline of stage {name!r} does not draw: {reason(error)}") from error
    calls = [
        replace(call, component=_stored(call.component, name, card), name=f"{name} {call.name}")
        for call in CALLS[card.kind](pipeline, recorder, reference.latents[-1])
    ]
    return StageReference(request, reference, calls)


def _stored(component: ComponentId, stage: str, card: StageCard) -> ComponentId:
    """Where the bundle has a network of the stage: text encoders may be the base model's."""
    assert card.model is not None
    for encoder in card.model.text_encoders:
        if component.role == "text_encoder" and encoder.name == component.name:
            return encoder.component
    return replace(component, stage=stage)


def _run_latent(
    pipeline: Any, picture: Image.Image, prompt: str, settings: Settings, options: dict[str, Any]
) -> Reference:
    """The x4 and the x2 upscaler."""
    latents: list[Float32] = []
    output = pipeline(
        prompt,
        image=picture,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        generator=torch.Generator().manual_seed(settings.seed),
        callback=lambda step, t, x: latents.append(x[0].float().numpy().copy()),
        output_type="np",
        **options,
    )
    return Reference(latents, (output.images[0] * 255).round().astype(np.uint8))


def _recorder(pipeline: Any) -> Recorder:
    vae = pipeline.vae
    modules = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder, "decoder": vae.decoder}
    return Recorder(**modules, encoder=vae.encoder, moments=vae.quant_conv)


def _latent_calls(pipeline: Any, recorder: Recorder, latents: Float32) -> Iterator[Call]:
    """Text encoder on both prompts, denoiser at start, middle and end, and the VAE."""
    heard = recorder.heard
    denoiser = [_denoiser_inputs(call) for call in heard["unet"]]
    ids = [as_array(args[0]) for args, _, _ in heard["text_encoder"]][1::-1]  # the prompt came first
    text = {"hidden_states": denoiser[0]["encoder_hidden_states"]}
    if "text_embeds" in denoiser[0]:
        text["pooled"] = denoiser[0]["text_embeds"]
    yield Call(TEXT_ENCODERS[0], "text_encoder", {"input_ids": np.concatenate(ids)}, text)
    for index in places(len(denoiser)):
        inputs, output = denoiser[index], heard["unet"][index][2]
        made = -as_array(output["sample"])[:, :-1] if "text_embeds" in inputs else as_array(output[0])
        yield Call(UNET, f"denoiser t={inputs['timestep'][0]:g}", inputs, {"prediction": made})
    if heard["encoder"]:
        (pixels,), _, _ = heard["encoder"][0]
        yield Call(
            VAE_ENCODER, "vae_encoder", {"pixels": as_array(pixels)}, {"moments": as_array(heard["moments"][0][2])}
        )
    pixels = heard["decoder"][-1][2]
    yield Call(VAE_DECODER, "vae_decoder", {"latents": latents[None]}, {"pixels": as_array(pixels)})


def _denoiser_inputs(call: Heard) -> dict[str, NDArray[Any]]:
    (sample, t), kwargs, _ = call
    inputs: dict[str, NDArray[Any]] = {
        "sample": as_array(sample),
        "timestep": np.full(len(sample), float(t), np.float32),
        "encoder_hidden_states": as_array(kwargs["encoder_hidden_states"]),
    }
    if "class_labels" in kwargs:
        inputs["class_labels"] = as_array(kwargs["class_labels"])
    if "timestep_cond" in kwargs:
        inputs["text_embeds"] = as_array(kwargs["timestep_cond"])[:, 2 * NOISE_FEATURES :]
    return inputs


Calls = Callable[[Any, Recorder, Float32], Iterator[Call]]
CALLS: dict[str, Calls] = {"x4": _latent_calls, "x2": _latent_calls, "pixel": pixel_calls}
