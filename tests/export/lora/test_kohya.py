"""Files in kohya's layout: names against diffusers' converters, values against kohya's merge formula and diffusers."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_text_encoder_lora_key,
    _convert_unet_lora_key,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors.torch import save_file

from stepforge.export.models.networks import modules_of
from stepforge.runtime.bundle import UNET, ComponentId
from stepforge.runtime.errors import AdapterError
from stepforge.runtime.lora.adapter import resolve
from stepforge.runtime.lora.file import Contents, Tensor
from stepforge.runtime.lora.names import Names

SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
RESNET = ("in_layers.2", "out_layers.3", "emb_layers.1")  # sgm's names of its layers
SAMPLES = {  # spelled out from Stability's sgm code
    "input_blocks_0_0": "conv_in",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_4_1_transformer_blocks_1_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
    "middle_block_1_transformer_blocks_9_ff_net_0_proj": "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
    "middle_block_2_out_layers_0": "mid_block.resnets.1.norm2",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks_8_0_in_layers_2": "up_blocks.2.resnets.2.conv1",
    "label_emb_0_2": "add_embedding.linear_2",
    "out_2": "conv_out",
}
SMALL = {"proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out_0", "conv1"}


def test_names_of_sdxl() -> None:
    """Every module of the real SDXL UNet, by sgm's name, is what diffusers makes of that name."""
    with init_empty_weights():
        unet = UNet2DConditionModel(sample_size=128, **SDXL)
    names = Names({UNET: modules_of(unet)})
    for key, path in SAMPLES.items():
        assert names.find(f"lora_unet_{key}") == [(UNET, path)]
    found = set()
    for key in sgm_names(unet):
        ((_, path),) = names.find(f"lora_unet_{key}")
        found.add(path)
        full = f"lora_unet_{key}.lora_down.weight"
        (mapped,) = _maybe_map_sgm_blocks_to_diffusers({full: 0}, unet.config)
        (theirs,) = convert_unet_state_dict_to_peft({_convert_unet_lora_key(mapped): 0})
        assert theirs.replace(".lora.down", "").removesuffix(".weight").removesuffix(".lora_A") == path
    assert found == {module.path for module in modules_of(unet) if module.kind != "norm"}


def sgm_names(unet) -> list[str]:
    """Linear layers and convolutions as kohya names them, walked block by block as sgm builds its UNet."""
    layers, blocks = unet.config.layers_per_block, len(unet.config.block_out_channels)
    found = ["input_blocks_0_0", "out_2", "time_embed_0", "time_embed_2", "label_emb_0_0", "label_emb_0_2"]

    def resnet(at: str, module) -> None:
        found.extend(f"{at}_{name.replace('.', '_')}" for name in RESNET)
        if module.conv_shortcut is not None:
            found.append(f"{at}_skip_connection")

    def transformer(at: str, module) -> None:
        kinds = (torch.nn.Linear, torch.nn.Conv2d)
        found.extend(f"{at}_{n.replace('.', '_')}" for n, m in module.named_modules() if isinstance(m, kinds))

    index = 1
    for level, block in enumerate(unet.down_blocks):
        for layer in range(layers):
            resnet(f"input_blocks_{index}_0", block.resnets[layer])
            if hasattr(block, "attentions"):
                transformer(f"input_blocks_{index}_1", block.attentions[layer])
            index += 1
        if level != blocks - 1:
            found.append(f"input_blocks_{index}_0_op")
            index += 1
    resnet("middle_block_0", unet.mid_block.resnets[0])
    transformer("middle_block_1", unet.mid_block.attentions[0])
    resnet("middle_block_2", unet.mid_block.resnets[1])
    index = 0
    for level, block in enumerate(unet.up_blocks):
        for layer in range(layers + 1):
            resnet(f"output_blocks_{index}_0", block.resnets[layer])
            if hasattr(block, "attentions"):
                transformer(f"output_blocks_{index}_1", block.attentions[layer])
            if layer == layers and level != blocks - 1:
                found.append(f"output_blocks_{index}_{2 if hasattr(block, 'attentions') else 1}_conv")
            index += 1
    return found


