"""verify is a second opinion: what the exporter misreads in a model fails against diffusers' own loaders.

Each case has the bundle of a right exporter, which passes, and the bundle that the misreading one would have written. Networks
are equal in most cases, so that one export of a model serves them all; a misread graph is traced anew.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer
from transformers.activations import ACT2FN

from stepforge.export import parts
from stepforge.export.build import prefixed, read_controls
from stepforge.export.graph import modules, trace
from stepforge.export.lora.merge import Merged, merge, read_all
from stepforge.export.models import single_file
from stepforge.export.models.load import load
from stepforge.export.models.scheduler import scheduler_card
from stepforge.export.parity import configs, loaders
from stepforge.export.parity.adapters import merge_adapters
from stepforge.export.parity.control import load_network
from stepforge.export.parity.loaders import load_pipeline
from stepforge.export.parity.reference import References, Settings, inversion_prompts, run_references
from stepforge.export.parity.staging import stage_model
from stepforge.export.parity.verify import compare
from stepforge.runtime.backends import open_backend
from stepforge.runtime.bundle import TEXT_ENCODERS, UNET, VAE_DECODER, VAE_ENCODER, Bundle, read
from stepforge.runtime.cli.main import main
from stepforge.runtime.engine.denoise import Denoisers
from stepforge.runtime.errors import CheckpointError

pytestmark = pytest.mark.slow  # the quick lane has three minutes

SETTINGS = Settings(("a cat and a dog",), 4, 7.5, 0)
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def lane(names: Iterable[str], *whole: str) -> list[Any]:
    """Cases in the whole suite, one of each way in which a setting goes astray; all others are long."""
    return [pytest.param(name, marks=[] if name in whole else pytest.mark.long) for name in names]


def failed(bundle: Bundle, references: References) -> set[str]:
    """The levels at which a bundle is not what diffusers makes of the model."""
    backend = open_backend("onnxruntime", bundle, precision="fp32")
    return {check.level for check in compare(bundle, backend, references, SETTINGS) if not check.passed}


def edited(model: Path, out: Path, changes: Mapping[str, Mapping[str, Any]]) -> Path:
    """A copy of a model whose JSON files have other values."""
    shutil.copytree(model, out)
    for name, values in changes.items():
        (out / name).write_text(json.dumps(json.loads((out / name).read_text("utf-8")) | values), "utf-8")
    return out


def original(model: Path, out: Path, **options: Any) -> Path:
    """A model as a single file, by the writer that the tests of models have."""
    spec = importlib.util.spec_from_file_location("single_files", Path(__file__).parents[1] / "models" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Path(module.original(model, out, **options))


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Configs of a tiny model in place of those published for what diffusers takes single files for; tiny ones for "v1"."""

    def publish(model: Path, kind: str = "v1") -> None:
        files = [model / "model_index.json", *model.glob("*/*config.json")]
        tiny = {str(file.relative_to(model)): json.loads(file.read_text("utf-8")) for file in files}
        monkeypatch.setitem(configs.MODELS, kind, tiny)
        if kind != "v1":
            monkeypatch.setattr(loaders, "_kind", lambda shapes: kind)

    return publish


def make_references(model: Path, bundle: Path | Bundle, **options: Any) -> References:
    given = {name: options[name] for name in ("tokenizer", "prediction_type") if name in options}
    loaded = load_pipeline(model, load(model, **given), **options)
    bundle = bundle if isinstance(bundle, Bundle) else read(bundle)
    return run_references(loaded, (), bundle, SETTINGS, lambda stage: None)


@pytest.fixture(scope="module")
def references(request: pytest.FixtureRequest) -> Callable[[str], References]:
    """What diffusers makes of a tiny model's folder, once for each."""
    made: dict[str, References] = {}

    def get(name: str) -> References:
        if name not in made:
            made[name] = make_references(request.getfixturevalue(name), request.getfixturevalue(f"{name}_bundle"))
            assert made[name].loader == "from_pretrained"
            assert not made[name].assumed
        return made[name]

    return get


# Settings that stand in the manifest


def scheduler(bundle: Bundle, **changes: Any) -> Bundle:
    return replace(bundle, scheduler=replace(bundle.scheduler, **changes))


def card_of(bundle: Bundle, model: Path) -> Bundle:
    """As an export of the model has the scheduler."""
    return replace(bundle, scheduler=scheduler_card(load(model).scheduler, (SETTINGS.steps,)))


