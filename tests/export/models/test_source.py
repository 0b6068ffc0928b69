"""What is refused and why; and a model gives the same networks from a folder as from a single file."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepforge.export.build import export_bundle
from stepforge.export.models.load import load
from stepforge.export.models.weights import opened
from stepforge.runtime.errors import CheckpointError

Original = Callable[..., Path]
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tiny_sd1: Path, tmp_path: Path) -> Path:
    """A copy of tiny_sd1 to spoil."""
    return Path(shutil.copytree(tiny_sd1, tmp_path / "model"))


def edit_json(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}), "utf-8")


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path)


def refuse(path: Path, text: str) -> None:
    """Loading, or loading one of the networks, gives one line that contains the text."""

    def load_all() -> None:
        source = load(path, tokenizer=None if os.path.isdir(path) else path.parent)
        for loader in (source.unet, source.vae, *source.text_encoders):
            loader(torch.float32)

    with pytest.raises(CheckpointError, match=re.escape(text)) as caught:
        load_all()
    assert "\n" not in str(caught.value)


def test_missing_path(tmp_path: Path) -> None:
    refuse(tmp_path / "nothing", "does not exist")


def test_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    refuse(tmp_path, "no model_index.json")


def test_adapter_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    refuse(tmp_path, "a LoRA adapter, not a model")


def test_code_in_the_folder(model: Path) -> None:
    (model / "unet" / "my_unet.py").write_text("raise SystemExit")
    refuse(model, "contains code (unet/my_unet.py)")


@pytest.mark.parametrize(
    "changes", [{"_class_name": "FluxPipeline"}, {"_class_name": ["a", "b"]}, {"_class_name": ...}]
)
def test_pipeline_class(model: Path, changes: dict[str, Any]) -> None:
    edit_json(model / "model_index.json", **changes)
    refuse(
        model, "supported pipelines: StableDiffusionPipeline, StableDiffusionInpaintPipeline, StableDiffusionXLPipeline"
    )


def test_component_class(model: Path) -> None:
    edit_json(model / "model_index.json", unet=["os", "system"])
    refuse(model, "unet is a 'system'; supported: UNet2DConditionModel")


def test_unknown_component(model: Path) -> None:
    edit_json(model / "model_index.json", helper=["model", "Helper"])
    refuse(model, "unknown component 'helper'")


def test_scheduler_class(model: Path) -> None:
    edit_json(model / "model_index.json", scheduler=["diffusers", "MyScheduler"])
    refuse(model, "scheduler class is 'MyScheduler'; choose one of DDIM")


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_component(model: Path, component: str) -> None:
    shutil.rmtree(model / component)
    refuse(model, f"lacks the component {component}")


def test_damaged_json(model: Path) -> None:
    (model / "unet/config.json").write_text("{")
    refuse(model, "config.json is not readable JSON")


def test_config_of_another_class(model: Path) -> None:
    edit_json(model / "unet/config.json", _class_name="UNet3DConditionModel")
    refuse(model, "expected UNet2DConditionModel")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim=256"),
        ({"in_channels": 8}, "8 input channels for 4 of its output"),
        ({"addition_embed_type": "image"}, "addition_embed_type='image'"),
        ({"down_block_types": ["a", "b"]}, "cannot be built from its config"),
    ],
)
def test_unet_config(model: Path, changes: dict[str, Any], text: str) -> None:
    edit_json(model / "unet/config.json", **changes)
    refuse(model, text)


def test_private_keys_of_configs_are_dropped(model: Path) -> None:
    """CVE-2026-4372: such a key made transformers run code that the config names."""
    for config in ("text_encoder/config.json", "unet/config.json"):
        edit_json(model / config, _attn_implementation_internal="someone/kernel", auto_map={"AutoModel": "x.Y"})
    source = load(model)
    config = source.text_encoders[0](torch.float32).config
    assert config._attn_implementation == "sdpa"
    assert not hasattr(config, "auto_map")
    assert "_attn_implementation_internal" not in source.unet(torch.float32).config


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth", ".pkl"])
def test_pickle_in_a_folder(model: Path, suffix: str) -> None:
    (model / UNET).rename((model / UNET).with_suffix(suffix))
    refuse(model, "only .safetensors weights are read")


def test_pickle_under_another_name(model: Path, tmp_path: Path) -> None:
    (model / UNET).write_bytes(pickle.dumps({"a": 1}))
    refuse(model, "is a pickle file")
    single = tmp_path / "model.safetensors"
    with zipfile.ZipFile(single, "w") as archive:  # what torch.save writes
        archive.writestr("data.pkl", b"")
    refuse(single, "is a pickle file")


@pytest.mark.parametrize("start", [b"\x80", b"PK"])
def test_header_lengths_that_begin_like_pickle(tmp_path: Path, start: bytes) -> None:
    """The first bytes of safetensors are a number; one file in 32 begins with 0x80."""
    path = tmp_path / "model.safetensors"
    for padding in range(0, 40_000, 8):
        save_file({"a": torch.zeros(1)}, path, {"padding": " " * padding})
        if path.read_bytes().startswith(start):
            break
    assert path.read_bytes().startswith(start)
    with opened(path) as file:
        assert list(file.keys()) == ["a"]


@pytest.mark.parametrize("name", [UNET, "unet/config.json", "tokenizer/vocab.json"])
def test_git_lfs_pointers_are_named_as_such(model: Path, name: str) -> None:
    (model / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer, not the weights: run git lfs pull$"):
        export_bundle(model, model.parent / "out")
    assert not (model.parent / "out").exists()


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_casts_are_read_as_their_values(model: Path, kind: torch.dtype) -> None:
    """As diffusers and ComfyUI cast them up. Scales beside them, and whole numbers, are another format."""
    cast = load_file(model / UNET)["conv_in.weight"].to(kind)
    edit_weights(model / UNET, lambda state: state.update({"conv_in.weight": cast}))
    network = load(model).unet(torch.float32)
    assert torch.equal(network.conv_in.weight, cast.float())
    assert network.conv_in.weight.dtype == torch.float32
    edit_weights(model / UNET, lambda state: state.update({"conv_in.scale_weight": torch.ones(1)}))
    refuse(model, "holds scaled weights (conv_in.scale_weight)")


@pytest.mark.parametrize(
    ("kind", "name"), [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.int32, "I32"), (torch.bool, "BOOL")]
)
def test_whole_numbers_are_refused(model: Path, kind: torch.dtype, name: str) -> None:
    edit_weights(model / UNET, lambda state: state.update({"conv_in.weight": state["conv_in.weight"].to(kind)}))
    with pytest.raises(
        CheckpointError, match=f"conv_in.weight is stored as {name}; only floating-point weights are read"
    ):
        load(model)


def test_what_the_system_refuses_is_one_line(tmp_path: Path) -> None:
    refuse(tmp_path / ("long" * 99), "cannot be read: File name too long")
    refuse(Path("/proc/self/mem"), "cannot be read: Input/output error")


@pytest.mark.parametrize("name", ["model.ckpt", "model.gguf"])
def test_single_file_of_another_kind(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    refuse(tmp_path / name, "only .safetensors weights are read")


def test_truncated_weights(model: Path) -> None:
    data = (model / UNET).read_bytes()
    (model / UNET).write_bytes(data[:-10])
    refuse(model, "not a valid safetensors file")


def test_wrong_weights(model: Path) -> None:
    original = (model / UNET).read_bytes()
    edit_weights(model / UNET, lambda state: [state.pop(key) for key in sorted(state)[:5]])
    refuse(model, "and 2 more")
    (model / UNET).write_bytes(original)
    edit_weights(model / UNET, lambda state: state.update(extra=torch.zeros(1)))
    refuse(model, "unexpected weights: extra")
    (model / UNET).write_bytes(original)
    edit_weights(model / UNET, lambda state: state.update({"conv_in.bias": torch.zeros(3)}))
    refuse(model, "conv_in.bias [3] instead of [32]")
    (model / UNET).write_bytes(original)
    edit_weights(model / UNET, lambda state: state["conv_in.bias"].fill_(float("nan")))
    refuse(model, "conv_in.bias holds NaN or infinity")


def test_weights_too_large_for_fp16(model: Path) -> None:
    edit_weights(model / UNET, lambda state: state["conv_in.bias"].fill_(1e5))
    with pytest.raises(CheckpointError, match="NaN or infinity in fp16"):
        load(model).unet(torch.float16)


def test_shards_stay_in_their_folder(model: Path) -> None:
    (model / UNET).rename(model / "stolen.safetensors")
    index = {"weight_map": {"conv_in.bias": "../stolen.safetensors"}}
    (model / f"{UNET}.index.json").write_text(json.dumps(index))
    refuse(model, "which is not in its folder")


def test_variants_shards_and_links(model: Path) -> None:
    """fp16 files, sharded files and the links of a Hugging Face cache hold the same network."""
    expected = load(model).unet(torch.float32).state_dict()
    state = load_file(model / UNET)
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({key: state[key] for key in keys}, model / "unet" / file)
    weight_map = {key: file for file, keys in halves.items() for key in keys}
    (model / f"{UNET}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (model / UNET).unlink()
    source = load(model)
    same(source.unet(torch.float32).state_dict(), expected)
    assert {"unet/a.safetensors", "unet/b.safetensors"} <= source.provenance["sha256"].keys()
    half = model / "unet/diffusion_pytorch_model.fp16.safetensors"
    save_file({key: value.half() for key, value in state.items()}, model.parent / "blob")
    half.symlink_to(model.parent / "blob")
    loaded = load(model).unet(torch.float32).state_dict()
    assert all(torch.allclose(loaded[key], expected[key], atol=1e-2) for key in expected)
    assert all(value.dtype == torch.float32 for value in loaded.values())


def test_old_attention_names_of_the_vae(model: Path) -> None:
    """As the VAE of SD 1.5 was saved in 2022."""
    path = model / "vae/diffusion_pytorch_model.safetensors"
    expected = load(model).vae(torch.float32).state_dict()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(state: dict[str, torch.Tensor]) -> None:
        for key in list(state):
            for new, name in old.items():
                if f".attentions.0.{new}." in key:
                    state[key.replace(new, name)] = state.pop(key)

    edit_weights(path, rename)
    assert any(".query." in key for key in load_file(path))
    same(load(model).vae(torch.float32).state_dict(), expected)


def test_text_encoder_with_and_without_prefix(model: Path) -> None:
    path = model / "text_encoder/model.safetensors"
    expected = load(model).text_encoders[0](torch.float32).state_dict()
    for prefix in ("", "text_model."):
        edit_weights(path, lambda state, prefix=prefix: [
            state.update({prefix + key.removeprefix("text_model."): state.pop(key)}) for key in list(state)
        ])  # fmt: skip
        same(load(model).text_encoders[0](torch.float32).state_dict(), expected)


# Single files


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("family", ["tiny_sd1", "tiny_sd2v", "tiny_sdxl"])
def test_single_file(family: str, to_original: Original, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Equal weights, and equal settings wherever they change what a network computes."""
    folder = request.getfixturevalue(family)
    a = load(folder)
    b = load(to_original(folder, tmp_path / "m.safetensors"), tokenizer=folder / "tokenizer")
    assert a.family == b.family == family.removeprefix("tiny_").removesuffix("v")
    assert a.force_zeros_for_empty_prompt == b.force_zeros_for_empty_prompt
    assert a.scheduler["prediction_type"] == b.scheduler["prediction_type"]
    assert b.provenance["sha256"].keys() == {"m.safetensors"}
    for one, other in zip((a.unet, a.vae, *a.text_encoders), (b.unet, b.vae, *b.text_encoders), strict=True):
        # Copies, as the two files place the weights at other addresses: torch sums unaligned ones in another order (1e-6)
        left, right = deepcopy(one(torch.float32)), deepcopy(other(torch.float32))
        same(right.state_dict(), left.state_dict())
        with torch.no_grad():
            assert torch.equal(output(left), output(right))


