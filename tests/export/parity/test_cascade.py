"""DeepFloyd IF against diffusers' IFPipeline and IFSuperResolutionPipeline: a whole cascade, and its parts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stepforge
from stepforge.export.build import export_bundle
from stepforge.export.models.load import load
from stepforge.export.models.pixel.t5 import read_t5_tokenizer
from stepforge.export.models.upscaler import read_upscaler
from stepforge.export.parity.measures import psnr
from stepforge.export.parity.reference import Settings
from stepforge.export.parity.stages import load_stage, run_stage
from stepforge.export.parity.staging import assumed_tokenizer, stage_component
from stepforge.export.parity.verify import verify
from stepforge.runtime.bundle import read
from stepforge.runtime.engine.conditions.t5 import T5Tokenizer
from stepforge.runtime.errors import CheckpointError, RequestError

PROMPT, NEGATIVE = "  A Cat (do.g!) ", "fog"
ASK = {"prompt": PROMPT, "negative": NEGATIVE, "steps": 4, "guidance": 3.0, "seed": 5}


def parts(folder: Path) -> dict[str, Any]:
    """Networks and schedulers of a tiny folder, by diffusers' and transformers' own loaders."""
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
    from transformers import T5EncoderModel
    from transformers import T5Tokenizer as Tokenizer

    found: dict[str, Any] = {"unet": UNet2DConditionModel.from_pretrained(folder / "unet").eval()}
    kind = DDIMScheduler if "DDIM" in (folder / "scheduler/scheduler_config.json").read_text() else DDPMScheduler
    found["scheduler"] = kind.from_pretrained(folder / "scheduler")
    if (folder / "text_encoder").is_dir():
        found["text_encoder"] = T5EncoderModel.from_pretrained(folder / "text_encoder").eval()
        found["tokenizer"] = Tokenizer.from_pretrained(folder / "tokenizer")
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


UP = (
    stepforge.Upscale(name="ii", steps=3, guidance=2.0, noise_level=100),
    stepforge.Upscale(name="plain", steps=4, noise_level=20),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", ["onnxruntime", *(pytest.param(name, marks=pytest.mark.long) for name in ("openvino", "torch"))]
)
def test_cascade(tiny_if_bundle: Path, reference: list[np.ndarray], backend: str):
    """Stage I, II with text, and a stage without text, each behind the other and in one request: one stream of noise."""
    with stepforge.load(tiny_if_bundle, backend=backend, precision="fp32") as engine:
        for stages, wanted in enumerate(reference):
            result = engine.generate(stepforge.Request(**ASK, upscale=UP[:stages]))
            assert close_to(result.latents[0], wanted) >= 60, stages
            assert result.images[0].size == wanted.shape[:0:-1]
        # guided steps have two rows, those without text one; both prompts were encoded by the first request, for both stages
        assert result.stats.rows == {"text_encoder": 0, "unet": 8, "ii/unet": 6, "plain/unet": 4}
        with pytest.raises(RequestError, match="reads no text, so that nothing can guide it: guidance is 4; give 1"):
            engine.generate(stepforge.Request(**ASK, upscale=(UP[0], stepforge.Upscale(name="plain", guidance=4.0))))
        picture = result.images[0].resize((16, 24))
        alone = engine.generate(
            stepforge.Request(prompt="", upscale=stepforge.Upscale(name="plain", steps=2, image=picture))
        )
        assert alone.images[0].size == (32, 48)


@pytest.mark.slow
def test_bundle(tiny_if_bundle: Path):
    bundle = read(tiny_if_bundle)
    assert sum(key.role == "text_encoder" for key in bundle.components) == 1  # T5 is stored once
    assert not any(key.role.startswith("vae") for key in bundle.components)
    ii, plain = bundle.stages["ii"], bundle.stages["plain"]
    assert ii.model
    assert plain.model
    assert ii.model.text_encoders == bundle.card.text_encoders
    assert (ii.kind, ii.scale, ii.guidance, ii.noise_level, ii.most_noise) == ("pixel", 2, 4.0, 250, 999)
    assert (plain.model.text_encoders, plain.guidance, plain.model.size_multiple) == ((), 1.0, 2)  # K blocks halve
    assert (bundle.card.size_multiple, bundle.card.scaling_factor, bundle.scheduler.threshold) == (2, 1.0, (0.95, 1.5))


@pytest.mark.slow
def test_what_verify_compares(tiny_if: Path, tiny_if_bundle: Path, tiny_if_sr: dict[str, Path]):
    """A stage without text against its pipeline, which is given the variance that the network has not."""
    path = tiny_if_sr["plain"]
    with stepforge.load(tiny_if_bundle, backend="onnxruntime", precision="fp32") as engine:
        pipeline = load_stage(path, read_upscaler(path).source)
        found = run_stage("plain", engine.bundle.stages["plain"], pipeline, Settings(("a cat",), 3, 5.0, 1))
        result = engine.generate(found.request)
        assert len(found.reference.latents) == 3
        assert close_to(result.latents[0], found.reference.latents[-1]) >= 60
        assert [call.name for call in found.calls] == [f"plain denoiser t={t}" for t in (999, 666, 332)]
        for call in found.calls:
            made = engine.backend.open(call.component)(dict(call.inputs))["prediction"]
            assert np.abs(made - call.outputs["prediction"]).max() < 1e-4


@pytest.mark.slow
def test_verify(tiny_if: Path, tiny_if_bundle: Path, tiny_if_sr: dict[str, Path]):
    """Stage I, one that reads its text and one that reads none."""
    verdict = verify(
        tiny_if_bundle, tiny_if, upscalers=tiny_if_sr, backends=["onnxruntime"], precisions=["fp32"], prompts=["a cat"],
        steps=3, store=False,
    )  # fmt: skip
    assert verdict["passed"], [check for check in verdict["checks"] if not check["passed"]]
    names = {check["name"].partition(" t=")[0] for check in verdict["checks"]}
    assert {"a cat", "stage ii", "stage plain", "text_encoder", "ii text_encoder", "ii denoiser", "denoiser"} <= names
    with pytest.raises(CheckpointError, match="the bundle has the stage 'ii'; give its model too"):
        verify(tiny_if_bundle, tiny_if, upscalers={"plain": tiny_if_sr["plain"]})


@pytest.mark.slow
@pytest.mark.long
def test_a_cascade_in_fp16(tiny_if: Path, tiny_if_sr: dict[str, Path], tmp_path: Path):
    """Text through T5, stages II with text and without; computed in fp32, of weights rounded to fp16."""
    export_bundle(tiny_if, tmp_path / "bundle", upscalers=tiny_if_sr, precision="fp16")
    verdict = verify(
        tmp_path / "bundle", tiny_if, upscalers=tiny_if_sr, backends=["openvino", "onnxruntime"], precisions=["fp32"],
        prompts=["a cat"], steps=3, store=False,
    )  # fmt: skip
    assert verdict["passed"], [check for check in verdict["checks"] if not check["passed"]]
    assert {"stage ii", "stage plain", "a cat"} <= {c["name"] for c in verdict["checks"] if c["level"] == "image"}


def save_pieces(tokenizer: Any, folder: Path) -> None:
    """A T5 tokenizer as the SentencePiece model that published folders hold."""
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    for piece, score in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"][:-100]:
        proto.pieces.add(piece=piece, score=score)
    (folder / "spiece.model").write_bytes(proto.SerializeToString())


def test_the_reference_reads_pieces(tiny_if: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """transformers, without sentencepiece, reads a folder that has spiece.model alone as one without a vocabulary."""
    from transformers import T5Tokenizer as Reference

    reference = Reference.from_pretrained(tiny_if / "tokenizer")
    folder, out = Path(shutil.copytree(tiny_if / "tokenizer", tmp_path / "tokenizer")), tmp_path / "out"
    (folder / "tokenizer.json").unlink()
    save_pieces(reference, folder)
    monkeypatch.setattr("stepforge.export.parity.staging.find_spec", lambda _: None)
    stage_component(folder, (), out)
    assert Reference.from_pretrained(out)("a cat dog").input_ids == reference("a cat dog").input_ids
    assert assumed_tokenizer(folder)[0].startswith("tokenizer: spiece.model as stepforge reads it")
    monkeypatch.setattr("stepforge.export.parity.staging.find_spec", lambda _: "installed")
    stage_component(folder, (), tmp_path / "own")
    assert ((tmp_path / "own/spiece.model").exists(), assumed_tokenizer(folder)) == (True, ())


@pytest.mark.parametrize("source", ["tokenizer.json", "spiece.model"])
def test_t5_tokens(tiny_if: Path, tmp_path: Path, source: str, caplog: pytest.LogCaptureFixture):
    """Ids and masks of transformers' T5Tokenizer, from either file."""
    from transformers import T5Tokenizer as Reference

    reference = Reference.from_pretrained(tiny_if / "tokenizer")
    folder = tiny_if / "tokenizer"
    if source == "spiece.model":
        folder = tmp_path
        save_pieces(reference, folder)
    found = read_t5_tokenizer(folder)
    (tmp_path / "ours.json").write_text(found.text, encoding="utf-8")
    ours = T5Tokenizer.from_file(tmp_path / "ours.json", **found.card)
    for prompt in ("", PROMPT, "a  cat,dog\n(at:1.2) ünknown", "og " * 90):
        chunks = ours.encode(prompt, syntax="a1111")
        text = prompt.lower().strip()
        wanted = reference(text, padding="max_length", max_length=77, truncation=True, add_special_tokens=True)
        assert chunks.ids[0].tolist() == wanted.input_ids, prompt
        assert chunks.mask is not None
        assert chunks.mask[0].tolist() == wanted.attention_mask, prompt
    assert "cut after 76 tokens" in caplog.text


