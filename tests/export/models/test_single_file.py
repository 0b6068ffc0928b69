"""The right value of each setting of a single file, by diffusers' own readers or by the loaders that write the marks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepforge.export import build, parts
from stepforge.export.models.load import load
from stepforge.export.models.source import Source
from stepforge.runtime.bundle import TEXT_ENCODERS
from stepforge.runtime.errors import CheckpointError

Original = Callable[..., Path]
EMPTY = torch.zeros(0)
BASE = {"global_step": torch.tensor(875000)}
EDM = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)}


def stated(lines: tuple[str, ...]) -> set[str]:
    """What each line is about."""
    return {line.partition(":")[0] for line in lines}


def pad_ids(source: Source, folder: Path) -> list[int]:
    """As the bundle's cards have them."""
    return [
        parts.write_tokenizer(tokens, pad, folder, key).pad_id
        for tokens, pad, key in zip(source.tokenizers, source.pads, TEXT_ENCODERS, strict=False)
    ]


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("tiny_sd1", "end"),
        ("tiny_sd1", "zero"),
        ("tiny_sd2v", "end"),
        ("tiny_sd2v", "zero"),
        ("tiny_sdxl", "end"),
        ("tiny_sdxl", "zero"),
    ],
)
def test_padding_is_the_text_encoders(
    family: str, given: str, to_original: Original, tiny_sdxl: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The ids of the model's own tokenizers, whichever is given."""
    folder = request.getfixturevalue(family)
    path = to_original(folder, tmp_path / "m.safetensors")
    source = load(path, tokenizer=tiny_sdxl / ("tokenizer" if given == "end" else "tokenizer_2"))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    own = load(folder)
    assert own.pads == (None,) * len(own.text_encoders)
    assert own.corrected == ()
    expected = pad_ids(own, tmp_path / "b")
    assert pad_ids(source, tmp_path / "a") == expected
    wrong = [key.name for key, pad in zip(TEXT_ENCODERS, source.pads, strict=False) if pad != given]
    assert sorted(stated(source.corrected)) == wrong
    assert len(wrong) == {"tiny_sd1": given != "end", "tiny_sd2v": given != "zero", "tiny_sdxl": 1}[family]


@pytest.fixture(scope="module")
def sd2_of_23(tiny_sd2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 2 with as many layers in its text encoder as the real one has in diffusers' layout."""
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = Path(shutil.copytree(tiny_sd2v, tmp_path_factory.mktemp("models") / "sd2"))
    config = json.loads((folder / "text_encoder/config.json").read_text()) | {"num_hidden_layers": 23}
    torch.manual_seed(4)
    CLIPTextModel(CLIPTextConfig(**config)).save_pretrained(folder / "text_encoder")
    return folder


@pytest.mark.parametrize("spelling", ["transformers", "openclip"])
@pytest.mark.parametrize("layers", [23, 24])
def test_family_is_the_unets_and_sd2_has_23_layers(
    spelling: str, layers: int, sd2_of_23: Path, to_original: Original, tmp_path: Path
) -> None:
    """An SD 2 file may spell its text encoder either way; diffusers' reader of text encoders is the authority."""
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
    from transformers import CLIPTextModel

    path = to_original(sd2_of_23, tmp_path / "m.safetensors", spelling=spelling, unused=layers == 24)
    source = load(path, tokenizer=sd2_of_23 / "tokenizer")
    assert source.family == "sd2"
    assert source.scheduler["_class_name"] == "DDIMScheduler"
    ours = source.text_encoders[0](torch.float32)
    reference = create_diffusers_clip_model_from_ldm(
        CLIPTextModel, load_file(path), "text_encoder", str(sd2_of_23), local_files_only=True
    )
    assert (ours.config.num_hidden_layers, ours.config.hidden_act) == (23, "gelu")
    assert ours.config.hidden_act == reference.config.hidden_act
    ids = torch.arange(77)[None]
    with torch.no_grad():
        # the same operations on weights at other addresses; 1e-5 is 20 times what 23 layers of rounding make of it
        torch.testing.assert_close(ours(ids)[0], reference(ids)[0], rtol=0, atol=1e-5)
    heads = source.unet(torch.float32).config.attention_head_dim
    assert heads == load(sd2_of_23).unet(torch.float32).config.attention_head_dim


def test_sd1_in_openclips_spelling_stays_sd1(tiny_sd1: Path, to_original: Original, tmp_path: Path) -> None:
    path = to_original(tiny_sd1, tmp_path / "m.safetensors", spelling="openclip")
    source = load(path, tokenizer=tiny_sd1 / "tokenizer")
    assert (source.family, source.pads) == ("sd1", ("end",))
    config = source.text_encoders[0](torch.float32).config
    assert (config.hidden_act, config.num_hidden_layers) == ("quick_gelu", 3)
    assert source.unet(torch.float32).config.attention_head_dim == 8


def test_width_and_structure_of_another_family_are_refused(
    tiny_sd1: Path, to_original: Original, tmp_path: Path
) -> None:
    path = to_original(tiny_sd1, tmp_path / "m.safetensors")
    state = load_file(path)
    for width, text in ((1024, "as sd2 models, but is built as sd1's"), (1280, "is the SDXL refiner")):
        wide = {
            key: torch.zeros(value.shape[0], width)
            if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
            else value
            for key, value in state.items()
        }
        save_file(wide, path)
        with pytest.raises(CheckpointError, match=re.escape(text)):
            load(path, tokenizer=tiny_sd1 / "tokenizer")


@pytest.mark.parametrize(
    ("family", "keys", "metadata", "given", "expected", "assumed"),
    [
        ("tiny_sd1", {}, {}, None, "epsilon", True),
        ("tiny_sdxl", {}, {}, None, "epsilon", True),
        ("tiny_sd2v", {}, {}, None, "v_prediction", True),  # diffusers' rule
        ("tiny_sd2v", BASE, {}, None, "epsilon", False),
        ("tiny_sd2v", {}, {}, "epsilon", "epsilon", False),
        ("tiny_sd1", {"v_pred": EMPTY}, {}, None, "v_prediction", False),
        ("tiny_sdxl", {"v_pred": EMPTY}, {}, None, "v_prediction", False),
        ("tiny_sdxl", {"v_pred": EMPTY}, {}, "epsilon", "epsilon", False),
        ("tiny_sdxl", {"v_pred": EMPTY}, {"modelspec.prediction_type": "epsilon"}, None, "v_prediction", True),
        ("tiny_sd1", {}, {"modelspec.prediction_type": "v"}, None, "v_prediction", False),  # kohya's trainers
        ("tiny_sd2v", {}, {"modelspec.prediction_type": "epsilon"}, None, "epsilon", False),
        ("tiny_sdxl", {}, {"modelspec.predict_key": "v"}, None, "v_prediction", False),  # ComfyUI
        ("tiny_sdxl", {}, {"modelspec.predict_key": "epsilon"}, None, "epsilon", False),
    ],
)
def test_prediction_type(
    family: str,
    keys: dict[str, torch.Tensor],
    metadata: dict[str, str],
    given: str | None,
    expected: str,
    assumed: bool,
    to_original: Original,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    folder = request.getfixturevalue(family)
    path = to_original(folder, tmp_path / "m.safetensors", metadata, **keys)
    source = load(path, tokenizer=folder / "tokenizer", prediction_type=given)
    assert source.scheduler["prediction_type"] == expected
    assert ("prediction_type" in stated(source.assumed)) == assumed
    if family == "tiny_sd2v":
        assert source.unet(torch.float32).config.sample_size == (768 if expected == "v_prediction" else 512) // 2


def test_sd2_that_inpaints_predicts_epsilon(to_original: Original, tiny_sd2v: Path, tmp_path: Path) -> None:
    """diffusers' rule for single files takes v-prediction for SD 2's text-to-image models only."""
    from diffusers import DDIMScheduler
    from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES, _legacy_load_scheduler

    path = to_original(tiny_sd2v, tmp_path / "m.safetensors")
    state = load_file(path)
    convolution = CHECKPOINT_KEY_NAMES["inpainting"]
    save_file(state | {convolution: torch.cat([state[convolution]] * 2 + [state[convolution][:, :1]], 1)}, path)
    for channels in (4, 9):
        source = load(path if channels == 9 else to_original(tiny_sd2v, tmp_path / "4.safetensors"),
                      tokenizer=tiny_sd2v / "tokenizer")  # fmt: skip
        shapes = {convolution: torch.empty(1, channels), CHECKPOINT_KEY_NAMES["v2"]: torch.empty(1, 1024)}
        theirs = _legacy_load_scheduler(DDIMScheduler, shapes, "scheduler").config
        assert source.scheduler["prediction_type"] == theirs.prediction_type
        assert "prediction_type" in stated(source.assumed)
        assert source.unet(torch.float32).config.sample_size == (256 if channels == 9 else 384)


@pytest.mark.parametrize("family", ["tiny_sd1", "tiny_sd2v", "tiny_sdxl"])
def test_zero_terminal_snr(family: str, to_original: Original, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """diffusers' scheduler of this config ends at no signal; with epsilon, which cannot, the file's key is named instead."""
    import diffusers

    folder = request.getfixturevalue(family)
    path = to_original(folder, tmp_path / "m.safetensors", v_pred=EMPTY, ztsnr=EMPTY)
    config = load(path, tokenizer=folder / "tokenizer").scheduler
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == ("v_prediction", True)
    scheduler = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    assert scheduler.config.rescale_betas_zero_snr is True
    assert float(scheduler.alphas_cumprod[-1]) < 1e-6
    source = load(path, tokenizer=folder / "tokenizer", prediction_type="epsilon")
    assert not source.scheduler.get("rescale_betas_zero_snr")
    assert "noise schedule" in stated(source.assumed)


def test_cosxl_is_read_as_diffusers_edm_scheduler(to_original: Original, tiny_sdxl: Path, tmp_path: Path) -> None:
    """Stability's scheduler of CosXL: the noise levels of the file's range, v-prediction over continuous time."""
    from diffusers import EDMEulerScheduler

    path = to_original(tiny_sdxl, tmp_path / "m.safetensors", v_pred=EMPTY, **EDM)
    source = load(path, tokenizer=tiny_sdxl / "tokenizer")
    assert source.scheduler["_class_name"] == "EDMEulerScheduler"
    assert "prediction_type" not in stated(source.assumed)
    ours = EDMEulerScheduler.from_config(dict(source.scheduler))
    theirs = EDMEulerScheduler(0.002, 120.0, 1.0, "exponential", prediction_type="v_prediction")
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(20)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-6, atol=0)  # 0.002 is a float32 in the file
    assert ours.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("keys", "metadata", "text"),
    [
        ({"edm_vpred.sigma_max": torch.tensor(float("nan"))}, {}, "with noise levels from 0.002 to None"),
        ({**EDM, "edm_vpred.sigma_min": torch.tensor(0.0)}, {}, "with noise levels from 0 to 120.0"),
        ({"edm_mean": EMPTY}, {}, "is a Playground checkpoint"),
        ({}, {"modelspec.prediction_type": "flow"}, "states modelspec.prediction_type='flow'; known: v,"),
        ({}, {"modelspec.prediction_type": "v", "modelspec.predict_key": "epsilon"}, "states two prediction types"),
        ({"model.diffusion_model.scaled_fp8": torch.zeros(2)}, {}, "holds scaled weights"),
        ({"model.diffusion_model.time_stack.weight": torch.zeros(2)}, {}, "unexpected weights in the UNet"),
        ({"first_stage_model.odd.weight": torch.zeros(2)}, {}, ""),
    ],
)
def test_other_kinds_are_refused(
    keys: dict[str, torch.Tensor],
    metadata: dict[str, str],
    text: str,
    to_original: Original,
    tiny_sdxl: Path,
    tmp_path: Path,
) -> None:
    path = to_original(tiny_sdxl, tmp_path / "m.safetensors", metadata, **keys)
    if not text:  # left out by diffusers' converter as well
        load(path, tokenizer=tiny_sdxl / "tokenizer")
        return
    with pytest.raises(CheckpointError, match=re.escape(text)) as caught:
        load(path, tokenizer=tiny_sdxl / "tokenizer")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("step", [torch.zeros(3), torch.tensor(float("nan")), torch.tensor([True])])
def test_odd_global_steps_say_nothing(
    step: torch.Tensor, to_original: Original, tiny_sd2v: Path, tmp_path: Path
) -> None:
    path = to_original(tiny_sd2v, tmp_path / "m.safetensors", global_step=step)
    assert load(path, tokenizer=tiny_sd2v / "tokenizer").scheduler["prediction_type"] == "v_prediction"


def test_what_a_single_file_does_not_carry_is_said(to_original: Original, tiny_sdxl: Path, tmp_path: Path) -> None:
    extra = {"model_ema.decay": EMPTY}
    path = to_original(tiny_sdxl, tmp_path / "m.safetensors", {"modelspec.encoder_layer": "2"}, **extra)
    lines = load(path, tokenizer=tiny_sdxl / "tokenizer").assumed
    assert all("\n" not in line for line in lines)
    assert stated(lines) == {
        "prediction_type", "scheduler", "betas", "unet attention heads", "text_encoder", "text_encoder_2",
        "vae scaling_factor", "size", "clip skip", "force_zeros_for_empty_prompt", "unet weights",
    }  # fmt: skip
    assert "modelspec.encoder_layer=2 is not followed" in " ".join(lines)


@pytest.mark.parametrize("encoders", [("encoder.",), ("encoder.", "quant_conv.")])
@pytest.mark.parametrize("single", [True, False])
def test_vae_without_encoder_decodes(
    single: bool, encoders: tuple[str, ...], to_original: Original, tiny_sd1: Path, tmp_path: Path
) -> None:
    expected = load(tiny_sd1).vae(torch.float32)
    model: Path = Path(shutil.copytree(tiny_sd1, tmp_path / "model"))
    file = model / "vae/diffusion_pytorch_model.safetensors"
    if single:
        model = file = to_original(tiny_sd1, tmp_path / "m.safetensors")
    state = {
        key: value for key, value in load_file(file).items()
        if not key.removeprefix("first_stage_model.").startswith(encoders)
    }  # fmt: skip
    save_file(state, file)
    source = load(model, tokenizer=tiny_sd1 / "tokenizer" if single else None)
    assert "vae" in stated(source.assumed)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found: Any = source.vae(torch.float32)
    with torch.no_grad():  # other addresses of the same weights: a sum in another order
        torch.testing.assert_close(found.decode(latents).sample, expected.decode(latents).sample, rtol=0, atol=1e-5)


def test_export_tells_what_was_assumed_and_corrected(
    to_original: Original, tiny_sd1: Path, tiny_sdxl: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = to_original(tiny_sd1, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="ControlNet name"):  # what comes after the model, before any tracing
        build.export_bundle(
            path, tmp_path / "out", tokenizer=tiny_sdxl / "tokenizer_2", controls={"no name!": tmp_path}
        )
    assert (
        "m: assumed prediction_type: epsilon, because neither the file's keys nor its metadata state one"
        in caplog.messages
    )
    assert any(message.startswith("m: corrected text_encoder: pad_id ") for message in caplog.messages)
