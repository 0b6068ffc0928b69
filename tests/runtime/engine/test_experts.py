"""Several denoisers in one bundle against diffusers: base and refiner, experts of one architecture."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

import stepforge
from stepforge import AdapterError, Request, RequestError
from stepforge.export.build import BankOptions, export_bundle
from stepforge.export.cli import parse_experts
from stepforge.export.graph.rewire import Variants
from stepforge.export.parity.verify import verify
from stepforge.runtime.bundle import UNET, read

PROMPT, NEGATIVE = "a cat", "a dog"
SIGMA = 3.0
WINDOWS = {"high": f"sigma={SIGMA}..inf", "low": "sigma=0..0.6"}
# fp32 of two engines over ten steps; a wrong cut, text or time_ids is below 45 dB
PSNR = 60.0


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    error = float(((ours.astype(np.float64) - theirs) ** 2).mean())
    return 10 * np.log10(float(np.ptp(theirs)) ** 2 / error) if error else 200.0


@pytest.fixture(scope="module")
def refined(tiny_sdxl: Path, tiny_refiner: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("refined") / "bundle"
    told: list[tuple[int, int]] = []
    experts = parse_experts([f"refiner={tiny_refiner}"])
    export_bundle(tiny_sdxl, out, experts=experts, progress=lambda _, done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1]
    return out


@pytest.fixture(scope="module")
def pipelines(tiny_sdxl: Path, tiny_refiner: Path):
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

    base = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    refiner = StableDiffusionXLImg2ImgPipeline(
        vae=base.vae, text_encoder=None, text_encoder_2=base.text_encoder_2, tokenizer=None,
        tokenizer_2=base.tokenizer_2, scheduler=base.scheduler, requires_aesthetics_score=True,
        unet=UNet2DConditionModel.from_pretrained(tiny_refiner / "unet"), force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )  # fmt: skip
    for pipeline in (base, refiner):
        pipeline.set_progress_bar_config(disable=True)
    return base, refiner


def ensemble(pipelines, scheduler, *, steps=10, at=0.8, micro=None, weights=(5.0, 3.0), negative=NEGATIVE, seed=0):
    """Latents of diffusers' base and refiner."""
    base, refiner = pipelines
    generator, latents = torch.Generator().manual_seed(seed), None
    with torch.no_grad():
        for pipeline, w in zip((base, refiner), weights, strict=True):
            pipeline.scheduler = scheduler.from_config(scheduler.config)
            cut = {"denoising_end": at} if pipeline is base else {"denoising_start": at, "image": latents}
            size = {"width": 32, "height": 32} if pipeline is base else {}
            scores = {} if pipeline is base else {k: v for k, v in (micro or {}).items() if "score" in k}
            own = {k: v for k, v in (micro or {}).items() if "score" not in k}
            latents = pipeline(
                PROMPT, negative_prompt=negative, num_inference_steps=steps, guidance_scale=w, generator=generator,
                output_type="latent", return_dict=False, **cut, **size, **own, **scores,
            )[0]  # fmt: skip
    return latents[0].numpy()


def last(engine: stepforge.Engine, request: Request) -> np.ndarray:
    """The last latents of a request."""
    return engine.generate(request).latents[0]


@pytest.fixture(scope="module")
def opened(refined: Path):
    with ExitStack() as stack:
        yield cache(lambda name: stack.enter_context(stepforge.load(refined, backend=name, precision="fp32")))


