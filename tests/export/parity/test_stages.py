"""Super-resolution stages against diffusers' own pipelines, alone and behind the base model: latents, images, draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stepforge import Request, Upscale, load
from stepforge.export.models.upscaler import read_upscaler
from stepforge.export.parity.loaders import quiet
from stepforge.export.parity.measures import psnr, relative_error
from stepforge.export.parity.stages import load_stage
from stepforge.export.parity.verify import LIMITS, verify

pytestmark = pytest.mark.slow  # the quick lane has three minutes

ENGINES = ("onnxruntime", *(pytest.param(name, marks=pytest.mark.long) for name in ("openvino", "torch")))
PICTURE = np.random.default_rng(4).integers(0, 255, (16, 24, 3), dtype=np.uint8)
BASE: dict[str, Any] = {"steps": 3, "guidance": 4.0, "sampler": "euler_a", "width": 32, "height": 48}
PROMPT, NEGATIVE = "a cat", "a dog"


@pytest.fixture(scope="module")
def pipelines(tiny_sd1: Path, tiny_x4: Path, tiny_x2: Path) -> dict[str, Any]:
    """diffusers' pipelines by stage; "" is the base model, with the sampler of BASE."""
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionPipeline

    with quiet():
        base = StableDiffusionPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    base.scheduler = EulerAncestralDiscreteScheduler.from_config(base.scheduler.config)
    base.set_progress_bar_config(disable=True)
    found = {"": base}
    for name, folder in (("x4", tiny_x4), ("x2", tiny_x2)):
        found[name] = load_stage(folder, read_upscaler(folder).source)
    return found


def reference(pipeline: Any, generator: torch.Generator, image: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Latents and 8-bit image of a stage's pipeline."""
    latents: list[torch.Tensor] = []
    with quiet():
        made = pipeline(
            PROMPT, image=image, negative_prompt=NEGATIVE, generator=generator, output_type="np",
            callback=lambda step, t, x: latents.append(x.clone()), **options,
        )  # fmt: skip
    return latents[-1][0].numpy(), (made.images[0] * 255).round().astype(np.uint8)


def test_verify_covers_every_stage(tiny_stages_bundle, tiny_sd1, tiny_x4, tiny_x2, backends):
    verdict = verify(
        tiny_stages_bundle, tiny_sd1, upscalers={"x4": tiny_x4, "x2": tiny_x2}, backends=backends, precisions=["fp32"],
        prompts=[PROMPT], steps=3, store=False,
    )  # fmt: skip
    assert verdict["passed"], [check for check in verdict["checks"] if not check["passed"]]
    names = {(check["level"], check["name"].partition(" t=")[0]) for check in verdict["checks"]}
    for name in ("x4", "x2"):
        assert {("image", f"stage {name}"), ("trajectory", f"stage {name}")} <= names
        assert {("component", f"{name} {part}") for part in ("text_encoder", "denoiser", "vae_decoder")} <= names
    assert ("component", "x2 vae_encoder") in names


@pytest.mark.parametrize("engine", ENGINES)
def test_stages_draw_what_diffusers_draws(engine, tiny_stages_bundle, pipelines):
    """One generator goes through all pipelines of a chain; the base's sampler draws noise that its last step does not use."""

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(7)

    alone = {
        "x4": {"num_inference_steps": 3, "guidance_scale": 5.0, "noise_level": 120},
        "x2": {"num_inference_steps": 3, "guidance_scale": 3.0},
    }
    expected, asked = {}, {}
    for name, options in alone.items():
        expected[name] = reference(pipelines[name], seeded(), Image.fromarray(PICTURE), **options)
        stated = {"steps": 3, "guidance": options["guidance_scale"], "image": PICTURE}
        stated |= {"noise_level": 120} if name == "x4" else {}
        asked[name] = Upscale(name=name, **stated), {}
    generator = seeded()
    with quiet():
        low = pipelines[""](
            PROMPT, negative_prompt=NEGATIVE, num_inference_steps=3, guidance_scale=4.0, width=32, height=48,
            generator=generator, output_type="pt",
        ).images  # fmt: skip
    expected["base, x4"] = reference(
        pipelines["x4"], generator, low, num_inference_steps=2, guidance_scale=1.0, noise_level=20
    )
    asked["base, x4"] = Upscale(name="x4", steps=2, guidance=1.0), BASE
    generator = seeded()
    with quiet():
        latents = pipelines[""](
            PROMPT, negative_prompt=NEGATIVE, num_inference_steps=3, guidance_scale=4.0, width=32, height=48,
            generator=generator, output_type="latent",
        ).images  # fmt: skip
    # guidance 0 of this pipeline is an empty prompt on one row
    expected["base, x2"] = reference(pipelines["x2"], generator, latents, num_inference_steps=2, guidance_scale=0.0)
    asked["base, x2"] = Upscale(name="x2", steps=2, guidance=0.0, negative=""), BASE
    with load(tiny_stages_bundle, backend=engine, precision="fp32") as opened:
        results = opened.generate(
            [
                Request(prompt=PROMPT, negative=NEGATIVE, prompt_syntax="plain", seed=7, upscale=upscale, **base)
                for upscale, base in asked.values()
            ]
        )
    for (name, (latent, image)), result in zip(expected.items(), results, strict=True):
        error = relative_error(result.latents[0], latent)
        assert error <= LIMITS["fp32"].trajectory, f"{name}: {error:.1e}"
        assert psnr(np.asarray(result.images[0]), image) >= 60.0, name
