"""A ControlNet gives the same residuals from every layout; what is no ControlNet for the model is refused, and why."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepforge.export.models.controlnet import load_control
from stepforge.export.models.ldm_names import diffusers_names
from stepforge.export.models.load import load
from stepforge.runtime.errors import CheckpointError

WEIGHTS = "diffusion_pytorch_model.safetensors"
SCALE = 2  # pixels per latent of the hint encoders below
HINT = (8, 16)  # channels of the hint encoders
SD: dict[str, Any] = {"cross_attention_dim": 32, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
SD |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": SD | {"attention_head_dim": 8},
    "sd2": SD | {"attention_head_dim": [1, 2], "use_linear_projection": True, "layers_per_block": 2},
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2],
        "cross_attention_dim": 80,
        "attention_head_dim": [1, 2],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 40 + 6 * 8,
    },
}


Case = tuple[Any, dict[str, Any]]  # a ControlNet, and the config of the UNet that it controls


def build(family: str, hint: tuple[int, ...] = HINT, **options: Any) -> Case:
    from diffusers import ControlNetModel, UNet2DConditionModel

    torch.manual_seed(sum(family.encode()))
    common = {"sample_size": 32, "block_out_channels": (32, 64), "layers_per_block": 1}
    unet = UNet2DConditionModel(**{**common, **UNETS[family]})
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=hint)
    if options:
        net = ControlNetModel(**{**net.config, **options})
    with torch.no_grad():  # the output convolutions are zero when fresh: nothing would be seen through them
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net.eval(), dict(unet.config)


@pytest.fixture(scope="module", params=UNETS)
def case(request: pytest.FixtureRequest) -> Case:
    return build(request.param)


@pytest.fixture(scope="module")
def sd1() -> Case:
    return build("sd1")


def residuals(net: Any, hint_scale: int = SCALE) -> list[torch.Tensor]:
    """All outputs for one fixed input, two rows."""
    config = net.config
    draw = torch.Generator().manual_seed(7)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    extra = None
    if config.addition_embed_type:
        text = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        extra = {"text_embeds": noise(2, text), "time_ids": noise(2, 6).abs() * 64}
    with torch.no_grad():
        down, middle = net(
            noise(2, 4, 8, 12), torch.tensor([7, 801]), noise(2, 5, config.cross_attention_dim),
            noise(2, 3, 8 * hint_scale, 12 * hint_scale).abs(), added_cond_kwargs=extra, return_dict=False,
        )  # fmt: skip
    return [*down, middle]


def equal(path: Path, case: Case, scale: int = SCALE) -> Any:
    """The ControlNet at the path is that of the case, bit for bit."""
    net, base = case
    loaded = load_control(path, base, scale).network(torch.float32)
    assert not loaded.training
    ours, theirs = residuals(loaded, scale), residuals(net, scale)
    assert len(ours) == len(theirs) == len(net.controlnet_down_blocks) + 1
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
        assert other.std() > 0.01
    return loaded


def save_single(path: Path, state: dict[str, torch.Tensor]) -> Path:
    save_file({key: value.contiguous().clone() for key, value in state.items()}, path)
    return path


RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
TOP = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "controlnet_mid_block": "middle_block_out.0",
}  # fmt: skip


def original(net: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """The weights in the layout of the original repository (cldm.py), for levels of layers_per_block blocks."""
    last_hint = 2 * len(net.controlnet_cond_embedding.blocks) + 2
    level_size = net.config.layers_per_block + 1  # its blocks and the one that halves
    state = {}
    for key, value in net.state_dict().items():
        module, _, leaf = key.rpartition(".")
        part, *rest = module.split(".")
        if module in TOP:
            name = TOP[module]
        elif part == "controlnet_down_blocks":
            name = f"zero_convs.{rest[0]}.0"
        elif part == "controlnet_cond_embedding":
            place = {"conv_in": 0, "conv_out": last_hint}.get(rest[0])
            name = f"input_hint_block.{2 * int(rest[1]) + 2 if place is None else place}"
        elif part == "mid_block":
            number = 1 if rest[0] == "attentions" else 2 * int(rest[1])
            name = ".".join([f"middle_block.{number}", RESNET.get(rest[2], rest[2]), *rest[3:]])
        elif rest[1] == "downsamplers":
            name = f"input_blocks.{(int(rest[0]) + 1) * level_size}.0.op"
        else:
            block = int(rest[0]) * level_size + int(rest[2]) + 1
            inner = [RESNET.get(rest[3], rest[3]), *rest[4:]]
            name = ".".join([f"input_blocks.{block}.{int(rest[1] == 'attentions')}", *inner])
        state[f"{prefix}{name}.{leaf}"] = value
    return state


# The same network from every layout


def test_folder(case: Case, tmp_path: Path) -> None:
    case[0].save_pretrained(tmp_path / "canny")
    equal(tmp_path / "canny", case)
    source = load_control(tmp_path / "canny", case[1], SCALE)
    assert source.name == "canny"
    assert source.provenance["kind"] == "diffusers"
    assert source.provenance["file"] == "canny"
    assert list(source.provenance["sha256"]) == [WEIGHTS]
    expected = {key: value for key, value in case[0].config.items() if not key.startswith("_")}
    assert json.dumps(dict(source.config)) == json.dumps(expected)
    assert load_control(tmp_path / "canny", case[1], SCALE, "edges").name == "edges"


def test_folder_in_half_precision_and_shards(sd1: Case, tmp_path: Path) -> None:
    net, base = sd1
    net.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    equal(tmp_path / "sharded", sd1)
    net.save_pretrained(tmp_path / "half")
    state = {key: value.half() for key, value in net.state_dict().items()}
    (tmp_path / "half" / WEIGHTS).unlink()
    save_single(tmp_path / "half/diffusion_pytorch_model.fp16.safetensors", state)
    source = load_control(tmp_path / "half", base, SCALE)
    for dtype in (torch.float16, torch.float32):
        loaded = source.network(dtype).state_dict()
        assert all(torch.equal(loaded[key], state[key].to(dtype)) for key in loaded)


@pytest.mark.parametrize("prefix", ["", "control_model."])
def test_original_layout(case: Case, tmp_path: Path, prefix: str) -> None:
    path = save_single(tmp_path / "canny.safetensors", original(case[0], prefix))
    equal(path, case)
    source = load_control(path, case[1], SCALE)
    assert source.name == "canny"
    assert source.provenance["kind"] == "single-file"
    assert list(source.provenance["sha256"]) == ["canny.safetensors"]


def test_original_layout_beside_its_base_model(sd1: Case, tmp_path: Path) -> None:
    """As the first ControlNets were published."""
    base = {"model.diffusion_model.out.2.weight": torch.zeros(4), "first_stage_model.x": torch.zeros(1)}
    equal(save_single(tmp_path / "all.safetensors", original(sd1[0], "control_model.") | base), sd1)


def test_diffusers_layout(case: Case, tmp_path: Path) -> None:
    equal(save_single(tmp_path / "canny.safetensors", case[0].state_dict()), case)


def test_without_attention(tmp_path: Path) -> None:
    """The small SDXL ControlNets leave attention out; their encoder is not the base model's."""
    case = build("sdxl", down_block_types=("DownBlock2D",) * 2, mid_block_type="UNetMidBlock2D")
    assert not any("attn" in key for key in case[0].state_dict())
    case[0].save_pretrained(tmp_path / "small")
    equal(tmp_path / "small", case)
    equal(tmp_path / "small" / WEIGHTS, case)
    shallow = build("sdxl", transformer_layers_per_block=(1, 1))
    equal(save_single(tmp_path / "mid.safetensors", shallow[0].state_dict()), shallow)