def changed_unet(model: Path, out: Path) -> Path:
    """The model's UNet with other weights in one layer."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    with torch.no_grad():
        unet.mid_block.resnets[0].conv1.weight *= 1.5
    unet.save_pretrained(out)
    return out


def lora_file(model: Path, out: Path) -> Path:
    """A LoRA of some linears and convolutions, as diffusers writes it."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    torch.manual_seed(5)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "conv1"], init_lora_weights=False))
    with torch.no_grad():
        for name, value in unet.named_parameters():
            if "lora_" in name:
                value.normal_().mul_(0.1)
    unet.save_lora_adapter(out)
    return out / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def noisy(tiny_sd1: Path, tiny_sd1_controls: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an expert of high noise, LoRA banks and a ControlNet; the expert lies beside it."""
    folder = tmp_path_factory.mktemp("noisy")
    high = changed_unet(tiny_sd1, folder / "high")
    export_bundle(
        tiny_sd1, folder / "bundle", experts=parse_experts([f"high={high}@sigma={SIGMA}..inf"]),
        controls={"a": tiny_sd1_controls["a"]}, bank=BankOptions(2, 4),
    )  # fmt: skip
    return folder / "bundle"


@pytest.fixture(scope="module")
def ensemble_of_two(
    tiny_sd1: Path, tiny_sd1_controls: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle with an expert of high noise, a UNet, and one of low noise, a LoRA file, which lie beside it; with LoRA banks, a
    ControlNet and a reuse variant."""
    folder = tmp_path_factory.mktemp("ensemble")
    files = {"high": changed_unet(tiny_sd1, folder / "high"), "low": lora_file(tiny_sd1, folder / "low")}
    export_bundle(
        tiny_sd1, folder / "bundle", experts=parse_experts([f"{n}={files[n]}@{WINDOWS[n]}" for n in files]),
        controls={"a": tiny_sd1_controls["a"]}, bank=BankOptions(2, 4), reuse=Variants(deepcache=0),
    )  # fmt: skip
    return folder / "bundle"


@pytest.mark.slow
@pytest.mark.long  # an export of its own; base and refiner stay, and adapters of one denoiser
def test_expert_of_one_architecture(
    tiny_sd1: Path, tiny_sd1_controls: dict[str, Path], noisy: Path, backends: tuple[str, ...]
):
    """One trajectory whose network changes, as diffusers with its UNet replaced; on disk the changed layer alone is added."""
    bundle = read(noisy)
    own = bundle.files["denoiser/unet/high.data"][0]
    assert 0 < own < 0.2 * bundle.files["denoiser/unet/model.onnx.data"][0]
    verdict = verify(
        noisy, tiny_sd1, experts={"high": noisy.with_name("high")}, backends=backends,
        precisions=["fp32"], prompts=[PROMPT], steps=8, store=False, controls={"a": tiny_sd1_controls["a"]},
    )  # fmt: skip
    checks = [check for check in verdict["checks"] if check["name"].startswith("expert")]
    assert {check["level"] for check in checks} == {"component", "step", "trajectory", "image"}
    assert all(check["passed"] for check in verdict["checks"]), verdict["checks"]


def as_planned(pipeline, plan, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A pipeline of diffusers whose UNet runs as the plan says: its network and whether by DeepCache, a hook of ours."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    low = UNet2DConditionModel.from_pretrained(pipeline.unet.config._name_or_path)
    low.load_lora_adapter(folder / "low", weight_name="pytorch_lora_weights.safetensors", prefix=None)
    networks = {"high": UNet2DConditionModel.from_pretrained(folder / "high"), "low": low}
    forwards = {name: network.forward for name, network in networks.items()} | {"unet": pipeline.unet.forward}
    steps, now = iter(plan.steps), {}

    def cache(module, args):
        deep = args[0].shape[1] - pipeline.unet.conv_in.out_channels
        if now["step"].reuse:
            return (torch.cat([now["deep"], args[0][:, deep:]], dim=1), *args[1:])
        now["deep"] = args[0][:, :deep]
        return None

    def forward(*args, **options):
        now["step"] = next(steps)
        return forwards[now["step"].denoiser](*args, **options)

    for network in (*networks.values(), pipeline.unet):
        network.up_blocks[-1].resnets[-1].register_forward_pre_hook(cache)
    monkeypatch.setattr(pipeline.unet, "forward", forward)
    return pipeline


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", ["ControlNet", "Img2Img", "Inpaint"])
def test_experts_with_control_reuse_and_init(
    kind: str,
    ensemble_of_two: Path,
    tiny_sd1: Path,
    tiny_sd1_controls: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
):
    """Every expert with a ControlNet and DeepCache, which takes nothing of another's; an image that passes all of them."""
    import diffusers

    picture = Image.fromarray(np.random.default_rng(2).integers(0, 255, (8, 8, 3), np.uint8)).resize((32, 32))
    mask = Image.fromarray(np.uint8([[0, 255]]).repeat(32, 0).repeat(16, 1))
    ours, theirs, loaded = {
        "ControlNet": (
            {"controls": [{"name": "a", "image": picture, "scale": 0.8}], "reuse": "deepcache(2)"},
            {"image": picture, "controlnet_conditioning_scale": 0.8},
            {"controlnet": diffusers.ControlNetModel.from_pretrained(tiny_sd1_controls["a"])},
        ),
        "Img2Img": ({"init": {"image": picture, "strength": 0.8}}, {"image": picture, "strength": 0.8}, {}),
        "Inpaint": (
            {"init": {"image": picture, "mask": mask, "strength": 0.9}},
            {"image": picture, "mask_image": mask, "strength": 0.9, "width": 32, "height": 32},
            {},
        ),
    }[kind]
    request = Request(
        prompt=PROMPT, negative=NEGATIVE, steps=10, sampler="ddim", guidance=4.0, prompt_syntax="plain", **ours
    )
    with stepforge.load(ensemble_of_two, backend="onnxruntime", precision="fp32") as engine:
        result = engine.generate(request)
    assert {step.denoiser for step in result.plan.steps} == {"high", "unet", "low"}
    if kind == "ControlNet":
        runs = [(step.denoiser, step.reuse) for step in result.plan.steps]
        assert all(not reuse for (name, reuse), (before, _) in zip(runs[1:], runs, strict=False) if name != before)
        assert {name for name, reuse in runs if reuse} == {"high", "unet", "low"}
    pipeline = getattr(diffusers, f"StableDiffusion{kind}Pipeline").from_pretrained(tiny_sd1, **loaded)
    as_planned(pipeline, result.plan, ensemble_of_two.parent, monkeypatch)
    expected = pipeline(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=10, guidance_scale=4.0, output_type="latent",
        generator=torch.Generator().manual_seed(0), **theirs,
    ).images[0]  # fmt: skip
    assert psnr(result.latents[0], expected.numpy()) >= PSNR


@pytest.mark.slow
@pytest.mark.long  # an export of its own; base and refiner stay, and adapters of one denoiser
def test_adapters_of_experts(noisy: Path, tmp_path: Path):
    """A file changes every denoiser that it fits, or the named one alone; images follow."""
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    width = next(m.shape[0] for m in read(noisy).components[UNET].modules if m.path == path)
    drawn = np.random.default_rng(0).normal(size=(2, 4, width)).astype(np.float32)
    keys = f"unet.{path}.lora_A.weight", f"unet.{path}.lora_B.weight"
    save_file({keys[0]: drawn[0], keys[1]: np.ascontiguousarray(drawn[1].T)}, tmp_path / "a.safetensors")
    with stepforge.load(noisy, backend="onnxruntime", precision="fp32") as engine:
        both = engine.adapters.load("both", tmp_path / "a.safetensors")
        high = engine.adapters.load("high", tmp_path / "a.safetensors", denoisers=["high"])
        assert [key.name for key in both.components] == ["high", "unet"]
        assert [key.name for key in high.components] == ["high"]
        with pytest.raises(AdapterError, match=r"no denoiser 'low'; it has unet, high"):
            engine.adapters.load("low", tmp_path / "a.safetensors", denoisers=["low"])
        alone = {"prompt": PROMPT, "steps": 2, "experts": "base"}
        plain, one, two = engine.generate(
            [Request(**alone), Request(**alone, adapters={"high": 1.0}), Request(**alone, adapters={"both": 1.0})]
        )
        assert np.abs(plain.latents - one.latents).max() < 1e-5
        assert np.abs(plain.latents - two.latents).max() > 1e-3


MICRO = {
    "original_size": (48, 96), "crops_coords_top_left": (3, 5), "target_size": (80, 40),
    "negative_original_size": (20, 30), "negative_crops_coords_top_left": (1, 2), "negative_target_size": (50, 70),
}  # fmt: skip
SCORES = {"aesthetic_score": 7.0, "negative_aesthetic_score": 1.5}


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", ["onnxruntime", *(pytest.param(name, marks=pytest.mark.long) for name in ("openvino", "torch"))]
)
def test_base_and_refiner_are_diffusers_two_pipelines(backend: str, opened, pipelines):
    """Hand-over, the refiner's own text, scores, guidance of each, and micro-conditioning."""
    from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler

    engine, config = opened(backend), pipelines[0].scheduler.config
    cases = [("euler", EulerDiscreteScheduler, None), ("dpmpp_2m", DPMSolverMultistepScheduler, MICRO | SCORES)]
    cases += [("heun", HeunDiscreteScheduler, SCORES)] if backend == "onnxruntime" else []
    for sampler, kind, micro in cases:
        theirs = ensemble(pipelines, kind.from_config(config), micro=micro)
        ours = {k.replace("crops_coords_top_left", "crop"): v for k, v in (micro or {}).items()}
        request = Request(
            prompt=PROMPT, negative=NEGATIVE, steps=10, sampler=sampler, spacing="leading", prompt_syntax="plain",
            guidance="unet=5; refiner=3", micro=ours, experts=None if sampler == "euler" else "base@0..0.8,refiner@0.8..1",
        )  # fmt: skip
        assert psnr(last(engine, request), theirs) >= PSNR, sampler
        assert {step.denoiser for step in engine.plan(request).steps} == {"unet", "refiner"}


@pytest.mark.slow
@pytest.mark.long
def test_an_init_image_goes_through_both(opened, pipelines):
    """Base from the image's step on, then the refiner, as diffusers by strength and denoising_end, then denoising_start."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline

    base, refiner = pipelines
    parts = {key: value for key, value in base.components.items() if key not in ("image_encoder", "feature_extractor")}
    first = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    first.set_progress_bar_config(disable=True)
    image = Image.fromarray(np.random.default_rng(2).integers(0, 255, (8, 8, 3), np.uint8)).resize((32, 32))
    generator, given = torch.Generator().manual_seed(0), image
    for pipeline, cut in ((first, {"strength": 0.6, "denoising_end": 0.8}), (refiner, {"denoising_start": 0.8})):
        pipeline.scheduler = EulerDiscreteScheduler.from_config(base.scheduler.config)
        given = pipeline(
            PROMPT, negative_prompt=NEGATIVE, image=given, num_inference_steps=10, guidance_scale=3.0,
            generator=generator, output_type="latent", **cut,
        ).images  # fmt: skip
    options = {"sampler": "euler", "spacing": "leading", "prompt_syntax": "plain", "experts": "refiner@0.8..1"}
    request = Request(
        prompt=PROMPT, negative=NEGATIVE, steps=10, guidance=3.0, init={"image": image, "strength": 0.6}, **options
    )
    engine = opened("onnxruntime")
    assert [step.denoiser for step in engine.plan(request).steps] == ["unet"] * 4 + ["refiner"] * 2
    assert psnr(last(engine, request), given[0].numpy()) >= PSNR
    for changed, message in (
        ({"init": {"image": image, "strength": 0.2}}, "strength leaves unet no step; raise it, or the steps"),
        (
            {"init": {"image": image, "mask": image, "strength": 0.6}},
            "inpainting does not go with experts in fractions",
        ),
    ):
        with pytest.raises(RequestError, match=message):
            engine.plan(replace(request, **changed))


@pytest.mark.slow
def test_text_encoder_is_stored_once_and_missing_experts_are_refused(
    refined: Path, opened, tiny_sdxl: Path, tiny_refiner: Path
):
    bundle, engine = read(refined), opened("onnxruntime")
    assert bundle.experts["refiner"].text_encoders == bundle.card.text_encoders[1:]
    verdict = verify(
        refined, tiny_sdxl, experts={"refiner": tiny_refiner}, backends=["onnxruntime"], precisions=["fp32"],
        prompts=[PROMPT], steps=8, store=False,
    )  # fmt: skip
    assert [check["level"] for check in verdict["checks"] if check["name"].startswith("experts")] == [
        "step",
        "trajectory",
        "image",
    ]
    assert verdict["passed"], verdict["checks"]
    assert not [key for key in bundle.components if key.role == "text_encoder" and "refiner" in key.name]
    with pytest.raises(RequestError, match=r"no expert 'high'; it has base, refiner"):
        engine.plan(Request(prompt="", experts="high@sigma=1..inf"))
    with pytest.raises(RequestError, match="no weight for refiner"):
        engine.plan(Request(prompt="", guidance="unet=5"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_neighbours_with_other_experts_change_nothing(opened, backend):
    """Rows of two denoisers never share a call; each request is what it is alone. With torch in one loop."""
    engine = opened(backend)
    requests = [
        Request(prompt=PROMPT, steps=5, seed=i, experts=experts, guidance=2.0)
        for i, experts in enumerate((None, "base", "refiner@0.4..1", "refiner@sigma=0..2"))
    ]
    together = engine.generate(requests)
    for request, result in zip(requests, together, strict=True):
        alone = engine.generate(request)
        assert np.abs(alone.latents[0] - result.latents[0]).max() < 1e-4
        assert {"unet", "refiner"} & set(alone.stats.rows) == {step.denoiser for step in engine.plan(request).steps}
    assert len(engine._worker.denoisers._pools) == (backend == "torch")


def test_plans_for_tensorrt_know_the_shapes_of_every_network(refined):
    """Profiles of the experts as of the base model: all their dynamic inputs, rows and sides as declared."""
    from stepforge.runtime.backends.tensorrt.profiles import Use, profiles

    bundle = read(refined)
    use = Use.parse(bundle, ("1..4",), "64..128")
    found = {key: profiles(bundle, key, use)[-1] for key in bundle.components}
    for key, profile in found.items():
        dynamic = {t.name for t in bundle.components[key].inputs if any(isinstance(s, str) for s in t.shape)}
        assert profile.keys() == dynamic, key
    experts = [key for key in found if key.role == "denoiser" and key != UNET]
    assert experts
    assert all(found[key]["sample"] == found[UNET]["sample"] for key in experts)
