"""The authority for networks on pixels: diffusers' IFPipeline and IFSuperResolutionPipeline, the latter also without text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from stepforge.export.parity.loaders import Loaded, quiet
from stepforge.export.parity.recorder import Call, Recorder, as_array, places
from stepforge.export.parity.reference import Reference, References, Settings, drawn_hint, threads
from stepforge.export.parity.staging import reason
from stepforge.runtime.arrays import Float32
from stepforge.runtime.bundle import TEXT_ENCODERS, UNET, Bundle, Size
from stepforge.runtime.errors import CheckpointError

LEARNED = ("learned", "learned_range")


def run_base(loaded: Loaded, bundle: Bundle, settings: Settings, progress: Callable[[str], None]) -> References:
    """Every prompt through IF's stage I. Raises CheckpointError if diffusers cannot draw them."""
    pipeline = loaded.pipeline
    first, side = settings.prompts[0], pipeline.unet.config.sample_size
    plain = {}
    for prompt in settings.prompts:
        progress(f"reference: {prompt!r}")
        with pixel_recorder(pipeline) as recorder:
            plain[prompt] = _run_base(pipeline, prompt, settings)
        if prompt == first:
            calls = list(pixel_calls(pipeline, recorder, plain[first].latents[-1]))
    progress("reference: spread")
    with threads(1):
        again = _run_base(pipeline, first, settings)
    return References(
        plain, again, {}, (), None, drawn_hint(bundle), calls, Size(side, side), loaded.loader, loaded.assumed
    )


def _run_base(pipeline: Any, prompt: str, settings: Settings) -> Reference:
    latents: list[Float32] = []
    try:
        with quiet():
            image = pipeline(
                prompt,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                generator=torch.Generator().manual_seed(settings.seed),
                callback=lambda step, t, x: latents.append(x[0].float().numpy().copy()),
                clean_caption=False,  # diffusers' default needs two more packages, and the engine does not do it
                output_type="pt",
            ).images
    except Exception as error:  # a pipeline raises whatever its settings run into
        raise CheckpointError(f"diffusers' pipeline of the model does not draw: {reason(error)}") from error
    return Reference(latents, _drawn(image[0]))


def _drawn(image: torch.Tensor) -> NDArray[np.uint8]:
    """A raw image in [-1, 1], [3, H, W], in 8 bits, [H, W, 3]."""
    unit: NDArray[np.float32] = (image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    return (unit * 255).round().astype(np.uint8)


def run_pixel(
    pipeline: Any, picture: Image.Image, prompt: str, settings: Settings, options: dict[str, Any], scale: int
) -> Reference:
    """The pipeline drops a variance that its scheduler does not want from the output of any UNet, and asks every scheduler for
    its variance_type: networks without a variance are given one, and such schedulers a name."""
    latents: list[Float32] = []
    if getattr(pipeline.scheduler.config, "variance_type", None) is None:
        pipeline.scheduler.register_to_config(variance_type="fixed_small")
    unet = pipeline.unet
    if (
        unet.config.out_channels * 2 == unet.config.in_channels
        and pipeline.scheduler.config.variance_type not in LEARNED
    ):
        inner = unet.forward

        def with_variance(*args: Any, **given: Any) -> tuple[torch.Tensor]:
            (out,) = inner(*args, **given)
            return (torch.cat([out, torch.zeros_like(out)], 1),)

        unet.forward = with_variance
    text: dict[str, Any] = {"prompt": prompt, "clean_caption": False}
    if pipeline.text_encoder is None:
        text = {"prompt_embeds": torch.zeros(1, 1, 1)}
    image = pipeline(
        **text,
        **options,
        image=picture,
        height=picture.height * scale,
        width=picture.width * scale,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        generator=torch.Generator().manual_seed(settings.seed),
        callback=lambda step, t, x: latents.append(x[0].float().numpy().copy()),
        output_type="pt",
    ).images
    return Reference(latents, _drawn(image[0]))


def text_modules(pipeline: Any) -> dict[str, Any]:
    return {name: pipeline.components[name] for name in ("text_encoder", "tokenizer")}


def pixel_recorder(pipeline: Any) -> Recorder:
    modules = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    return Recorder(**{name: module for name, module in modules.items() if module is not None})


def pixel_calls(pipeline: Any, recorder: Recorder, latents: Float32) -> Iterator[Call]:
    """T5 on both prompts, if there is one; the denoiser at start, middle and end."""
    for args, kwargs, output in recorder.heard["text_encoder"][:2]:
        inputs = {"input_ids": as_array(args[0]), "attention_mask": as_array(kwargs["attention_mask"])}
        yield Call(TEXT_ENCODERS[0], "text_encoder", inputs, {"hidden_states": as_array(output["last_hidden_state"])})
    heard = recorder.heard["unet"]
    for index in places(len(heard)):
        (sample, t), kwargs, output = heard[index]
        inputs = {
            "sample": as_array(sample),
            "timestep": np.full(len(sample), float(t), np.float32),
        }
        if kwargs.get("class_labels") is not None:
            inputs["class_labels"] = as_array(kwargs["class_labels"]).astype(np.float32)
        if pipeline.text_encoder is not None:
            inputs["encoder_hidden_states"] = as_array(kwargs["encoder_hidden_states"])
        made = as_array(output[0])[:, : pipeline.unet.config.out_channels]
        yield Call(UNET, f"denoiser t={float(t):g}", inputs, {"prediction": made})