def test_names_are_those_of_diffusers(tmp_path: Path) -> None:
    """diffusers converts SD files whose hint encoder has eight convolutions."""
    from diffusers import ControlNetModel
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    for family in ("sd1", "sd2"):
        case = build(family, (8, 8, 16, 16))
        state = original(case[0])
        theirs = convert_controlnet_checkpoint(dict(state), case[0].config)
        names = diffusers_names(state)
        assert {names[key] for key in state} == theirs.keys()
        assert all(torch.equal(theirs[names[key]], state[key]) for key in state)
        path = save_single(tmp_path / f"{family}.safetensors", original(case[0], "control_model."))
        case[0].save_pretrained(tmp_path / family)
        reference = ControlNetModel.from_single_file(
            str(path), config=str(tmp_path / family), local_files_only=True, original_config=None
        )
        loaded = equal(path, case, 8).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in reference.state_dict().items())


def test_block_numbers_out_of_all_proportion_change_nothing() -> None:
    huge = f"input_blocks.{10**15}.0.op.weight"
    names = diffusers_names([huge, "input_blocks.0.0.op.weight", "input_blocks.3.0.op.weight"])
    assert names[huge] == huge
    assert names["input_blocks.3.0.op.weight"] == "down_blocks.0.downsamplers.0.conv.weight"


