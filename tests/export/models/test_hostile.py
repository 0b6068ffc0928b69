"""Folders and files of the wrong kind, of absurd sizes, or at odds with themselves: one line, before any weight is read."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepforge.export.build import export_bundle
from stepforge.export.cli import parse_experts
from stepforge.export.graph.rewire import Variants
from stepforge.export.models import stored, weights
from stepforge.export.models.controlnet import load_control
from stepforge.export.models.load import load
from stepforge.runtime.errors import CheckpointError

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tiny_sd1: Path, tmp_path: Path) -> Path:
    """A copy of tiny_sd1 to spoil."""
    return Path(shutil.copytree(tiny_sd1, tmp_path / "model"))


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused here is refused from names, types and shapes."""

    def read(*_: Any) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(stored, "read_weights", read)
    monkeypatch.setattr(weights, "read_weights", read)


def edit_json(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}), "utf-8")


def refuse(path: Path, text: str, tokenizer: Path | None = None) -> None:
    with pytest.raises(CheckpointError, match=re.escape(text)) as caught:
        load(path, tokenizer=tokenizer)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("file", "changes", "text"),
    [
        ("model_index.json", {"unet": {"a": 1}}, "gives {'a': 1} for unet; a library and a class are expected"),
        ("model_index.json", {"unet": []}, "gives [] for unet"),
        ("model_index.json", {"unet": ["diffusers", ["UNet2DConditionModel"]]}, "a library and a class are expected"),
        ("model_index.json", {"unet": [None, None]}, "gives [None, None] for unet"),
        ("model_index.json", {"vae": ...}, "does not name the component vae"),
        ("model_index.json", {"a\x1b[31m": ["b", "c"]}, r"unknown component 'a\x1b[31m'"),
        ("model_index.json", {"force_zeros_for_empty_prompt": "false"}, "true or false is expected"),
        ("unet/config.json", {"_use_default_values": ["act_fn"]}, "has _use_default_values, for which diffusers takes"),
        ("model_index.json", {"_use_default_values": []}, "has _use_default_values"),
        ("vae/config.json", {"quantization_config": {"quant_method": "x"}}, "vae has a quantization_config; only floating"),
        ("unet/config.json", {"block_out_channels": "x"}, "block_out_channels is 'x'; a list of positive whole numbers"),
        ("unet/config.json", {"block_out_channels": []}, "block_out_channels is []"),
        ("unet/config.json", {"block_out_channels": [32] * 100}, "lists of at most 16"),
        ("unet/config.json", {"layers_per_block": 10**9}, "asks for 2000000000 layers, the files hold"),
        ("unet/config.json", {"layers_per_block": -1}, "unet"),
        ("unet/config.json", {"layers_per_block": "2"}, "layers_per_block is '2'; whole numbers are expected"),
        ("unet/config.json", {"transformer_layers_per_block": [[10**9, 1], 1]}, "layers, the files hold"),
        ("unet/config.json", {"norm_eps": "small"}, "norm_eps is 'small'; a number is expected"),
        ("unet/config.json", {"norm_eps": float("nan")}, "norm_eps is nan; numbers from"),
        ("unet/config.json", {"act_fn": 3}, "act_fn is 3; a name is expected"),
        ("unet/config.json", {"flip_sin_to_cos": "no"}, "true or false is expected"),
        ("unet/config.json", {"cross_attention_dim": 10**30}, "numbers from -10000000 to 10000000"),
        ("unet/config.json", {"cross_attention_dim": 48}, "attn2.to_k.weight [32, 32] instead of [32, 48]"),
        ("unet/config.json", {"encoder_hid_dim": 64}, "encoder_hid_dim=64, which stepforge does not support"),
        ("unet/config.json", {"sample_size": "64"}, "sample_size is '64'"),
        ("unet/config.json", {"sample_size": [1, 2, 3]}, "sample_size is [1, 2, 3]"),
        ("unet/config.json", {"sample_size": -8}, "each from 1 to 1024"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "unet"),
        ("vae/config.json", {"block_out_channels": {"a": 1}}, "block_out_channels is {'a': 1}"),
        ("vae/config.json", {"latent_channels": 8}, "instead of"),
        ("vae/config.json", {"scaling_factor": "0.18"}, "scaling_factor is '0.18'; a number is expected"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "asks for 1000000000 layers, the files hold"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**6}, "asks for 1000000 layers, the files hold"),
        ("text_encoder/config.json", {"max_position_embeddings": 10**7}, "instead of [10000000, 32]"),
        ("text_encoder/config.json", {"num_attention_heads": 0}, "cannot be built from its config"),
        ("text_encoder/config.json", {"hidden_act": ["gelu"]}, "hidden_act is ['gelu']; a name is expected"),
        ("text_encoder/config.json", {"hidden_size": {"a": 2}}, "hidden_size is {'a': 2}; a number is expected"),
        ("tokenizer/vocab.json", {"cat</w>": 2**31}, "has an id that is no whole number from 0 to 1000000"),
        ("tokenizer/tokenizer_config.json", {"added_tokens_decoder": {"-1": {"content": "x"}}}, "has an id that is no whole"),
        ("text_encoder/config.json", {"layer_norm_eps": "1e-5"}, "a number is expected"),
    ],
)  # fmt: skip
def test_values_of_configs(model: Path, file: str, changes: dict[str, Any], text: str) -> None:
    edit_json(model / file, **changes)
    refuse(model, text)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"[" * 100_000, "nests deeper than 32 levels"),
        (b'{"a":' * 100_000, "nests deeper than 32 levels"),
        (b'{"act_fn": "silu", "act_fn": "gelu"}', "'act_fn' is given twice"),
        (b'{"act_fn": "\xff"}', "it is not UTF-8 text"),
        (b"[]", "does not hold a JSON object"),
        (b"", "is not readable JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not readable JSON"),
        (b" " * ((16 << 20) + 1), "at most 16777216 are read"),
    ],
)
@pytest.mark.parametrize("file", ["model_index.json", "text_encoder/config.json", "tokenizer/vocab.json"])
def test_json(model: Path, file: str, content: bytes, text: str) -> None:
    (model / file).write_bytes(content)
    refuse(model, text)


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        UNET,
        "tokenizer/merges.txt",
        "tokenizer/added_tokens.json",
    ],
)
@pytest.mark.parametrize("kind", ["fifo", "folder", "loop"])
def test_what_is_no_file_is_not_opened(model: Path, file: str, kind: str) -> None:
    """A FIFO without a writer blocks whoever opens it, for ever."""
    path = model / file
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.name)
    if file.endswith("added_tokens.json") and kind == "loop":  # a loop counts as absent, which is usual
        load(model)
        return
    refuse(model, {"fifo": "it is a FIFO, a file was", "folder": "it is a folder, a file was", "loop": path.name}[kind])


