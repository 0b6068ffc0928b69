"""Images to start from: img2img and inpainting equal diffusers' pipelines, draw for draw; bad images are refused."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageDraw

import stepforge
from stepforge import Init, Request, RequestError
from stepforge.runtime.backends import open_backend
from stepforge.runtime.bundle import read
from stepforge.runtime.engine import Engine
from stepforge.runtime.imaging.png import read_metadata

pytestmark = pytest.mark.slow  # the quick lane has three minutes

LIMIT = 60  # dB in fp32: the same arithmetic in another order of summation
SCHEDULERS = {
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
}
# those whose cut differs: the others' plans alone are compared in the whole suite (plan/test_truncate.py)
SAMPLERS = [
    pytest.param(name, marks=[] if name in ("pndm", "ddim", "euler_a", "heun") else pytest.mark.long)
    for name in SCHEDULERS
]


def picture(width=40, height=24):
    image = Image.new("RGB", (width, height), (40, 90, 160))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 5, height // 5, width // 2, height - 8), fill=(230, 180, 40))
    draw.line((0, height, width, 0), fill=(250, 250, 250), width=3)
    return image


def hole(width=40, height=24):
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).rectangle((width // 3, height // 4, width - 5, height - 10), fill=255)
    return mask


@cache
def loaded(kind, folder):
    import diffusers
    import torch

    made = getattr(diffusers, kind).from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    made.set_progress_bar_config(disable=True)
    if hasattr(made, "watermark"):
        made.watermark = None
    return made, made.scheduler.config


def pipeline(kind, folder, sampler):
    import diffusers

    made, config = loaded(kind, folder)
    name, options = SCHEDULERS[sampler]
    made.scheduler = getattr(diffusers, name).from_config(config, **options)
    return made


def reference(made, seed=3, **options):
    import torch

    options = {"prompt": "a cat", "guidance_scale": 5.0, "num_inference_steps": 10, **options}
    image = made(**options, generator=[torch.Generator().manual_seed(seed)], output_type="np").images[0]
    return (image * 255).round().astype(np.uint8)


def psnr(a, b):
    error = ((np.asarray(a, np.float64) - b) ** 2).mean()
    return np.inf if error == 0 else 10 * np.log10(255**2 / error)


def ours(engine, sampler, init, seed=3, **options):
    request = Request(
        prompt="a cat", prompt_syntax="plain", sampler=sampler, guidance=5.0, steps=10, seed=seed, init=init, **options
    )
    return np.asarray(engine.generate(request).images[0])


@pytest.fixture(scope="module")
def engine(tiny_sd1_bundle):
    bundle = read(tiny_sd1_bundle)
    with Engine(bundle, open_backend("openvino", bundle, precision="fp32")) as found:
        yield found


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_img2img(engine, tiny_sd1, sampler):
    """PNDM too, whose list diffusers cuts one entry early (first repeated entry, and beyond)."""
    made = pipeline("StableDiffusionImg2ImgPipeline", tiny_sd1, sampler)
    image = picture()
    for strength in (0.5, 0.95) if sampler == "pndm" else (0.55,):
        expected = reference(made, image=image, strength=strength)
        assert psnr(ours(engine, sampler, Init(image=image, strength=strength)), expected) >= LIMIT


@pytest.mark.parametrize("sampler", [param for param in SAMPLERS if param.values != ("unipc",)])
def test_inpainting_by_blending(engine, tiny_sd1, sampler):
    made = pipeline("StableDiffusionInpaintPipeline", tiny_sd1, sampler)
    size = {"width": 40, "height": 24}
    for strength in (0.6, 1.0):
        expected = reference(made, image=picture(), mask_image=hole(), strength=strength, **size)
        init = Init(image=picture(), mask=hole(), strength=strength)
        assert psnr(ours(engine, sampler, init), expected) >= LIMIT


def test_pictures_are_resized_as_diffusers_does(engine, tiny_sd1):
    made = pipeline("StableDiffusionImg2ImgPipeline", tiny_sd1, "ddim")
    odd = picture(45, 29)  # down to 40 x 24
    assert psnr(ours(engine, "ddim", Init(image=odd)), reference(made, image=odd, strength=0.8)) >= LIMIT
    made = pipeline("StableDiffusionInpaintPipeline", tiny_sd1, "ddim")
    size = {"width": 24, "height": 32}
    expected = reference(made, image=odd, mask_image=hole(90, 40), strength=0.7, **size)
    assert psnr(ours(engine, "ddim", Init(image=odd, mask=hole(90, 40), strength=0.7), **size), expected) >= LIMIT


@pytest.mark.parametrize("backend", ["torch", pytest.param("onnxruntime", marks=pytest.mark.long)])
def test_other_backends(tiny_sd1, tiny_sd1_bundle, backend):
    """On torch img2img runs in the backend's loop, inpainting on the host."""
    bundle = read(tiny_sd1_bundle)
    expected = reference(pipeline("StableDiffusionImg2ImgPipeline", tiny_sd1, "ddim"), image=picture(), strength=0.5)
    made = pipeline("StableDiffusionInpaintPipeline", tiny_sd1, "heun")
    blended = reference(made, image=picture(), mask_image=hole(), strength=0.6, width=40, height=24)
    with Engine(bundle, open_backend(backend, bundle, precision="fp32")) as engine:
        assert psnr(ours(engine, "ddim", Init(image=picture(), strength=0.5)), expected) >= LIMIT
        init = Init(image=picture(), mask=hole(), strength=0.6)
        assert psnr(ours(engine, "heun", init), blended) >= LIMIT


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_models(tiny_sd1_inpaint, tiny_sd1_inpaint_bundle, strength):
    """A UNet of 9 channels reads the mask and the masked image; noise is drawn before the latter."""
    made = pipeline("StableDiffusionInpaintPipeline", tiny_sd1_inpaint, "unipc")
    expected = reference(made, image=picture(), mask_image=hole(), strength=strength, width=40, height=24)
    bundle = read(tiny_sd1_inpaint_bundle)
    assert bundle.reads_mask
    with Engine(bundle, open_backend("openvino", bundle, precision="fp32")) as engine:
        init = Init(image=picture(), mask=hole(), strength=strength)
        assert psnr(ours(engine, "unipc", init), expected) >= LIMIT
        with pytest.raises(RequestError, match="is an inpainting model; give an init image and a mask"):
            engine.generate("a cat", init=Init(image=picture()))