def test_options_that_are_kept(tmp_path: Path) -> None:
    case = build("sd1", global_pool_conditions=True, controlnet_conditioning_channel_order="bgr")
    case[0].save_pretrained(tmp_path / "shuffle")
    loaded = equal(tmp_path / "shuffle", case)
    assert residuals(loaded)[0].shape[2:] == (1, 1)
    source = load_control(tmp_path / "shuffle", case[1], SCALE)
    assert source.config["global_pool_conditions"] is True
    assert source.config["controlnet_conditioning_channel_order"] == "bgr"


@pytest.mark.parametrize(
    ("name", "pooled"),
    [("control_v11e_sd15_shuffle_fp16", True), ("shuffle", True), ("canny", False), ("reshuffled", False)],
)
def test_single_shuffle_files_are_pooled(sd1: Case, tmp_path: Path, name: str, pooled: bool) -> None:
    path = save_single(tmp_path / f"{name}.safetensors", original(sd1[0]))
    assert load_control(path, sd1[1], SCALE).config["global_pool_conditions"] is pooled


def test_private_and_code_naming_keys_are_dropped(folder: Path, sd1: Case) -> None:
    edit(folder, _attn_implementation_internal="someone/kernel", auto_map={"AutoModel": "x.Y"}, custom="x.py")
    source = load_control(folder, sd1[1], SCALE)
    for config in (source.config, source.network(torch.float32).config):
        assert not {"_attn_implementation_internal", "auto_map", "custom"} & set(config)


def test_base_config_may_be_silent(tmp_path: Path) -> None:
    """A config.json of an old UNet names few options; the others are its class's defaults."""
    case = build("sd1")
    base = {key: value for key, value in case[1].items() if key not in ("in_channels", "norm_eps", "freq_shift")}
    equal(save_single(tmp_path / "canny.safetensors", original(case[0])), (case[0], base))


# Refusals


@pytest.fixture
def folder(sd1: Case, tmp_path: Path) -> Path:
    """An SD 1 ControlNet to spoil."""
    sd1[0].save_pretrained(tmp_path / "net")
    return tmp_path / "net"


def edit(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / "config.json").read_text("utf-8")) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v is not ...}), "utf-8")


def refuse(path: Path, case: Case, *texts: str, scale: int = SCALE) -> None:
    """Refused before weights are read, in one line that contains the texts."""
    with pytest.raises(CheckpointError) as caught:
        load_control(path, case[1], scale)
    for text in texts:
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def refuse_weights(path: Path, case: Case, text: str) -> None:
    source = load_control(path, case[1], SCALE)
    with pytest.raises(CheckpointError, match=re.escape(text)):
        source.network(torch.float32)