def test_refused(tiny_if: Path, tiny_if_sr: dict[str, Path], tmp_path: Path):
    def changed(folder: Path, file: str, **values: Any) -> Path:
        copy = Path(shutil.copytree(folder, tmp_path / str(len(list(tmp_path.iterdir())))))
        data = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps(data | values))
        return copy

    unet, scheduler = "unet/config.json", "scheduler/scheduler_config.json"
    for read_model, folder, file, values, message in (
        (load, tiny_if, unet, {"in_channels": 4}, "in_channels=4, which is not IF's layout"),
        (load, tiny_if, unet, {"sample_size": 17}, "sample_size is 17; a multiple of 2"),
        (
            load,
            tiny_if,
            "model_index.json",
            {"text_encoder": ["transformers", "CLIPTextModel"]},
            "supported: T5Encoder",
        ),
        (load, tiny_if, "model_index.json", {"text_encoder": None, "tokenizer": None}, "there is no text encoder"),
        (
            load,
            tiny_if,
            "tokenizer/tokenizer_config.json",
            {"extra_ids": 10**9},
            "extra_ids is 1000000000; from 0 to 1000",
        ),
        (
            load,
            tiny_if,
            "tokenizer/tokenizer_config.json",
            {"added_tokens_decoder": {"9999999": {}}},
            "no whole number from 0",
        ),
        (read_upscaler, tiny_if_sr["plain"], unet, {"class_embed_type": None}, "class_embed_type=None"),
        (read_upscaler, tiny_if_sr["plain"], "model_index.json", {"_class_name": ["a"]}, "is a ['a']; supported"),
        (read_upscaler, tiny_if_sr["plain"], "model_index.json", {"watermarker": ["a", "b"]}, None),
        (
            read_upscaler,
            tiny_if_sr["plain"],
            scheduler,
            {"_class_name": "DDPMScheduler", "variance_type": "learned_range"},
            "",
        ),
        (
            read_upscaler,
            tiny_if_sr["ii"],
            "model_index.json",
            {"image_noising_scheduler": None},
            "image_noising_scheduler",
        ),
    ):
        path = changed(folder, file, **values)
        if file == scheduler:  # the class counts that model_index.json names
            path = changed(path, "model_index.json", scheduler=["diffusers", "DDPMScheduler"])
            message = "needs 6 channels of the UNet; it has 3"
        if message is None:
            assert any(
                line.startswith("safety_checker and watermarker: none") for line in read_model(path).source.assumed
            )
            continue
        with pytest.raises(CheckpointError, match=re.escape(message)):
            read_model(path)
    with pytest.raises(CheckpointError, match="makes 32 pixels a side, no multiple of the 24"):
        read_upscaler(tiny_if_sr["plain"]).scale_over(24)