def test_single_files_that_are_no_files(tiny_sd1: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    os.mkfifo(path)
    refuse(path, "it is a FIFO, a file was expected", tiny_sd1 / "tokenizer")
    refuse(Path("/dev/zero"), "it is a device, a file was expected", tiny_sd1 / "tokenizer")
    with pytest.raises(CheckpointError, match="it is a FIFO"):
        load_control(path, {}, 8)


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ({"weight_map": []}, "has no weight_map"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": {"conv_in.weight": 3}}, "has no weight_map"),
        ({}, "has no weight_map"),
        (
            {"weight_map": {"conv_in.weight": "a.safetensors"}},
            "names the shard 'a.safetensors', which is not in its folder",
        ),
        ({"weight_map": {"conv_in.weight": "a\n.safetensors"}}, r"names the shard 'a\n.safetensors'"),
    ],
)
def test_indices(model: Path, index: dict[str, Any], text: str) -> None:
    (model / UNET).unlink()
    (model / f"{UNET}.index.json").write_text(json.dumps(index))
    refuse(model, text)


def test_two_shards_with_one_name(model: Path) -> None:
    state = load_file(model / UNET)
    (model / UNET).unlink()
    for shard in ("a.safetensors", "b.safetensors"):
        save_file(state, model / "unet" / shard)
    index = {"weight_map": {key: "a.safetensors" if i else "b.safetensors" for i, key in enumerate(state)}}
    (model / f"{UNET}.index.json").write_text(json.dumps(index))
    refuse(model, "and so does another shard")