KINDS = {  # names of weights that each kind of file has
    "Control-LoRA": ["lora_controlnet", "input_blocks.1.0.in_layers.2.up", "zero_convs.0.0.weight"],
    "a Control-LoRA": ["input_blocks.1.0.in_layers.2.down", "input_hint_block.0.weight"],
    "T2I-Adapter": ["adapter.conv_in.weight", "adapter.body.0.resnets.0.block1.weight"],
    "a T2I-Adapter": ["body.0.block1.weight", "conv_in.weight"],
    "ControlNet-Union": ["task_embedding", "controlnet_cond_embedding.conv_in.weight"],
    "a ControlNet-Union": ["control_add_embedding.linear_1.weight", "controlnet_cond_embedding.conv_in.weight"],
    "ControlNet-LLLite": ["lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight"],
    "ControlNet-XS": ["down_blocks.0.base_to_ctrl.0.weight", "controlnet_cond_embedding.conv_in.weight"],
    "a ControlNet-XS": ["control_model.enc_zero_convs_out.0.0.weight", "control_model.input_hint_block.0.weight"],
    "LoRA adapter": ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"],
    "a LoRA adapter": ["unet.down_blocks.0.attentions.0.to_q.lora_A.weight"],
    "the difference of a ControlNet": ["difference", "control_model.input_hint_block.0.weight"],
    "a base model": ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight"],
    "base model; export it as MODEL": ["conv_in.weight", "up_blocks.0.resnets.0.conv1.weight"],
    "no ControlNet weights": ["something.weight"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_files(sd1: Case, tmp_path: Path, kind: str) -> None:
    path = save_single(tmp_path / "x.safetensors", {key: torch.zeros(2, 2) for key in KINDS[kind]})
    refuse(path, sd1, kind)


@pytest.mark.parametrize(
    ("named", "text"),
    [
        ("ControlNetUnionModel", "ControlNet-Union"),
        ("ControlNetXSAdapter", "ControlNet-XS"),
        ("T2IAdapter", "T2I-Adapter"),
        ("MultiControlNetModel", "several ControlNets in one"),
        ("UNet2DConditionModel", "a base model"),
        ("FluxControlNetModel", "supported: ControlNetModel"),
        ("os.system", "supported: ControlNetModel"),
        (["a", "b"], "supported: ControlNetModel"),
        (..., "supported: ControlNetModel"),
    ],
)
def test_other_classes(folder: Path, sd1: Case, named: Any, text: str) -> None:
    edit(folder, _class_name=named)
    refuse(folder, sd1, text)


def test_other_weights_in_a_folder(folder: Path, sd1: Case) -> None:
    save_single(folder / WEIGHTS, {key: torch.zeros(2, 2) for key in KINDS["Control-LoRA"]})
    refuse(folder, sd1, "is a Control-LoRA")


def test_folders_that_are_no_controlnet(folder: Path, sd1: Case) -> None:
    parent = folder.parent
    refuse(parent / "nothing", sd1, "does not exist")
    refuse(parent, sd1, "not a ControlNet's own folder", "net")
    shutil.copytree(folder, parent / "net_1")
    refuse(parent, sd1, "several ControlNets in one", "net, net_1")
    empty = parent / "empty"
    empty.mkdir()
    refuse(empty, sd1, "no config.json")
    (empty / "model_index.json").write_text("{}")
    refuse(empty, sd1, "a base model")
    (empty / "adapter_config.json").write_text("{}")
    refuse(empty, sd1, "a LoRA adapter")


def test_code_and_pickles(folder: Path, sd1: Case) -> None:
    (folder / "net.py").write_text("raise SystemExit")
    refuse(folder, sd1, "contains code (net.py)")
    (folder / "net.py").unlink()
    (folder / WEIGHTS).write_bytes(pickle.dumps({"a": 1}))
    refuse(folder, sd1, "is a pickle file", "only .safetensors")
    refuse(folder / WEIGHTS, sd1, "is a pickle file")
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    refuse(folder, sd1, "only .safetensors")
    (folder / "control.pth").write_bytes(b"PK")
    refuse(folder / "control.pth", sd1, "is a pickle file")


def test_damaged_files(folder: Path, sd1: Case) -> None:
    data = (folder / WEIGHTS).read_bytes()
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).write_bytes(data[:-10])
    refuse(folder, sd1, "not a valid safetensors file")
    refuse(folder / WEIGHTS, sd1, "not a valid safetensors file")
    single = folder / "single.safetensors"
    hint = {key: value for key, value in state.items() if key.startswith("controlnet_cond_embedding")}
    refuse(save_single(single, hint), sd1, "down_blocks.0.resnets.0.conv1.weight")
    far = {"down_blocks.99999999999.resnets.0.conv1.weight": torch.zeros(1)}
    refuse(save_single(single, hint | far), sd1, "damaged")
    flat = state | {"conv_in.weight": torch.zeros(4)}
    refuse(save_single(single, flat), sd1, "damaged")
    (folder / "config.json").write_text("{")
    refuse(folder, sd1, "not readable JSON")


def test_wrong_weights(folder: Path, sd1: Case) -> None:
    state = load_file(folder / WEIGHTS)
    save_single(folder / WEIGHTS, {k: v for k, v in state.items() if k != "controlnet_mid_block.bias"})
    refuse(folder, sd1, "lacks controlnet_mid_block.bias")
    save_single(folder / WEIGHTS, state | {"extra": torch.zeros(1)})
    refuse(folder / WEIGHTS, sd1, "unexpected weights: extra")
    save_single(folder / WEIGHTS, state | {"conv_in.bias": torch.full((32,), torch.nan)})
    refuse_weights(folder, sd1, "conv_in.bias holds NaN or infinity")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"num_class_embeds": 10}, "num_class_embeds=10"),
        ({"encoder_hid_dim": 8}, "encoder_hid_dim=8"),
        ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type='text_proj'"),
        ({"addition_embed_type": "text"}, "addition_embed_type='text'"),
        ({"controlnet_conditioning_channel_order": "rbg"}, "supported: 'rgb', 'bgr'"),
        ({"global_pool_conditions": "yes"}, "global_pool_conditions='yes'"),
        ({"conditioning_channels": 6}, "hints of 6 channels"),
        ({"down_block_types": ["a", "b"]}, "cannot be built from its config"),
        ({"conditioning_embedding_out_channels": None}, "the model's VAE has 2×2"),
        ({"layers_per_block": 10**12}, "layers per block 1000000000000, the model 1"),
        ({"cross_attention_dim": {}}, "cross_attention_dim {}"),
    ],
)
def test_unsupported_options(folder: Path, sd1: Case, changes: dict[str, Any], text: str) -> None:
    edit(folder, **changes)
    refuse(folder, sd1, text)