def test_sdxl(tiny_sdxl, tiny_sdxl_bundle):
    bundle = read(tiny_sdxl_bundle)
    with Engine(bundle, open_backend("openvino", bundle, precision="fp32")) as engine:
        made = pipeline("StableDiffusionXLImg2ImgPipeline", tiny_sdxl, "euler")
        expected = reference(made, image=picture(), strength=0.6)
        assert psnr(ours(engine, "euler", Init(image=picture(), strength=0.6)), expected) >= LIMIT
        made = pipeline("StableDiffusionXLInpaintPipeline", tiny_sdxl, "dpmpp_2m")
        expected = reference(made, image=picture(), mask_image=hole(), strength=0.9999, width=40, height=24)
        init = Init(image=picture(), mask=hole(), strength=0.9999)
        assert psnr(ours(engine, "dpmpp_2m", init), expected) >= LIMIT


def test_mates_of_a_batch_and_seeds(engine):
    """Images with and without an init image share batches; each is what it is alone. Image i draws from seed + i."""
    common = {"prompt": "a cat", "steps": 4, "sampler": "ddim", "width": 32, "height": 32}
    requests = [
        Request(**common, init=Init(image=picture(32, 32), strength=0.5), images=2, seed=5),
        Request(**common, init=Init(image=picture(32, 32), mask=hole(32, 32)), seed=6),
        Request(**common, seed=7),
    ]
    together = engine.generate(requests)
    for request, result in zip(requests, together, strict=True):
        for index, image in enumerate(result.images):
            alone = engine.generate(replace(request, images=1, seed=request.seed + index)).images[0]
            assert np.abs(np.asarray(alone, int) - np.asarray(image, int)).max() <= 1
    assert together[0].stats.rows["vae_encoder"] == 1  # not once an image