def output(network: Any) -> torch.Tensor:
    torch.manual_seed(0)
    if hasattr(network, "decode"):
        return network.decode(torch.randn(1, 4, 8, 8)).sample
    if hasattr(network.config, "vocab_size"):
        result = network(torch.arange(77)[None], output_hidden_states=True)
        pooled = result.text_embeds if hasattr(network, "text_projection") else result.last_hidden_state
        return torch.cat([result.hidden_states[-2].flatten(), pooled.flatten()])
    added = {"text_embeds": torch.randn(1, 40), "time_ids": torch.randn(1, 6)}
    context = torch.randn(1, 77, network.config.cross_attention_dim)
    return network(torch.randn(1, 4, 8, 8), torch.tensor([5.0]), context, added_cond_kwargs=added).sample


def test_single_file_needs_a_tokenizer(tiny_sd1: Path, to_original: Original, tmp_path: Path) -> None:
    path = to_original(tiny_sd1, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="pass --tokenizer DIR"):
        load(path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        load(path, tokenizer=tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is a folder and has its own tokenizer"):
        load(tiny_sd1, tokenizer=tiny_sd1 / "tokenizer")


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("lora_unet_mid_block.lora_down.weight", "is a LoRA adapter"),
        ("unet.mid_block.attentions.0.to_q.lora_A.weight", "is a LoRA adapter"),
        ("conv_in.weight", "has no model.diffusion_model.* weights"),
        ("model.diffusion_model.input_blocks.0.0.weight", "lacks the component vae"),
        ("model_ema.diffusion_modelinput_blocks00weight", "has a UNet only as averaged weights (model_ema.*)"),
    ],
)
def test_single_file_that_is_no_model(tmp_path: Path, key: str, text: str) -> None:
    save_file({key: torch.zeros(4, 4)}, tmp_path / "m.safetensors")
    refuse(tmp_path / "m.safetensors", text)


def test_single_file_lacks_weights(tiny_sd1: Path, to_original: Original, tmp_path: Path) -> None:
    path = to_original(tiny_sd1, tmp_path / "m.safetensors")
    edit_weights(path, lambda state: state.pop("model.diffusion_model.middle_block.2.out_layers.3.weight"))
    refuse(path, "lacks mid_block.resnets.1.conv2.weight")


def test_tokenizer_longer_than_the_encoder(model: Path, tmp_path: Path) -> None:
    edit_json(model / "tokenizer/tokenizer_config.json", model_max_length=100)
    with pytest.raises(CheckpointError, match="makes 100 tokens, the text encoder takes 77"):
        export_bundle(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
