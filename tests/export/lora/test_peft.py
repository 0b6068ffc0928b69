"""Files that PEFT writes, against its merge_and_unload()."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from stepforge.runtime.bundle import TEXT_ENCODERS, UNET, ComponentId

# PEFT warns of the one-dimensional biases that it writes itself, and of biases that stay when adapters are disabled
pytestmark = [pytest.mark.filterwarnings("ignore:Adapter 'default'"), pytest.mark.filterwarnings("ignore:Careful")]

STRENGTHS = (1.0, 0.5, -0.7, 1.6)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv_in", "conv_out", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
CASES: dict[str, dict[str, Any]] = {
    "attention": dict(r=4, lora_alpha=8, target_modules=ATTENTION),
    "alpha 0.3 rank 3": dict(r=3, lora_alpha=0.3, target_modules=["ff.net.0.proj", "ff.net.2", "to_q"]),
    "convolutions": dict(r=4, lora_alpha=2, target_modules=[*CONVOLUTIONS, "proj_in", "proj_out"]),
    "time": dict(r=2, lora_alpha=4, target_modules=["time_emb_proj", "linear_1", "linear_2"]),
    "patterns": dict(
        r=4, lora_alpha=8, target_modules=[*ATTENTION, "conv1"],
        rank_pattern={"attn2.to_q": 2, r".*up_blocks.*to_k": 6, "to_out.0": 3},
        alpha_pattern={
            r"(down|mid)_blocks?\.\d\.?.*to_q": 3, "attn1.to_q": 5, "to_q": 7, r"attn[12]\.to_v": 1,
            "down_blocks.0.resnets.0.conv1": 9,
        },
    ),
    "rank-stabilised": dict(r=4, lora_alpha=8, use_rslora=True, target_modules=[*ATTENTION, "conv2"]),
    "rank-stabilised patterns": dict(
        r=4, lora_alpha=8, use_rslora=True, target_modules=ATTENTION, rank_pattern={"to_q": 2}, alpha_pattern={"to_k": 3}
    ),
    "dora": dict(r=4, lora_alpha=8, use_dora=True, target_modules=[*ATTENTION, "ff.net.2"]),
    "dora convolutions": dict(r=2, lora_alpha=3, use_dora=True, target_modules=[*CONVOLUTIONS, "proj_in"]),
    "dora and biases": dict(r=2, lora_alpha=3, use_dora=True, bias="lora_only", target_modules=["to_out.0", "conv1"]),
    "lora_bias": dict(r=4, lora_alpha=8, lora_bias=True, target_modules=["to_out.0", "conv1", "proj_in"]),
    "bias all": dict(r=4, lora_alpha=8, bias="all", target_modules=[*ATTENTION, "conv1"]),
    "bias lora_only": dict(r=4, lora_alpha=8, bias="lora_only", target_modules=[*ATTENTION, "conv1"]),
}  # fmt: skip
TEXT: dict[str, dict[str, Any]] = {
    "text": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "out_proj", "fc1", "fc2"]),
    "text patterns": dict(
        r=4, lora_alpha=8, target_modules=["q_proj", "fc1"], alpha_pattern={r"layers\.[01]\..*q_proj": 3, "fc1": 2}
    ),
    "text dora": dict(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "fc2"]),
}


def check(model, component, options, strengths, folder, randomise) -> None:
    wrapped = randomise(get_peft_model(model.copy(component), LoraConfig(**options)))
    wrapped.save_pretrained(folder)
    wanted = {}
    for strength in strengths:
        theirs = copy.deepcopy(wrapped)
        for module in theirs.modules():
            if isinstance(module, LoraLayer):
                module.scale_layer(strength)
        wanted[strength] = {component: dict(theirs.merge_and_unload().named_parameters())}
    model.check(folder, wanted)


@pytest.mark.parametrize("case", CASES)
def test_unet(case: str, sd1, randomise, tmp_path: Path) -> None:
    strengths = STRENGTHS if case in ("attention", "dora", "dora convolutions", "lora_bias") else (1.0, -0.7)
    check(sd1, UNET, CASES[case], strengths, tmp_path, randomise)


@pytest.mark.parametrize("component", TEXT_ENCODERS, ids=str)
@pytest.mark.parametrize("case", TEXT)
def test_text_encoders(case: str, component: ComponentId, xl, randomise, tmp_path: Path) -> None:
    check(xl, component, TEXT[case], (1.0, -0.7), tmp_path, randomise)


def test_text_projection(xl, randomise, tmp_path: Path) -> None:
    check(xl, TEXT_ENCODERS[1], dict(r=2, target_modules=["text_projection", "k_proj"]), (1.6,), tmp_path, randomise)


@pytest.mark.parametrize("name", ["sd2", "xl"])
def test_linear_projections(name: str, randomise, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    options = dict(r=2, lora_alpha=5, target_modules=["proj_in", "to_k", "conv_shortcut"])
    check(request.getfixturevalue(name), UNET, options, (0.5,), tmp_path, randomise)


def test_file_in_the_folder(sd1, randomise, tmp_path: Path) -> None:
    """The file itself is read with the settings beside it."""
    wrapped = randomise(get_peft_model(sd1.copy(TEXT_ENCODERS[0]), LoraConfig(r=2, target_modules=["q_proj"])))
    wrapped.save_pretrained(tmp_path)
    wanted = dict(wrapped.merge_and_unload().named_parameters())
    sd1.check(tmp_path / "adapter_model.safetensors", {1.0: {TEXT_ENCODERS[0]: wanted}})


def test_modules_to_save(sd1, randomise, tmp_path: Path) -> None:
    """Whole weights are no change of the model's: they are left out, with the reason; all else is merged."""
    config = LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv_in"])
    randomise(get_peft_model(sd1.copy(), config)).save_pretrained(tmp_path)
    adapter = sd1.read(tmp_path)
    assert list(adapter.refused) == ["base_model.model.conv_in"]
    assert "modules_to_save" in adapter.refused["base_model.model.conv_in"]
    assert {path.rpartition(".")[2] for _, path in adapter.layers} == {"to_q"}
