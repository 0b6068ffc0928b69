"""LoRA as inputs of a compiled engine: parity with PEFT and with merging, rows that differ, slots, refusals."""

import json
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.numpy import save_file

from stepforge import AdapterError, BackendError, CheckpointError, GenerationError, Request, RequestError, load
from stepforge.export.build import export_bundle
from stepforge.export.lora.merge import read_all, with_adapters
from stepforge.export.models.load import load as load_model
from stepforge.export.parity.loaders import source_pipeline
from stepforge.export.parity.measures import psnr
from stepforge.export.parity.reference import run_reference
from stepforge.export.parity.verify import verify
from stepforge.runtime.bundle import UNET, sha256
from stepforge.runtime.cli.main import main
from stepforge.runtime.engine import Engine

CPU = [("openvino", "fp32"), ("openvino", "bf16")]
CPU += [
    pytest.param(*other, marks=pytest.mark.slow)
    for other in (("onnxruntime", "fp32"), ("torch", "fp32"), ("torch-exact", "bf16"))
]
BACKENDS = [
    "openvino",
    *(pytest.param(name, marks=[pytest.mark.slow, pytest.mark.long]) for name in ("onnxruntime", "torch")),
]
LAYERS = r".*(to_[qkv]|to_out\.0|net\.0\.proj|net\.2|proj_in|proj_out|conv[12]?|conv_shortcut|time_emb_proj|linear_1)"
TEXT = r".*(q_proj|v_proj|out_proj|fc1|fc2)"


