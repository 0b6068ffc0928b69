"""DeepFloyd IF against diffusers' IFPipeline and IFSuperResolutionPipeline: a whole cascade, and its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stepforge
from stepforge.export.parity.measures import psnr

PROMPT, NEGATIVE = "  A Cat (do.g!) ", "fog"
ASK = {"prompt": PROMPT, "negative": NEGATIVE, "steps": 4, "guidance": 3.0, "seed": 5}


def parts(folder: Path) -> dict[str, Any]:
    """Networks and schedulers of a tiny folder, by diffusers' and transformers' own loaders."""
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
    from transformers import T5EncoderModel, T5Tokenizer

    found: dict[str, Any] = {"unet": UNet2DConditionModel.from_pretrained(folder / "unet").eval()}
    kind = DDIMScheduler if "DDIM" in (folder / "scheduler/scheduler_config.json").read_text() else DDPMScheduler
    found["scheduler"] = kind.from_pretrained(folder / "scheduler")
    if (folder / "text_encoder").is_dir():
        found["text_encoder"] = T5EncoderModel.from_pretrained(folder / "text_encoder").eval()
        found["tokenizer"] = T5Tokenizer.from_pretrained(folder / "tokenizer")
    if (folder / "image_noising_scheduler").is_dir():
        found["image_noising_scheduler"] = DDPMScheduler.from_pretrained(folder / "image_noising_scheduler")
    return found


@pytest.fixture(scope="module")
def reference(tiny_if: Path, tiny_if_sr: dict[str, Path]):
    """Raw images of each stage for one seed, whose generator goes on from stage to stage: I, II with guidance, plain."""
    from diffusers import IFPipeline, IFSuperResolutionPipeline

    none = {"safety_checker": None, "feature_extractor": None, "watermarker": None, "requires_safety_checker": False}
    base = parts(tiny_if)
    first = IFPipeline(**base, **none)
    text = {name: base[name] for name in ("text_encoder", "tokenizer")}
    second = IFSuperResolutionPipeline(**parts(tiny_if_sr["ii"]), **text, **none)
    third = IFSuperResolutionPipeline(**parts(tiny_if_sr["plain"]), text_encoder=None, tokenizer=None, **none)
    inner = third.unet.forward

    def with_variance(*args: Any, **options: Any) -> tuple[torch.Tensor]:
        """The pipeline drops a variance from outputs of any UNet: give it one."""
        (out,) = inner(*args, **options)
        return (torch.cat([out, torch.zeros_like(out)], 1),)

    third.unet.forward = with_variance
    third.scheduler.register_to_config(variance_type="fixed_small")  # the pipeline asks every scheduler for it
    for pipe in (first, second, third):
        pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(ASK["seed"])
    common = {"generator": generator, "output_type": "pt"}
    spoken = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "clean_caption": False}
    images = [first(**spoken, **common, num_inference_steps=4, guidance_scale=3.0).images]
    more = {"num_inference_steps": 3, "guidance_scale": 2.0, "noise_level": 100, "height": 32, "width": 32}
    images.append(second(**spoken, **common, **more, image=images[-1]).images)
    more = {"num_inference_steps": 4, "guidance_scale": 1.0, "noise_level": 20, "height": 64, "width": 64}
    nothing = torch.zeros(1, 77, 32)
    images.append(third(prompt_embeds=nothing, **common, **more, image=images[-1]).images)
    return [image[0].numpy() for image in images]


def close_to(ours: np.ndarray, wanted: np.ndarray) -> float:
    """PSNR of raw images in [-1, 1], in dB."""
    return psnr(*(np.clip(image * 127.5 + 127.5, 0, 255) for image in (ours, wanted)))


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime", "torch"])
def test_stage_one(tiny_if_bundle: Path, reference: list[np.ndarray], backend: str):
    with stepforge.load(tiny_if_bundle, backend=backend, precision="fp32") as engine:
        result = engine.generate(stepforge.Request(**ASK))
        assert close_to(result.latents[0], reference[0]) >= 60
        assert result.images[0].size == (16, 16)
        assert result.stats.rows == {"text_encoder": 2, "unet": 8}
        assert engine.generate(stepforge.Request(**ASK, images=2)).stats.rows == {"unet": 16}  # prompts are kept