def rewritten(path: Path, change: Callable[[str], str]) -> None:
    """A safetensors file with its header's text changed."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    text = change(data[8 : 8 + length].decode()).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_headers(model: Path) -> None:
    original = (model / UNET).read_bytes()
    shape = json.dumps({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
    for change, text in (
        (
            lambda header: '{"conv_in.bias": ' + json.dumps(json.loads(header)["conv_in.bias"]) + "," + header[1:],
            "given twice",
        ),
        (lambda header: header.replace("[32]", "[31]", 1), "not a valid safetensors file"),
        (
            lambda header: header.rstrip()[:-1] + "".join(f',"{i}":{shape}' for i in range(20_001)) + "}",
            "at most 20000",
        ),
        (lambda header: "[" * 100_000, "not a valid safetensors file"),
    ):
        rewritten(model / UNET, change)
        refuse(model, text)
        (model / UNET).write_bytes(original)
    (model / UNET).write_bytes(struct.pack("<Q", 2**40) + original[8:])
    refuse(model, "unet/diffusion_pytorch_model.safetensors")


def test_networks_that_do_not_fit_each_other(model: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    """Each is in order by itself; diffusers would find out while drawing."""
    vocabulary = json.loads((model / "tokenizer/vocab.json").read_text("utf-8"))
    original = dict(vocabulary)
    vocabulary["more</w>"] = len(vocabulary)
    (model / "tokenizer/vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    refuse(model, "different tokens, model/text_encoder knows")
    (model / "tokenizer/vocab.json").write_text(json.dumps(original), "utf-8")
    edit_json(model / "tokenizer/tokenizer_config.json", model_max_length=100)
    refuse(model, "the tokenizer makes 100 tokens, the text encoder takes 77")
    xl = Path(shutil.copytree(tiny_sdxl, tmp_path / "xl"))
    shutil.copytree(model / "unet", xl / "unet", dirs_exist_ok=True)
    refuse(xl, "the text encoders make 32 + 48 numbers a token, the UNet takes 32")


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["bf16"], "bf16"),
        (["bf16", "fp16"], "fp16"),
        (["ema"], "ema"),
        (["ema", "bf16"], "bf16"),
        (["ema", "non_ema"], "several variants, ema, non_ema"),
        ([], "has odd.safetensors, none of it under a known name"),
    ],
)
def test_variants(model: Path, names: list[str], taken: str) -> None:
    """The one that is there, and the source says so; a choice that nobody can make for the user is left to him."""
    for name in names:
        shutil.copy(model / UNET, model / UNET.replace(".safetensors", f".{name}.safetensors"))
    (model / UNET).rename(model / "unet/odd.safetensors")
    if taken not in names:
        refuse(model, taken)
        return
    source = load(model)
    assert f"unet: the weights of the variant {taken}; there are no plain ones" in source.assumed
    assert f"unet/diffusion_pytorch_model.{taken}.safetensors" in source.provenance["sha256"]


@pytest.mark.parametrize(
    ("changes", "size", "said"),
    [
        ({"sample_size": None}, 64, "assumed"),
        ({"sample_size": ...}, 64, "assumed"),
        ({"sample_size": [24, 40]}, [24, 40], ""),
        ({"sample_size": 32, "_diffusers_version": "0.6.0"}, 64, "corrected"),
        ({"sample_size": 32, "_diffusers_version": "0.9.0"}, 32, ""),
        ({"sample_size": 96, "_diffusers_version": "0.6.0"}, 96, ""),
    ],
)
def test_sample_size(model: Path, changes: dict[str, Any], size: Any, said: str) -> None:
    """The size that StableDiffusionPipeline draws without being told one, where it has one."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    edit_json(model / "unet/config.json", **changes)
    source = load(model)
    assert [kind for kind in ("assumed", "corrected") if any(s.startswith("size:") for s in getattr(source, kind))] == [
        said
    ] * bool(said)
    config = source.empty[next(iter(source.empty))]().config
    assert config.sample_size == size
    if said != "assumed":
        unet = UNet2DConditionModel.from_pretrained(model / "unet")
        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor"))
        pipeline = StableDiffusionPipeline(unet=unet, **parts, requires_safety_checker=False)
        assert pipeline.unet.config.sample_size == size