def test_overlay_keeps_known_pixels(engine, tmp_path):
    """The PNG names both files by their digests."""
    mask = tmp_path / "mask.png"
    hole().save(mask)
    init = Init(image=picture(), mask=mask, overlay=True)
    result = engine.generate("a cat", steps=3, sampler="ddim", init=init)
    (path,) = result.save(tmp_path / "cat.png")
    noted = read_metadata(path)["stepforge"]["init"]
    assert noted["mask_sha256"] == hashlib.sha256(mask.read_bytes()).hexdigest() != noted["image_sha256"]
    assert (noted["strength"], noted["overlay"]) == (1.0, True)
    drawn, kept = np.asarray(result.images[0]), np.asarray(hole()) < 128
    assert (drawn[kept] == np.asarray(picture())[kept]).all()
    assert (drawn[~kept] != np.asarray(picture())[~kept]).any()


def test_what_is_refused(engine, tiny_sd1_bundle, tmp_path):
    black, speck = Image.new("L", (64, 64), 0), Image.new("L", (64, 64), 0)
    ImageDraw.Draw(speck).rectangle((3, 3, 3, 3), fill=255)
    bomb = io.BytesIO()
    Image.new("1", (5000, 8)).save(bomb, "PNG")
    image = picture(64, 64)
    cases = [
        ({"init": {"image": image, "strength": 0.0}}, "strength is 0.0; it lies above 0 and up to 1"),
        ({"init": {"image": image, "strength": float("nan")}}, "strength is nan; it lies above 0"),
        ({"init": {"mask": image}}, "init is .*; give an Init, or an image and any of mask, strength, overlay"),
        ({"init": {"image": image, "blur": 3}}, "init has no 'blur'; it has image, mask, strength, overlay"),
        ({"init": {"image": image, "overlay": True}}, "overlay puts back what a mask keeps; give a mask"),
        ({"init": {"image": image, "strength": 0.2}, "steps": 4}, "strength 0.2 of 4 steps leaves none; raise either"),
        ({"init": {"image": image}, "sampler": "lms"}, "sampler 'lms' cannot start from an image"),
        ({"init": {"image": image, "mask": image}, "sampler": "unipc"}, "'unipc' cannot have its latents changed"),
        ({"init": {"image": image, "mask": black}, "sampler": "ddim"}, "the mask is black everywhere"),
        ({"init": {"image": image, "mask": speck}, "sampler": "ddim"}, "falls between latents of 2 pixels"),
        ({"init": {"image": tmp_path / "none.png"}}, "none.png is not a file"),
        ({"init": {"image": bomb.getvalue()}}, "5000.*; a side has 1 to 4096"),
        (
            {"init": {"image": Image.new("RGB", (1, 1))}},
            "the init image is smaller than 2 pixels; give width and height",
        ),
    ]
    for values, message in cases:
        with pytest.raises(RequestError, match=message) as caught:
            engine.generate(Request(**{"prompt": "a cat", "steps": 4, **values}))
        assert "\n" not in str(caught.value)
    bundle = read(tiny_sd1_bundle)
    blind = replace(bundle, components={k: v for k, v in bundle.components.items() if k.role != "vae_encoder"})
    with (
        Engine(blind, open_backend("openvino", blind, precision="fp32")) as engine,
        pytest.raises(RequestError, match="the bundle has no VAE encoder"),
    ):
        engine.generate("a cat", init=Init(image=image))


def test_an_upright_picture(engine):
    """EXIF rotation, 16 bits and CMYK are read as hints are."""
    turned = picture().transpose(Image.Transpose.ROTATE_90)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    turned.save(file, "PNG", exif=exif)
    common = {"steps": 2, "sampler": "ddim"}
    a, b = (
        engine.generate("a cat", init=Init(image=image), **common).images[0] for image in (picture(), file.getvalue())
    )
    assert a.size == b.size == (40, 24)
    assert (np.asarray(a) == np.asarray(b)).all()
    assert stepforge.Init is Init