def test_inpainting_file(tmp_path: Path, sd1: Case) -> None:
    net, _ = build("sd1", conditioning_channels=4)
    refuse(save_single(tmp_path / "inpaint.safetensors", original(net)), sd1, "hints of 4 channels", "mask")


MISFITS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "text width": ("sd1", {"cross_attention_dim": 64}, ("cross_attention_dim 64, the model 32",)),
    "residual channels": ("sd1", {"block_out_channels": (32, 96)}, ("residual channels 32, 96, the model 32, 64",)),
    "layers": ("sd1", {"layers_per_block": 2}, ("layers per block 2, the model 1",)),
    "latent channels": ("sd1", {"in_channels": 8}, ("latent channels 8, the model 4",)),
    "SDXL on SD": ("sdxl", {}, ("for SDXL; the model is not", "for SD 1 or 2")),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_misfits(tmp_path: Path, sd1: Case, misfit: str) -> None:
    family, options, texts = MISFITS[misfit]
    net, _ = build(family, **options)
    net.save_pretrained(tmp_path / "net")
    refuse(tmp_path / "net", sd1, *texts)
    refuse(save_single(tmp_path / "net.safetensors", original(net)), sd1, *texts)


def test_misfits_of_sdxl(tmp_path: Path, sd1: Case) -> None:
    case = build("sdxl")
    path = save_single(tmp_path / "net.safetensors", original(sd1[0]))
    refuse(path, case, "for SD 1 or 2; the model is not", "give one for SDXL")
    wider, _ = build("sdxl", projection_class_embeddings_input_dim=96)
    refuse(save_single(path, original(wider)), case, "width of pooled text and sizes 96, the model 88")
    other, _ = build("sdxl", addition_time_embed_dim=16)
    other.save_pretrained(tmp_path / "net")
    refuse(tmp_path / "net", case, "addition_time_embed_dim 16, the model 8")


def test_families_are_named(folder: Path, sd1: Case) -> None:
    """The usual mistake: ControlNets of SD 1 and 2 differ in this alone."""
    edit(folder, cross_attention_dim=768)
    refuse(
        folder,
        (sd1[0], sd1[1] | {"cross_attention_dim": 1024}),
        "cross_attention_dim 768 (SD 1), the model 1024 (SD 2)",
    )


def test_hint_scale(folder: Path, sd1: Case) -> None:
    refuse(folder, sd1, "2×2 pixels of the hint, the model's VAE has 8×8", scale=8)
    refuse(folder / WEIGHTS, sd1, "2×2 pixels of the hint, the model's VAE has 8×8", scale=8)


def test_export_points_to_the_option(tmp_path: Path, sd1: Case) -> None:
    """A ControlNet given as the model."""
    layouts = (original(sd1[0]), original(sd1[0], "control_model."), sd1[0].state_dict())
    for index, state in enumerate(layouts):
        path = save_single(tmp_path / f"{index}.safetensors", state)
        with pytest.raises(CheckpointError, match=r"is a ControlNet; .* --control NAME=FILE"):
            load(path, tokenizer=tmp_path)