def make_adapter(model: Path, out: Path, seed: int, *, rank: int = 4, scale: float = 0.15, text: bool = True) -> Path:
    """A random LoRA of the UNet, and of the text encoders, as diffusers saves it."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    source = load_model(model)
    torch.manual_seed(seed)
    states = {}
    networks = {"unet": (source.unet, LAYERS)}
    if text:
        names = ["text_encoder", "text_encoder_2"]
        networks |= {name: (make, TEXT) for name, make in zip(names, source.text_encoders, strict=False)}
    for name, (make, targets) in networks.items():
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False)
        network = get_peft_model(make(torch.float32), config)
        for key, value in network.named_parameters():
            if "lora_" in key:
                value.data.normal_().mul_(scale)
        state = get_peft_model_state_dict(network)
        state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
        states[name] = state if name == "unet" else convert_state_dict_to_diffusers(state)
    StableDiffusionPipeline.save_lora_weights(
        out.parent,
        unet_lora_layers=states["unet"],
        text_encoder_lora_layers=states.get("text_encoder"),
        weight_name=out.name,
    )
    return out


@pytest.fixture(scope="module")
def files(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(tiny_sd1, folder / f"{name}.safetensors", seed, rank=rank, text=seed != 2)
        for seed, (name, rank) in enumerate([("a", 4), ("b", 3), ("c", 4), ("d", 2)])
    }


def open_engine(bundle: Path, files: dict[str, Path], backend: str, precision: str = "fp32", **options: int) -> Engine:
    try:
        engine = load(bundle, backend=backend, precision=precision, **options)
    except BackendError as error:
        if "no native bf16" not in str(error):
            raise
        pytest.skip("this processor has no native bf16")
    for name, file in files.items():
        engine.adapters.load(name, file)
    return engine


def ask(seed: int = 0, **options: object) -> Request:
    common = {"prompt": "a cat and a dog", "steps": 4, "guidance": 3.0, "width": 32, "height": 32}
    return Request(**{**common, "seed": seed, **options})


FEW = {"steps": 2, "width": 16, "height": 16}  # PyTorch computes bf16 slowly on a processor
OWN = {"width": None, "height": None}  # size of the model, at which the reference runs


@pytest.mark.parametrize(("backend", "precision"), CPU)
def test_back_and_forth_gives_the_first_image_bit_for_bit(tiny_sd1_banks, files, backend, precision):
    with open_engine(tiny_sd1_banks, files, backend, precision) as engine:
        first = engine.generate(ask(**FEW, adapters={"a": 0.8})).latents
        plain = engine.generate(ask(**FEW)).latents
        for others in ({"b": 1.0}, {"c": 1.0}, {"d": -1.0}, {"b": 0.3, "c": 0.5}):  # more sets than slots
            assert np.abs(engine.generate(ask(**FEW, adapters=others)).latents - first).max() > 1e-2
        assert np.array_equal(engine.generate(ask(**FEW, adapters={"a": 0.8})).latents, first)
        assert np.array_equal(engine.generate(ask(**FEW)).latents, plain)
        assert np.array_equal(engine.generate(ask(**FEW, adapters={"a": 0.0})).latents, plain)


def test_banks_say_which_slot_was_filled(tiny_sd1_banks, files):
    """What a backend with memory of its own goes by."""
    with open_engine(tiny_sd1_banks, files, "onnxruntime") as engine:
        banks = engine.adapters.banks(UNET)
        some = banks.only({"conv_in.lora_A"})
        assert list(some) == ["conv_in.lora_A"]
        engine.generate(ask(steps=1))
        assert some.versions.tolist() == [0, 0, 0, 0]
        for name in ("a", "b", "a"):
            engine.generate(ask(steps=1, adapters={name: 1.0}))
        assert some.versions.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_slot_zero_is_the_model_without_banks(tiny_sd1_bundle, tiny_sd1_banks, files, backend):
    """Same arithmetic, but engines sum in another order where the bank stops a fusion: 1e-6 a network, over 4 steps."""
    with (
        load(tiny_sd1_bundle, backend=backend, precision="fp32") as plain,
        open_engine(tiny_sd1_banks, files, backend) as banked,
    ):
        banked.generate(ask(adapters={"a": 1.0}))
        assert np.abs(plain.generate(ask()).latents - banked.generate(ask()).latents).max() < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mixed_batch_equals_single_runs(tiny_sd1_banks, files, backend):
    requests = [
        ask(0, adapters={"a": 0.8}),
        ask(1, adapters={"b": 1.0}, sampler="euler", steps=6),
        ask(2),
        ask(3, adapters={"a": -0.5}, sampler="dpmpp_2m", steps=5),
        ask(4, adapters={"c": 1.2}, sampler="euler_a", guidance=1.0),
        ask(5, adapters={"a": 0.4, "b": 0.6}, sampler="ddim"),
        ask(6, adapters={"b": 0.3}, prompt="a dog"),
        ask(7, adapters={"c": 0.7}, adapter_schedule=[1.0, 0.5, 0.0, -1.0], sampler="ddim"),
    ]
    with open_engine(tiny_sd1_banks, files, backend, max_rows=16) as engine:
        together = engine.generate(requests)
        for request, result in zip(requests, together, strict=True):
            # MKL sums by the number of rows, so there the limit is of the largest latent, 18 to 26
            limit = 2.5e-6 * np.abs(result.latents).max() if backend.startswith("torch") else 1e-5
            assert np.abs(engine.generate(request).latents - result.latents).max() <= limit


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_bank_and_merge_and_peft_agree(tiny_sd1, tiny_sd1_banks, files):
    """Three ways, one image: PSNR of at least 60 dB in fp32 against diffusers with PEFT's layers, unmerged. Two adapters of
    unequal rank; one alone takes the same way."""
    adapters = {"a": 0.7, "b": -0.6}
    with open_engine(tiny_sd1_banks, files, "onnxruntime") as engine:
        bundle = engine.bundle
        ours = engine.generate(ask(**OWN, prompt_syntax="plain", adapters=adapters))
    source = load_model(tiny_sd1)
    pipeline = source_pipeline(source)
    for name in adapters:
        pipeline.load_lora_weights(files[name].parent, weight_name=files[name].name, adapter_name=name)
    pipeline.set_adapters(list(adapters), list(adapters.values()))
    reference = run_reference(pipeline, "a cat and a dog", bundle, 4, 3.0, 0)
    assert psnr(np.asarray(ours.images[0]), reference.image) >= 60
    merged = with_adapters(source, read_all(source, [(files[name], m) for name, m in adapters.items()]))
    assert (
        psnr(run_reference(source_pipeline(merged), "a cat and a dog", bundle, 4, 3.0, 0).image, reference.image) >= 60
    )


@pytest.mark.slow
@pytest.mark.long  # an export of its own; above, merged weights in diffusers' network
def test_merged_export_equals_the_bank(tiny_sd1, tiny_sd1_banks, files, tmp_path):
    export_bundle(tiny_sd1, tmp_path / "merged", loras=[(files["a"], 0.8), (files["b"], 0.5)])
    with (
        load(tmp_path / "merged", backend="onnxruntime") as merged,
        open_engine(tiny_sd1_banks, files, "onnxruntime") as banks,
    ):
        one, two = merged.generate(ask()), banks.generate(ask(adapters={"a": 0.8, "b": 0.5}))
    assert psnr(np.asarray(one.images[0]), np.asarray(two.images[0])) >= 60
    with pytest.raises(
        CheckpointError, match=r"other adapters; verify it with --lora a.safetensors:0.8 --lora b.safet"
    ):
        verify(tmp_path / "merged", tiny_sd1)
    options = {"backends": ["onnxruntime"], "precisions": ["fp32"], "prompts": ["a cat"], "steps": 3}
    assert verify(tmp_path / "merged", tiny_sd1, loras=[(files["a"], 0.8), (files["b"], 0.5)], **options)["passed"]


def test_sdxl_with_both_text_encoders(tiny_sdxl, tiny_sdxl_banks, tmp_path):
    file = make_adapter(tiny_sdxl, tmp_path / "xl.safetensors", 7, text=False)
    with open_engine(tiny_sdxl_banks, {"xl": file}, "onnxruntime") as engine:
        bundle = engine.bundle
        ours = engine.generate(ask(**OWN, prompt_syntax="plain", adapters={"xl": 0.9}))
    pipeline = source_pipeline(load_model(tiny_sdxl))
    pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name="xl")
    pipeline.set_adapters(["xl"], [0.9])
    assert psnr(np.asarray(ours.images[0]), run_reference(pipeline, "a cat and a dog", bundle, 4, 3.0, 0).image) >= 60


def test_text_encoder_adapters_touch_their_own_prompt_only(tiny_sd1_banks, files):
    with open_engine(tiny_sd1_banks, files, "onnxruntime") as engine:
        alone = engine.generate(ask())
        with_text, without, _ = engine.generate([ask(adapters={"a": 1.0}), ask(), ask(adapters={"c": 1.0})])
        assert np.array_equal(without.latents, alone.latents)
        assert with_text.stats.rows["text_encoder"] == 2
        assert engine.generate(ask(adapters={"c": 1.0})).stats.rows["text_encoder"] == 0  # "c" changes the UNet only


@pytest.mark.slow
def test_more_sets_than_slots_wait(tiny_sd1_banks, files):
    sets = [{"a": 1.0}, {"b": 1.0}, {"c": 1.0}, {"d": 1.0}, {"a": 0.5, "d": 0.5}, {}]
    with open_engine(tiny_sd1_banks, files, "onnxruntime", max_rows=16) as engine:
        expected = [engine.generate(ask(index, adapters=chosen)).latents for index, chosen in enumerate(sets)]
        results = engine.generate([ask(index, adapters=chosen) for index, chosen in enumerate(sets)] * 2)
        for index, result in enumerate(results):
            assert np.abs(result.latents - expected[index % len(sets)]).max() <= 1e-5


@pytest.mark.slow
def test_adapters_come_and_go_while_others_run(tiny_sd1_banks, files):
    with open_engine(tiny_sd1_banks, {"a": files["a"]}, "onnxruntime") as engine:
        expected = engine.generate(ask(steps=20, adapters={"a": 1.0})).latents
        started = threading.Event()
        running = [engine.submit(ask(steps=20, adapters={"a": 1.0}), on_step=lambda _: started.set()) for _ in range(3)]
        started.wait(60)
        engine.adapters.unload("a")
        with pytest.raises(RequestError, match="no adapter named 'a' is loaded; none is"):
            engine.submit(ask(adapters={"a": 1.0}))
        engine.adapters.load("a", files["b"])  # another file of the same name is another adapter
        other = engine.generate(ask(steps=20, adapters={"a": 1.0})).latents
        for future in running:
            assert np.array_equal(future.result().latents, expected)
        assert np.abs(other - expected).max() > 1e-2


def test_a_slot_that_could_not_be_filled_harms_only_its_request(tiny_sd1_banks, files, monkeypatch):
    with open_engine(tiny_sd1_banks, {"a": files["a"], "b": files["b"]}, "onnxruntime") as engine:
        expected = engine.generate(ask(adapters={"a": 1.0})).latents
        buffers = engine.adapters._banks[UNET]
        with monkeypatch.context() as broken:
            broken.setattr(buffers, "fill", lambda *_: 1 / 0)
            bad, good = engine.submit(ask(adapters={"b": 1.0})), engine.submit(ask(adapters={"a": 1.0}))
            with pytest.raises(GenerationError, match="ZeroDivisionError"):
                bad.result(60)
            assert np.array_equal(good.result(60).latents, expected)
        assert np.abs(engine.generate(ask(adapters={"b": 1.0})).latents - expected).max() > 1e-2


def test_refusals(tiny_sd1, tiny_sd1_bundle, tiny_sd1_banks, files, tmp_path):
    with load(tiny_sd1_bundle, backend="onnxruntime") as engine, pytest.raises(AdapterError, match="--lora-slots"):
        engine.adapters.load("a", files["a"])
    chosen = {name: files[name] for name in "abd"}
    with open_engine(tiny_sd1_banks, chosen, "onnxruntime") as engine:
        assert list(engine.adapters.list()) == ["a", "b", "d"]
        with pytest.raises(AdapterError, match="'a' is loaded"):
            engine.adapters.load("a", files["b"])
        with pytest.raises(AdapterError, match="no adapter named 'x'"):
            engine.adapters.unload("x")
        with pytest.raises(RequestError, match="rank 9 together; the bundle's banks hold 8"):
            engine.submit(ask(adapters={"a": 1.0, "b": 1.0, "d": 1.0}))
        with pytest.raises(RequestError, match="adapter_schedule has 2 numbers for 4"):
            engine.submit(ask(sampler="ddim", adapters={"a": 1.0}, adapter_schedule=[1, 0]))
        infinite = {"lora_unet_conv_in.lora_down.weight": np.full((1, 4, 3, 3), 1e30, np.float32),
                    "lora_unet_conv_in.lora_up.weight": np.full((32, 1, 1, 1), 1e30, np.float32),
                    "lora_unet_conv_in.alpha": np.array(1e30, np.float32)}  # fmt: skip
        save_file(infinite, tmp_path / "infinite.safetensors")
        with warnings.catch_warnings(action="error"), pytest.raises(AdapterError, match="conv_in is infinite once it"):
            engine.adapters.load("x", tmp_path / "infinite.safetensors")
        with pytest.raises(AdapterError, match="rank 12, the bank holds 8"):
            engine.adapters.load("c", make_adapter(tiny_sd1, tmp_path / "big.safetensors", 1, rank=12))
        assert list(engine.adapters.list()) == ["a", "b", "d"]


def test_the_command_line_takes_requests_with_their_own_adapters(tiny_sd1_banks, files, tmp_path, capsys):
    lines = [{"prompt": "a cat"}, {"prompt": "a cat", "adapters": {"style": 1.0, "b": 0.5}, "seed": 3}]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    arguments = ["generate", tiny_sd1_banks, "--requests", tmp_path / "requests.jsonl", "--steps", 2, "--backend",
                 "onnxruntime", "--adapter", f"style={files['a']}:0.7", "--adapter", files["b"], "-o", tmp_path / "out",
                 "--json"]  # fmt: skip
    with pytest.raises(SystemExit) as done:
        main(list(map(str, arguments)))
    assert done.value.code == 0
    with Image.open(json.loads(capsys.readouterr().out)[1]["files"][0]) as picture:
        notes = json.loads(picture.info["stepforge"])
    assert (notes["adapters"], notes["seed"]) == ({"style": 1.0, "b": 0.5}, 3)
    assert notes["adapter_files"]["style"] == sha256(files["a"])
    for line in ("[1]", '{"prompt": "x", "stepps": 3}', '{"prompt": "x", "steps": 0}', "{"):
        (tmp_path / "requests.jsonl").write_text(f"\n{line}\n")
        with pytest.raises(SystemExit) as done:
            main(list(map(str, [*arguments, "--overwrite"])))
        assert done.value.code == 2
        assert "line 2:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": ["a"]}, "give names and strengths"),
        ({"adapters": {"a": "strong"}}, "strength of adapter 'a'"),
        ({"adapters": {"a": float("nan")}}, "strength of adapter 'a'"),
        ({"adapters": {"a": 1e9}}, "from -100 to 100"),
        ({"adapter_schedule": []}, "adapter_schedule"),
        ({"adapter_schedule": [1.0, "x"]}, "adapter_schedule"),
    ],
)
def test_bad_requests(options, message):
    with pytest.raises(RequestError, match=message):
        ask(**options)