def card(bundle: Bundle, **changes: Any) -> Bundle:
    return replace(bundle, card=replace(bundle.card, **changes))


def padded_otherwise(bundle: Bundle) -> Bundle:
    """The last tokenizer taken for one of the other kind: OpenCLIP's for OpenAI's, or the reverse."""
    *first, last = bundle.card.text_encoders
    other = 0 if last.pad_id == last.eos_id else last.eos_id
    return card(bundle, text_encoders=(*first, replace(last, pad_id=other)))


@dataclass(frozen=True)
class Case:
    model: str
    wrong: Callable[[Bundle], Bundle] | tuple[Callable[[Bundle], Bundle], ...]
    right: Callable[[Bundle], Bundle] = lambda bundle: bundle
    edits: Mapping[str, Mapping[str, Any]] | None = (
        None  # what the model's files say instead; the scheduler is read anew
    )


def named(name: str, **options: Any) -> dict[str, dict[str, Any]]:
    """Edits: another scheduler in the index, and of its options."""
    return {"model_index.json": {"scheduler": ["diffusers", name]}, "scheduler/scheduler_config.json": options}


PREDICTION = {"scheduler/scheduler_config.json": {"prediction_type": "v_prediction"}}
CASES = {
    "padding": Case("tiny_sdxl", padded_otherwise),
    "steps_offset and clip_sample": Case(
        "tiny_sd1",
        (partial(scheduler, sampler="ddim", steps_offset=0), partial(scheduler, sampler="ddim", clip_sample=True)),
        edits=named("DDIMScheduler", steps_offset=0, clip_sample=True),
    ),
    "scheduler class": Case("tiny_sd1", lambda bundle: bundle, edits=named("EulerDiscreteScheduler")),
    "solver without a formula": Case(
        "tiny_sd1",
        partial(scheduler, sampler="dpmpp_2m"),
        edits=named("DPMSolverMultistepScheduler", solver_type="heun"),
    ),
    "prediction type": Case("tiny_sd1", lambda bundle: bundle, edits=PREDICTION),
    "zero terminal SNR": Case("tiny_sd2v", partial(scheduler, rescale_betas_zero_snr=False)),
    "zeros for an empty prompt": Case("tiny_sdxl", partial(card, zero_empty_negative=False)),
    "no zeros for an empty prompt": Case(
        "tiny_sdxl",
        lambda bundle: bundle,
        partial(card, zero_empty_negative=False),
        {"model_index.json": {"force_zeros_for_empty_prompt": False}},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", lane(CASES, "padding", "prediction type", "zeros for an empty prompt"))
def test_misread_settings_fail(
    name: str, references: Callable[[str], References], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    case = CASES[name]
    place = request.getfixturevalue(f"{case.model}_bundle")
    bundle = read(place)
    right = case.right(bundle)
    if case.edits is None:
        known = references(case.model)
    else:
        model = edited(request.getfixturevalue(case.model), tmp_path / "model", case.edits)
        if "scheduler/scheduler_config.json" in case.edits:
            right = card_of(bundle, model)
        known = make_references(model, right)
    assert not failed(right, known)
    for wrong in case.wrong if isinstance(case.wrong, tuple) else (case.wrong,):
        assert {"trajectory", "image"} <= failed(wrong(bundle), known)


@pytest.mark.slow
def test_another_size_fails(tiny_sd1: Path, tiny_sd1_bundle: Path, tmp_path: Path) -> None:
    model = edited(tiny_sd1, tmp_path / "model", {"unet/config.json": {"sample_size": [32, 48]}})
    assert failed(read(tiny_sd1_bundle), make_references(model, tiny_sd1_bundle)) == {"setting"}


@pytest.mark.slow
def test_misread_crop_fails(
    tiny_sdxl_bundle: Path, references: Callable[[str], References], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that crops SDXL's images at their middle."""
    known, plain = references("tiny_sdxl"), Denoisers._context

    def cropped(self: Denoisers, rows: Any) -> Any:
        inputs = plain(self, rows)
        return inputs | {"time_ids": inputs["time_ids"] + np.array([0, 0, 32, 32, 0, 0], np.float32)}

    monkeypatch.setattr(Denoisers, "_context", cropped)
    assert failed(read(tiny_sdxl_bundle), known) >= {"step", "trajectory", "image"}


# Settings that stand in graphs


def retraced(bundle: Bundle, out: Path, key: Any, traced: trace.Traced) -> Bundle:
    """The bundle with another graph of one network."""
    shutil.copytree(bundle.path, out)
    shutil.rmtree(out / key.folder)
    entry = prefixed(key, trace.save(traced, out / key.folder))
    entry = replace(entry, modules=bundle.components[key].modules)
    files = {path.relative_to(out).as_posix(): (path.stat().st_size, "") for path in (out / key.folder).iterdir()}
    return replace(bundle, path=out, components={**bundle.components, key: entry}, files={**bundle.files, **files})


def other_activation(model: Path) -> trace.Traced:
    """SD 1's text encoder with OpenCLIP's activation."""
    network = load(model).text_encoders[0](torch.float32)
    for layer in getattr(network, "text_model", network).encoder.layers:
        layer.mlp.activation_fn = ACT2FN["gelu"]
    return modules.text_encoder(network, 77, penultimate=False)


def other_layer(model: Path) -> trace.Traced:
    """SDXL's first text encoder read as SD 1's: the last layer, through the norm."""
    return modules.text_encoder(load(model).text_encoders[0](torch.float32), 77, penultimate=False)


def fewer_layers(model: Path) -> trace.Traced:
    """SD 2's text encoder without its last layer, as where a file has left that out already."""
    network = load(model).text_encoders[0](torch.float32)
    encoder = getattr(network, "text_model", network).encoder
    encoder.layers = encoder.layers[:-1]
    return modules.text_encoder(network, 77, penultimate=False)


def other_scale(model: Path) -> trace.Traced:
    """SDXL's decoder with the factor of SD 1."""
    vae = load(model).vae(torch.float32)
    vae.register_to_config(scaling_factor=0.18215)
    return modules.vae_decoder(vae)


def other_heads(model: Path) -> trace.Traced:
    """SD 2's denoiser with SD 1's heads."""
    unet = load(model).unet(torch.float32)
    for name, module in unet.named_modules():
        if name.endswith((".attn1", ".attn2")):
            module.heads = 8
    return replace(modules.denoiser(unet), derive=False)


GRAPHS = {
    "activation": ("tiny_sd1", TEXT_ENCODERS[0], other_activation),
    "penultimate layer": ("tiny_sdxl", TEXT_ENCODERS[0], other_layer),
    "layers": ("tiny_sd2v", TEXT_ENCODERS[0], fewer_layers),
    "scaling factor": ("tiny_sdxl", VAE_DECODER, other_scale),
    "heads": ("tiny_sd2v", UNET, other_heads),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", lane(GRAPHS, "activation", "penultimate layer", "scaling factor"))
def test_misread_graphs_fail(
    name: str, references: Callable[[str], References], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model, key, make = GRAPHS[name]
    bundle, traced = read(request.getfixturevalue(f"{model}_bundle")), make(request.getfixturevalue(model))
    assert "component" in failed(retraced(bundle, tmp_path / "out", key, traced), references(model))


# Single files


@pytest.mark.slow
@pytest.mark.parametrize("model", lane(("tiny_sd1", "tiny_sd2v", "tiny_sdxl"), "tiny_sdxl"))
def test_single_files(
    model: str, published: Callable[..., None], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """`from_single_file` with configs and the settings of tokenizers from elsewhere; the vocabulary is the given one's."""
    folder, place = request.getfixturevalue(model), request.getfixturevalue(f"{model}_bundle")
    single = original(folder, tmp_path / "m.safetensors")
    with_config = make_references(single, place, tokenizer=folder / "tokenizer", config=folder)
    published(folder)
    known = make_references(single, place, tokenizer=folder / "tokenizer")
    bundle = read(place)
    for each in (known, with_config):
        assert each.loader == "from_single_file"
        assert failed(bundle, each) == set()
    assert with_config.assumed == ()
    [assumed] = known.assumed
    assert assumed.endswith("nothing in the file states it")
    # the given tokenizer's folder is SD 1's or SD 2's own, and for SDXL one for both text encoders
    assert failed(padded_otherwise(bundle), known) >= {"image"}


@pytest.mark.slow
@pytest.mark.long
def test_inpainting(
    tiny_sd1_inpaint: Path, tiny_sd1_inpaint_bundle: Path, published: Callable[..., None], tmp_path: Path
) -> None:
    """A single file with nine channels; its pipeline leaves out PNDM's first steps, whatever the scheduler's config says."""
    model = edited(tiny_sd1_inpaint, tmp_path / "m", {"scheduler/scheduler_config.json": {"skip_prk_steps": False}})
    published(model, "inpainting")
    single = original(model, tmp_path / "m.safetensors")
    known = make_references(single, tiny_sd1_inpaint_bundle, tokenizer=model / "tokenizer")
    assert known.loader == "from_single_file"
    assert "PNDMScheduler, as the base model's" in known.assumed
    bundle = read(tiny_sd1_inpaint_bundle)
    assert not failed(card_of(bundle, model), known)
    config = load(model).scheduler | {"skip_prk_steps": False}
    misread = replace(bundle, scheduler=scheduler_card(config, (SETTINGS.steps,)))
    assert "trajectory" in failed(misread, replace(known, given=()))  # a compiled sampler starts from no image


@pytest.mark.slow
def test_textual_inversions_of_several_vectors(
    tiny_sd1: Path, tiny_sd1_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of verify's own has the first of them: taken for its first vector alone, as before, it fails."""
    model = edited(tiny_sd1, tmp_path / "model", {})
    file = model / "tokenizer/vocab.json"
    names = dict(zip("ŀŁł", ("<cat>", "<cat>_1", "<cat>_2"), strict=True))  # in place of bytes that no prompt has
    vocabulary = {names.get(token, token): number for token, number in json.loads(file.read_text("utf-8")).items()}
    file.write_text(json.dumps(vocabulary), "utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer", local_files_only=True)
    tokenizer.add_tokens(list(names.values()))
    tokenizer.save_pretrained(model / "tokenizer")

    bundle = read(tiny_sd1_bundle)
    shutil.copytree(bundle.path, tmp_path / "out", ignore=shutil.ignore_patterns("tokenizer"))
    parts.write_tokenizer(model / "tokenizer", None, tmp_path / "out", TEXT_ENCODERS[0])
    components = {key: entry for key, entry in bundle.components.items() if key != VAE_ENCODER}
    bundle = replace(bundle, path=tmp_path / "out", components=components)  # no init images are drawn
    source = load(model)
    loaded = load_pipeline(model, source)
    assert inversion_prompts(loaded.pipeline, ("a cat", "<cat>")) == ()
    settings = replace(SETTINGS, prompts=inversion_prompts(loaded.pipeline, ("a cat",)))
    assert settings.prompts == ("a photo of <cat>",)
    known = run_references(loaded, (), bundle, settings, lambda stage: None)
    backend = open_backend("onnxruntime", bundle, precision="fp32")
    assert all(check.passed for check in compare(bundle, backend, known, settings))
    monkeypatch.setattr("stepforge.runtime.engine.conditions.prompts._vectors", lambda added: {})
    wrong = {check.level for check in compare(bundle, backend, known, settings) if not check.passed}
    assert wrong == {"step", "trajectory", "image"}


def test_marks_of_single_files(tiny_sd1: Path, published: Callable[..., None], tmp_path: Path) -> None:
    """Read from the file anew, and told: diffusers' loader looks at none of them."""
    published(tiny_sd1)
    empty = torch.zeros(0)
    for number, (marks, metadata, expected) in enumerate(
        (
            ({"v_pred": empty}, {}, ("v_prediction", "PNDMScheduler", None)),
            ({"v_pred": empty, "ztsnr": empty}, {}, ("v_prediction", "DDIMScheduler", True)),
            ({}, {"modelspec.prediction_type": "v"}, ("v_prediction", "PNDMScheduler", None)),
            ({}, {"modelspec.predict_key": "epsilon"}, ("epsilon", "PNDMScheduler", None)),
        )
    ):
        single = original(tiny_sd1, tmp_path / f"{number}.safetensors", metadata=metadata, **marks)
        source = load(single, tokenizer=tiny_sd1 / "tokenizer")
        loaded = load_pipeline(single, source, tokenizer=tiny_sd1 / "tokenizer")
        found = loaded.pipeline.scheduler
        assert (
            found.config.prediction_type, type(found).__name__, found.config.get("rescale_betas_zero_snr"),
        ) == expected  # fmt: skip
        assert loaded.assumed[0].startswith(f"prediction type {expected[0]}: ")


def test_marks_of_cosxl(tiny_sdxl: Path, published: Callable[..., None], tmp_path: Path) -> None:
    """EDM's scheduler, as diffusers' documentation has it for CosXL; the exporter says the same."""
    published(tiny_sdxl, "xl_base")
    marks = {"edm_vpred.sigma_max": torch.tensor(90.0), "edm_vpred.sigma_min": torch.tensor(0.01)}
    single = original(tiny_sdxl, tmp_path / "m.safetensors", **marks)
    source = load(single, tokenizer=tiny_sdxl / "tokenizer")
    loaded = load_pipeline(single, source, tokenizer=tiny_sdxl / "tokenizer")
    assert loaded.loader == "from_single_file"
    assert type(loaded.pipeline.scheduler).__name__ == source.scheduler["_class_name"] == "EDMEulerScheduler"
    theirs = loaded.pipeline.scheduler.config
    assert (theirs.sigma_max, theirs.sigma_min) == pytest.approx((90.0, 0.01))
    for name in ("sigma_max", "sigma_min", "sigma_data", "sigma_schedule", "prediction_type"):
        assert theirs[name] == source.scheduler[name], name


@pytest.mark.slow
def test_cosxl_to_its_end(
    tiny_sdxl: Path, tiny_sdxl_bundle: Path, published: Callable[..., None], tmp_path: Path
) -> None:
    """CosXL's noise levels and v-prediction through diffusers' pipeline; taken for an epsilon model, as before, it fails."""
    published(tiny_sdxl, "xl_base")
    tokenizer = tiny_sdxl / "tokenizer"
    marks = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)}
    single = original(tiny_sdxl, tmp_path / "m.safetensors", **marks)
    plain = read(tiny_sdxl_bundle)
    source = load(single, tokenizer=tokenizer)
    bundle = replace(plain, scheduler=scheduler_card(source.scheduler, (SETTINGS.steps,)))
    known = run_references(load_pipeline(single, source, tokenizer=tokenizer), (), bundle, SETTINGS, lambda stage: None)
    assert sum("EDMEulerScheduler takes no init image" in line for line in known.assumed) == 2
    assert failed(bundle, known) == set()
    assert {"trajectory", "image"} <= failed(plain, known)


def test_published_configs() -> None:
    """The networks of the configs have as many weights as the published models' papers and cards count."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    counts = {
        "v1": (859_520_964, 123_060_480),
        "v2": (865_910_724, 340_387_840),
        "xl_base": (2_567_463_684, 123_060_480),
    }
    for kind, expected in counts.items():
        files = configs.MODELS[kind]
        with init_empty_weights():
            networks = (
                UNet2DConditionModel.from_config(files["unet/config.json"]),
                CLIPTextModel(CLIPTextConfig(**files["text_encoder/config.json"])),
                AutoencoderKL.from_config(files["vae/config.json"]),
            )
        assert tuple(sum(p.numel() for p in net.parameters()) for net in networks) == (*expected, 83_653_863)


# What is taken from the exporter, and what is not


def test_nothing_of_the_exporters_reading_is_used(
    tiny_sdxl: Path, published: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Source whose every setting is poison; and no watermark, which diffusers draws where its package is installed."""

    def poison(*_: Any) -> Any:
        raise AssertionError("the exporter's reading is used")

    published(tiny_sdxl)
    xl = "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl."
    monkeypatch.setattr(f"{xl}is_invisible_watermark_available", lambda: True)
    monkeypatch.setattr(f"{xl}StableDiffusionXLWatermarker", lambda: "a mark in every image", raising=False)
    single = original(tiny_sdxl, tmp_path / "m.safetensors")
    for model, tokens in ((tiny_sdxl, None), (single, tiny_sdxl / "tokenizer")):
        source = load(model, tokenizer=tokens)
        poisoned = replace(
            source, family="poison", unet=poison, vae=poison, text_encoders=(poison,) * 2, tokenizers=(), scheduler={},
            empty={}, vae_scale=0, force_zeros_for_empty_prompt=False,
        )  # fmt: skip
        pipeline = load_pipeline(model, poisoned, tokenizer=tokens).pipeline
        assert type(pipeline).__name__ == "StableDiffusionXLPipeline"
        assert pipeline.config.force_zeros_for_empty_prompt
        assert pipeline.watermark is None
        assert pipeline.unet.dtype == torch.float32
        assert (pipeline.tokenizer.pad_token_id, pipeline.tokenizer_2.pad_token) == (
            pipeline.tokenizer.eos_token_id,
            "!",
        )


def test_what_diffusers_cannot_load_is_assumed(
    tiny_sd1: Path,
    tiny_sd1_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No published config has this geometry: the exporter's reading is used, told, and counted beside PASSED."""
    monkeypatch.setitem(single_file.SIZE, "sd1", 32)
    single = original(tiny_sd1, tmp_path / "m.safetensors")
    bundle = exported_from(single, tiny_sd1 / "tokenizer", tiny_sd1_bundle, tmp_path / "bundle")
    command = ["verify", bundle, single, "--tokenizer", tiny_sd1 / "tokenizer", "-n", 2, "--prompt", "a cat"]
    command += ["--backend", "onnxruntime", "--precision", "fp32"]
    assert run(*command) == 0
    text = capsys.readouterr().out
    reference = read(bundle).verdict["reference"]
    assert reference["loader"] == "source"
    for what in ("diffusers does not load", "family sd1", "attention_head_dim 8", "quick_gelu", "0.18215", "PNDM"):
        assert any(what in line for line in reference["assumed"])
        assert what in text
    assert f"\nPASSED (with {len(reference['assumed'])} assumed settings): onnxruntime fp32 passed" in text
    assert run("info", bundle) == 0
    assert "assumed by verify: family sd1" in capsys.readouterr().out
    assert run(*command, "--config", tiny_sd1) == 0
    assert "\nPASSED: onnxruntime fp32 passed" in capsys.readouterr().out
    assert run(*command, "--config", tmp_path) == 1
    assert "lacks model_index.json" in capsys.readouterr().err


def exported_from(single: Path, tokenizer: Path, bundle: Path, out: Path) -> Path:
    """The bundle that an export of the single file would give: the same networks, another origin."""
    shutil.copytree(bundle, out)
    manifest = json.loads((out / "bundle.json").read_text("utf-8"))
    manifest["source"] = dict(load(single, tokenizer=tokenizer).provenance)
    (out / "bundle.json").write_text(json.dumps(manifest), "utf-8")
    return out


def run(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return int(exit.value.code or 0)


def test_only_known_libraries_are_imported(tiny_sd1: Path, tmp_path: Path) -> None:
    """An index may name diffusers and transformers; configs are staged without keys that select code."""
    model = edited(
        tiny_sd1, tmp_path / "a", {"unet/config.json": {"_attn_implementation_internal": "x", "auto_map": {}}}
    )
    stage_model(model, ["unet/diffusion_pytorch_model.safetensors"], tmp_path / "staged")
    config = json.loads((tmp_path / "staged/unet/config.json").read_text("utf-8"))
    assert not {"_attn_implementation_internal", "auto_map"} & config.keys()
    assert (tmp_path / "staged/unet/diffusion_pytorch_model.safetensors").is_symlink()
    model = edited(tiny_sd1, tmp_path / "b", {"model_index.json": {"unet": ["os", "UNet2DConditionModel"]}})
    with pytest.raises(CheckpointError, match=r"unet is of .*; supported libraries: diffusers, transformers"):
        stage_model(model, [], tmp_path / "refused")


# LoRA files and ControlNets


def low_rank(model: Path, file: Path, ending: str = "lora_A.weight lora_B.weight") -> Path:
    weight = load_file(model / "unet/diffusion_pytorch_model.safetensors")[f"{ATTENTION}.to_q.weight"]
    down, up = torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
    names = [f"unet.{ATTENTION}.to_q.{part}" for part in ending.split()]
    save_file(dict(zip(names, (down, up), strict=True)), file)
    return file


def test_adapters_are_merged_by_diffusers(tiny_sd1: Path, tmp_path: Path) -> None:
    """As the exporter merges them, to 1e-6; a file that diffusers does not read is told."""
    torch.manual_seed(0)
    source = load(tiny_sd1)
    files = [
        (low_rank(tiny_sd1, tmp_path / f"{name}.safetensors"), strength) for name, strength in (("a", 0.7), ("b", -0.3))
    ]
    merged = read_all(source, files)
    pipeline = load_pipeline(tiny_sd1, source).pipeline
    assert merge_adapters(pipeline, files, merged) == ()
    expected = ours(source.unet(torch.float32), merged)
    assert not torch.allclose(expected, source.unet(torch.float32).state_dict()[f"{ATTENTION}.to_q.weight"])
    torch.testing.assert_close(pipeline.unet.state_dict()[f"{ATTENTION}.to_q.weight"], expected, rtol=0, atol=1e-6)

    weight = source.unet(torch.float32).state_dict()[f"{ATTENTION}.to_q.weight"]
    name = f"lora_unet_{ATTENTION.replace('.', '_')}_to_q"
    pairs = {f"w{half}_{part}": torch.randn(*((weight.shape[0], 2) if part == "a" else (2, weight.shape[1])))
             for half in "12" for part in "ab"}  # fmt: skip
    save_file({f"{name}.hada_{role}": value for role, value in pairs.items()}, tmp_path / "loha.safetensors")
    files = [(tmp_path / "loha.safetensors", 1.0)]
    merged = read_all(source, files)
    pipeline = load_pipeline(tiny_sd1, source).pipeline
    [line] = merge_adapters(pipeline, files, merged)
    assert line == "LoRA loha.safetensors is merged as stepforge reads it: diffusers merges no loha"
    torch.testing.assert_close(
        pipeline.unet.state_dict()[f"{ATTENTION}.to_q.weight"], ours(source.unet(torch.float32), merged)
    )


def test_a_file_that_diffusers_reads_in_part(tiny_sd1: Path, tmp_path: Path) -> None:
    """transformers may refuse PEFT's version after diffusers has changed the denoiser: all is as the exporter merges it."""
    torch.manual_seed(0)
    file = low_rank(tiny_sd1, tmp_path / "a.safetensors")
    layer = "text_encoder.encoder.layers.0.self_attn.q_proj"
    pairs = {f"{layer}.lora_A.weight": torch.randn(2, 32), f"{layer}.lora_B.weight": torch.randn(32, 2)}
    save_file(load_file(file) | pairs, file)
    source = load(tiny_sd1)
    merged = read_all(source, [(file, 0.5)])
    pipeline = load_pipeline(tiny_sd1, source).pipeline
    assert len(merge_adapters(pipeline, [(file, 0.5)], merged)) <= 1
    for component, network in ((UNET, source.unet), (TEXT_ENCODERS[0], source.text_encoders[0])):
        layers = {path: layer for (where, path), layer in merged[0].adapter.layers.items() if where == component}
        expected = merge(network(torch.float32), [(layers, 0.5)]).state_dict()
        found = getattr(pipeline, component.name).state_dict()
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)


def ours(unet: Any, merged: list[Merged]) -> torch.Tensor:
    layers = [({path: layer for (_, path), layer in one.adapter.layers.items()}, one.strength) for one in merged]
    weight: torch.Tensor = merge(unet, layers).state_dict()[f"{ATTENTION}.to_q.weight"]
    return weight


def test_controlnets_are_loaded_by_diffusers(
    tiny_sd1: Path, tiny_sd1_controls: dict[str, Path], tmp_path: Path
) -> None:
    """From a folder and from a single file; as the exporter reads it where diffusers has no config of the hint encoder."""
    source = load(tiny_sd1)
    unet, folder = source.unet(torch.float32), tiny_sd1_controls["a"]
    [net] = read_controls(source, {"a": folder})
    poisoned = replace(net, network=lambda dtype: pytest.fail("the exporter's reading is used"))
    network, assumed = load_network(folder, poisoned, unet)
    assert assumed == ()
    single = tmp_path / "shuffle.safetensors"
    shutil.copy(folder / "diffusion_pytorch_model.safetensors", single)
    [net] = read_controls(source, {"a": single})
    other, assumed = load_network(single, net, unet)
    assert assumed[0].startswith("ControlNet a is loaded as stepforge reads it: ")
    for key, value in network.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    from diffusers import ControlNetModel

    torch.manual_seed(0)
    whole = ControlNetModel.from_unet(unet)
    whole.save_pretrained(tmp_path / "whole")
    shutil.copy(tmp_path / "whole/diffusion_pytorch_model.safetensors", single)
    poisoned = replace(poisoned, config={"global_pool_conditions": True})
    network, assumed = load_network(single, poisoned, unet)
    assert assumed == ("ControlNet a: residuals are pooled, as its file's name says",)
    assert network.config.global_pool_conditions
    assert torch.equal(network.state_dict()["conv_in.weight"], whole.state_dict()["conv_in.weight"])
