"""Files in diffusers' layouts, new and old, against its own load_lora_weights() and fuse_lora()."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from stepforge.runtime.bundle import TEXT_ENCODERS

pytestmark = pytest.mark.slow  # the quick lane has three minutes

UNET = dict(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
TEXT = dict(r=2, target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1"])
OLD = (  # layouts before PEFT: attention processors, then .lora.down
    ("to_out.0.", "to_out."), ("attn1.to_", "attn1.processor.to_"), ("attn2.to_", "attn2.processor.to_"),
    ("self_attn.q_proj", "self_attn.to_q"), ("self_attn.k_proj", "self_attn.to_k"),
    ("self_attn.v_proj", "self_attn.to_v"), ("self_attn.out_proj", "self_attn.to_out"),
)  # fmt: skip


def write(model, folder: Path, randomise, *configs, metadata: bool = False) -> Path:
    """One config for each component, in the bundle's order."""
    layers, settings = {}, {}
    for (name, component), options in zip(model.names.items(), configs, strict=False):
        config = LoraConfig(**{"lora_alpha": options["r"], **options})
        state = get_peft_model_state_dict(randomise(get_peft_model(model.copy(component), config)))
        layers[f"{name}_lora_layers"] = {key.removeprefix("base_model.model."): value for key, value in state.items()}
        if metadata:
            settings[f"{name}_lora_adapter_metadata"] = config.to_dict()
    model.pipeline().save_lora_weights(folder, **layers, **settings)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(
    ("unet", "metadata"),
    {
        "plain": ({}, False),
        "ranks": ({"rank_pattern": {"to_q": 2, "attn1.to_k": 6}}, False),
        "convolutions": ({"target_modules": ["conv1", "proj_in", "to_k", "time_emb_proj"]}, False),
        "metadata": ({"lora_alpha": 9, "alpha_pattern": {"to_q": 3, "attn2.to_k": 1.5}}, True),
        "metadata, rank-stabilised": ({"lora_alpha": 9, "use_rslora": True}, True),
        "dora": ({"use_dora": True}, False),
    }.values(),
    ids=lambda value: str(value),
)
def test_sd1(unet, metadata: bool, sd1, randomise, check_fused, tmp_path: Path) -> None:
    text = TEXT | ({"lora_alpha": 5} if metadata else {})
    check_fused(sd1, write(sd1, tmp_path, randomise, UNET | unet, text, metadata=metadata), 1.0, -0.7)


@pytest.mark.parametrize("metadata", [False, True])
def test_sdxl(metadata: bool, xl, randomise, check_fused, tmp_path: Path) -> None:
    """Three components in one file, told apart by their prefixes."""
    alphas = iter([7, 5, 3])
    configs = [options | ({"lora_alpha": next(alphas)} if metadata else {}) for options in (UNET, TEXT, TEXT)]
    check_fused(xl, write(xl, tmp_path, randomise, *configs, metadata=metadata), 1.0, 1.6)


@pytest.mark.parametrize("layout", ["lora.down", "processor", "text_model"])
def test_old_layouts(layout: str, sd1, randomise, check_fused, tmp_path: Path) -> None:
    """They say what the new layout says; diffusers itself reads them so, as far as it still does."""
    new = write(sd1, tmp_path, randomise, UNET, TEXT)
    state = load_file(new)
    if layout == "lora.down":
        old = convert_state_dict_to_diffusers(state)
        assert any(".to_q.lora.down." in key for key in old)
        assert any(".q_proj.lora_linear_layer.up." in key for key in old)
    else:
        old = {}
        for key, value in state.items():
            attention = "attn" in key
            for new_part, old_part in OLD if layout == "processor" else ():
                key = key.replace(new_part, old_part)
            if layout == "processor":
                joint = "_lora." if attention else ".lora_linear_layer."
                key = key.replace(".lora_A.", f"{joint}down.").replace(".lora_B.", f"{joint}up.")
            # transformers had this level in the model until 5.6
            old[key.replace("text_encoder.", "text_encoder.text_model.")] = value
    file = tmp_path / "old.safetensors"
    save_file(old, file)
    ours, same = sd1.read(file), sd1.read(new)
    assert not ours.refused
    assert ours.layers.keys() == same.layers.keys()
    for place, layer in same.layers.items():
        assert ours.layers[place].scale == layer.scale
        for role, tensor in layer.tensors.items():
            assert (ours.layers[place].tensors[role] == tensor).all()
    unet_only = tmp_path / "unet.safetensors"
    save_file({key: value for key, value in old.items() if key.startswith("unet.")}, unet_only)
    check_fused(sd1, unet_only, 0.5)


def test_text_projection(xl, tmp_path: Path) -> None:
    """The largest encoder's projection has a spelling of its own."""
    file = tmp_path / "a.safetensors"
    down, up = torch.randn(2, 48), torch.randn(40, 2)
    save_file(
        {"text_encoder_2.text_projection.lora.down.weight": down, "text_encoder_2.text_projection.lora.up.weight": up},
        file,
    )
    before = dict(xl.pristine[TEXT_ENCODERS[1]].named_parameters())["text_projection.weight"]
    xl.check(file, {0.5: {TEXT_ENCODERS[1]: {"text_projection.weight": (before + 0.5 * up @ down).detach()}}})