def test_settings_of_xl_and_of_the_vae(tiny_sdxl: Path, tmp_path: Path) -> None:
    """diffusers' inpainting pipeline stops at an aesthetic score that its UNet does not read; the others ignore the key."""
    from diffusers import AutoencoderKL

    xl = Path(shutil.copytree(tiny_sdxl, tmp_path / "xl"))
    edit_json(xl / "model_index.json", requires_aesthetics_score=True)
    edit_json(xl / "vae/config.json", scaling_factor=...)
    source = load(xl)
    assert "vae scaling_factor: the default of diffusers' AutoencoderKL, because vae/config.json states none" in (
        source.assumed
    )
    assert AutoencoderKL.from_config(AutoencoderKL.load_config(xl / "vae")).config.scaling_factor == 0.18215
    edit_json(xl / "model_index.json", _class_name="StableDiffusionXLInpaintPipeline")
    refuse(xl, "requires_aesthetics_score is True; only SDXL's refiner reads an aesthetic score")
    edit_json(xl / "model_index.json", requires_aesthetics_score=False)
    load(xl)


def test_text_encoder_that_was_saved_with_a_projection(model: Path) -> None:
    path = model / "text_encoder/model.safetensors"
    save_file(load_file(path) | {"text_projection.weight": torch.zeros(32, 32)}, path)
    load(model)


def test_numbers_in_names_of_weights(model: Path, tmp_path: Path) -> None:
    """Names number layers; a number without end is no layer."""
    config = json.loads((model / "unet/config.json").read_text("utf-8"))
    for name in ("input_hint_block." + "9" * 5000 + ".weight", "input_blocks.99999999999.0.op.weight"):
        path = tmp_path / "control.safetensors"
        save_file({name: torch.zeros(2), "input_hint_block.0.weight": torch.zeros(2, 3, 3, 3)}, path)
        with pytest.raises(CheckpointError, match="is damaged or of an unknown layout"):
            load_control(path, config, 2)
    prefix = "model.diffusion_model."
    names = (
        "input_blocks.99999999999.0.out_layers.3.weight",
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    )
    state = {prefix + name: torch.zeros(2, 768) for name in names} | {
        prefix + "x.1.proj_in.weight": torch.zeros(2, 2, 1, 1)
    }
    state |= {"first_stage_model.decoder.up.0.block.1.conv1.weight": torch.zeros(1)}
    save_file(state | {"cond_stage_model.transformer.x": torch.zeros(1)}, tmp_path / "m.safetensors")
    refuse(tmp_path / "m.safetensors", "is damaged or of an unknown layout", model / "tokenizer")


def test_names_that_no_manifest_holds(model: Path, tmp_path: Path) -> None:
    """Told before minutes of work: a bundle that says them cannot be read."""
    variant = os.fsdecode(b"unet/diffusion_pytorch_model.\xff.safetensors")
    shutil.copy(model / UNET, model / variant)
    load(model)
    (model / UNET).unlink()
    refuse(model, r"has diffusion_pytorch_model.\udcff.safetensors, none of it under a known name")
    (model / variant).rename(model / UNET)
    for name in ("a\x1b[2J", "a" * 256):
        with pytest.raises(CheckpointError, match="is not allowed; at most 255 printable letters"):
            export_bundle(model, tmp_path / "out", name=name)
    (tmp_path / "link").symlink_to(model.rename(os.fsdecode(os.fsencode(model) + b"\xff")))
    with pytest.raises(CheckpointError, match="link has a name that is not UTF-8; rename it"):
        export_bundle(tmp_path / "link", tmp_path / "out")


def test_a_branch_that_the_network_does_not_have(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="deepcache's branch is 3; this network has 0 to 2"):
        export_bundle(model, tmp_path / "out", reuse=Variants(3))


def test_a_path_that_exists_is_a_path(tmp_path: Path) -> None:
    place = tmp_path / "a@b"
    assert parse_experts([f"x={place}@0.4..1"]) == {"x": (place, ("timesteps", 0.4, 1.0))}
    place.mkdir()
    assert parse_experts([f"x={place}"]) == {"x": (place, None)}