@pytest.mark.parametrize(("model", "prefixes"), [("sd1", ["te"]), ("sd2", ["te"]), ("xl", ["te1", "te2"])])
def test_names_of_text_encoders(model: str, prefixes: list[str], request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(model)
    names = Names(model.modules)
    for prefix, component in zip(prefixes, list(model.modules)[1:], strict=True):
        for module in model.modules[component]:
            if module.kind == "norm":
                continue
            path = module.path if module.path == "text_projection" else f"text_model.{module.path}"
            name = f"lora_{prefix}_{path.replace('.', '_')}"
            assert names.find(name) == [(component, module.path)]
            converted = {_convert_text_encoder_lora_key(f"{name}.lora_down.weight", name): 0}
            old = StateDictType.DIFFUSERS_OLD if ".to_" in next(iter(converted)) else StateDictType.DIFFUSERS
            (theirs,) = convert_state_dict_to_peft(converted, original_type=old)
            assert theirs.partition(".lora")[0] == path


def test_the_denoiser_of_an_expert_is_found_by_its_shapes(xl) -> None:
    """A bundle with a base and a refiner: trainers call both "unet", in diffusers' and in Stability's names."""
    base = xl.modules[UNET]
    wider = tuple(replace(m, shape=(2 * m.shape[0], *m.shape[1:])) for m in base)
    refiner = ComponentId("denoiser", "refiner")
    alone, both = Names({refiner: base}), Names({UNET: base, refiner: wider})
    for key in sgm_names(xl.pristine[UNET]):
        ((component, path),) = alone.find(f"lora_unet_{key}")
        assert component == refiner
        assert both.find(f"lora_unet_{key}") == [(UNET, path), (refiner, path)]
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    (rows, columns) = next(m.shape for m in wider if m.path == path)
    for stem in (f"unet.{path}", f"lora_unet_{path.replace('.', '_')}"):
        pair = {"lora_down.weight": np.ones((2, columns)), "lora_up.weight": np.ones((rows, 2))}
        contents = Contents("x", {f"{stem}.{end}": Tensor.of(a.astype(np.float32)) for end, a in pair.items()})
        assert set(resolve(contents, {UNET: base, refiner: wider}).layers) == {(refiner, path)}
        with pytest.raises(AdapterError, match=r"it could mean denoiser/unet or denoiser/refiner"):
            resolve(contents, {UNET: wider, refiner: wider})


def kohya(model, *, only: set[str] = frozenset(), mid: bool = True, alphas=(..., 0, 1, 3.0, 0.25)) -> dict:
    """A pair for each layer of all networks, alphas in turn (... is none); names as sd-scripts writes them."""
    state, alphas = {}, cycle(alphas)
    sgm = {}
    if model.source.family == "sdxl":
        names = Names(model.modules)
        sgm = {names.find(f"lora_unet_{key}")[0][1]: key for key in sgm_names(model.pristine[UNET])}
    encoders = ["te1", "te2"] if model.source.family == "sdxl" else ["te"]
    for modules, prefix in zip(model.modules.values(), ["unet", *encoders], strict=True):
        for module in modules:
            name = (sgm[module.path] if sgm else module.path) if prefix == "unet" and module.kind != "norm" else (
                f"text_model.{module.path}")  # fmt: skip
            name = f"lora_{prefix}_{name.replace('.', '_')}"
            if module.kind == "norm" or (only and not any(name.endswith(f"_{end}") for end in only)):
                continue
            out, inputs, *kernel = module.shape
            rank = 3 + len(state) % 2
            tucker = mid and kernel == [3, 3] and len(state) % 4 != 0
            ones = [1] * len(kernel)
            state[f"{name}.lora_down.weight"] = 0.2 * torch.randn(rank, inputs, *(ones if tucker else kernel))
            state[f"{name}.lora_up.weight"] = 0.2 * torch.randn(out, rank, *ones)
            if tucker:
                state[f"{name}.lora_mid.weight"] = 0.2 * torch.randn(rank, rank, *kernel)
            if (alpha := next(alphas)) is not ...:
                state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


def merged(model, adapter, state: dict, strength: float) -> dict:
    """The formula of sd-scripts' networks/lora.py, `merge_to`, in float64."""
    wanted = {component: dict(network.named_parameters()) for component, network in model.pristine.items()}
    conv = torch.nn.functional.conv2d
    for (component, path), name in adapter.names.items():
        down, up = state[f"{name}.lora_down.weight"].double(), state[f"{name}.lora_up.weight"].double()
        scale = float(state.get(f"{name}.alpha", 0)) / len(down) or 1.0
        if (mid := state.get(f"{name}.lora_mid.weight")) is not None:  # LyCORIS's rebuild of three convolutions
            change = torch.einsum("m n ..., i m, n j -> i j ...", mid.double(), up.flatten(1), down.flatten(1))
        elif down.ndim == 4:
            change = conv(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)
        else:
            change = up @ down
        (key,) = {f"{path}.weight", f"text_model.{path}.weight"} & wanted[component].keys()
        wanted[component][key] = (wanted[component][key].double() + strength * scale * change).detach()
    return wanted


@pytest.mark.parametrize("mid", [False, True])
@pytest.mark.parametrize("name", ["sd1", "sd2", "xl"])
def test_every_layer(name: str, mid: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """All networks of a model in one file, every linear layer and convolution in it, nothing left out."""
    model = request.getfixturevalue(name)
    state, file = kohya(model, mid=mid), tmp_path / "a.safetensors"
    save_file(state, file)
    adapter = model.read(file)
    assert not adapter.refused
    assert set(adapter.layers) == {
        (c, m.path) for c, modules in model.modules.items() for m in modules if m.kind != "norm"
    }
    model.check(file, {strength: merged(model, adapter, state, strength) for strength in (1.0, -0.7)})


@pytest.mark.parametrize("name", ["sd1", "xl"])
def test_against_diffusers(name: str, tmp_path: Path, check_fused, request: pytest.FixtureRequest) -> None:
    """What diffusers reads of it: no Tucker middles, no alpha of 0, one alpha (it loses unequal ones of attentions)."""
    model, file = request.getfixturevalue(name), tmp_path / "a.safetensors"
    state = kohya(model, only=SMALL, mid=False, alphas=(3.0,))
    save_file({key: value for key, value in state.items() if key.startswith("lora_unet_")}, file)
    assert not check_fused(model, file, 1.0, -0.7).refused


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_types(dtype: torch.dtype, sd1, tmp_path: Path) -> None:
    """Numbers of a file are exactly those that it holds, in float32."""
    state = {key: value.to(dtype) for key, value in kohya(sd1, only={"to_q"}, alphas=(3,)).items()}
    save_file(state, tmp_path / "a.safetensors")
    adapter = sd1.read(tmp_path / "a.safetensors")
    for place, layer in adapter.layers.items():
        stored = state[f"{adapter.names[place]}.lora_down.weight"].float().numpy()
        assert (layer.tensors["down"] == stored).all()
        assert layer.scale == 3 / layer.rank
