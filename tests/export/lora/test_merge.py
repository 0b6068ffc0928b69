"""Several adapters, their order and strengths; what is merged never reaches the model that was read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stepforge.export.lora.merge import merge, read_all, with_adapters
from stepforge.export.models.weights import weight_files
from stepforge.runtime.bundle import UNET
from stepforge.runtime.errors import AdapterError

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # 32 -> 32
KEY, TEXT = f"lora_unet_{Q.replace('.', '_')}", "lora_te_text_model_encoder_layers_0_mlp_fc1"  # 32 -> 64


def pair(name: str = KEY, out: int = 32) -> dict[str, torch.Tensor]:
    down, up = torch.randn(4, 32), torch.randn(out, 4)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """One of each arithmetic on the same layer, some on others as well."""
    states = {
        "lora": {**pair(), **pair(TEXT, 64)},
        "dora": {**pair(), f"{KEY}.dora_scale": 1 + torch.rand(32, 1)},
        "peft dora": {
            f"unet.{Q}.lora_A.weight": torch.randn(2, 32), f"unet.{Q}.lora_B.weight": torch.randn(32, 2),
            f"unet.{Q}.lora_magnitude_vector": 1 + torch.rand(32),
        },
        "ia3": {f"{KEY}.weight": torch.randn(32), f"{KEY}.on_input": torch.tensor(1)},
        "full": {f"{KEY}.diff": torch.randn(32, 32), "lora_unet_conv_in.diff": torch.randn(32, 4, 3, 3),
                 "lora_unet_conv_in.diff_b": torch.randn(32), "lora_unet_conv_norm_out.w_norm": torch.randn(32)},
    }  # fmt: skip
    for name, state in states.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    return {name: tmp_path / f"{name}.safetensors" for name in states}


@pytest.fixture(scope="module")
def before(sd1) -> dict[str, torch.Tensor]:
    return dict(parameters(sd1.source))


@pytest.fixture
def merged(sd1, files: dict[str, Path]):
    """Merge files at strengths through the loaders of the model; returns the parameters of all networks."""

    def run(*which: tuple[str, float], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        source = with_adapters(sd1.source, read_all(sd1.source, [(files[name], m) for name, m in which]))
        return dict(parameters(source, dtype))

    return run


def parameters(source, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, loader in zip("ut", (source.unet, *source.text_encoders), strict=True):
        for name, parameter in loader(dtype).named_parameters():
            yield f"{prefix}.{name}", parameter.detach()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    assert one.keys() == other.keys()
    bits = {2: torch.int16, 4: torch.int32}[next(iter(one.values())).element_size()]
    return all(torch.equal(one[name].view(bits), other[name].view(bits)) for name in one)


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in other)


def test_order_does_not_matter(merged) -> None:
    strengths = {"lora": 0.8, "dora": 0.5, "peft dora": -0.4, "ia3": 1.3, "full": -0.2}
    first, *others = [
        merged(*((name, strengths[name]) for name in order)) for order in list(permutations(strengths))[::17]
    ]
    assert others
    assert max(furthest(other, first) for other in others) <= 1e-7


def test_changes_add_up(merged, before) -> None:
    """Each is computed from the pristine weights, so that two together change what each changes alone."""
    one, two = merged(("lora", 0.8)), merged(("dora", -0.6))
    both = merged(("lora", 0.8), ("dora", -0.6))
    assert furthest(both, {name: one[name] + two[name] - before[name] for name in before}) <= 1e-6
    assert not same(both, one)


@pytest.mark.parametrize("name", ["dora", "peft dora", "full"])
def test_strength_0_is_pristine(name: str, merged, before) -> None:
    """Also for DoRA, whose formulas do not end in the pristine weight: 0 means no adapter."""
    assert same(merged((name, 0.0)), before)
    assert not same(merged((name, 0.1)), before)
    assert same(merged((name, 0.0), ("lora", 0.3)), merged(("lora", 0.3)))


@pytest.mark.parametrize("name", ["lora", "ia3", "full"])
def test_negative_strength_undoes(name: str, merged, before, sd1, files) -> None:
    assert same(merged((name, 1.0), (name, -1.0)), before)
    if name == "ia3":  # a factor, which merging twice would square
        return
    adapter = sd1.read(files[name])
    layers = {path: layer for (component, path), layer in adapter.layers.items() if component == UNET}
    network = merge(merge(sd1.copy(), [(layers, 1.0)]), [(layers, -1.0)])
    after = {f"u.{name}": parameter for name, parameter in network.named_parameters()}
    # rounding of a sum that is some 20 times as large as the weights
    assert furthest({name: before[name] for name in after}, after) <= 5e-6


def test_sources_stay_pristine(before, sd1, files) -> None:
    """A merge changes neither the files nor what a second load of the same source gives."""
    paths = [*weight_files(sd1.folder / "unet"), *weight_files(sd1.folder / "text_encoder")]
    bytes_before = [path.read_bytes() for path in paths]
    source = with_adapters(sd1.source, read_all(sd1.source, [(files["lora"], 1.0), (files["full"], 1.0)]))
    first = dict(parameters(source))
    assert not same(first, before)
    assert same(dict(parameters(source)), first)
    assert same(dict(parameters(sd1.source)), before)
    assert [path.read_bytes() for path in paths] == bytes_before
    assert [entry["strength"] for entry in source.provenance["adapters"]] == [1.0, 1.0]
    assert "adapters" not in sd1.source.provenance


def test_half_precision_rounds_once(merged) -> None:
    """Merged in float32, then rounded."""
    exact, half = merged(("lora", 0.8), ("dora", 0.5)), merged(("lora", 0.8), ("dora", 0.5), dtype=torch.float16)
    assert same(half, {name: value.half() for name, value in exact.items()})


def test_only_what_the_file_names_changes(merged, before) -> None:
    after = merged(("lora", 1.0))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {f"u.{Q}.weight", "t.encoder.layers.0.mlp.fc1.weight"}


def test_overflow(sd1, tmp_path: Path) -> None:
    """Finite numbers of a file whose product is not."""
    save_file({key: torch.full_like(tensor, 1e30) for key, tensor in pair().items()}, tmp_path / "a.safetensors")
    source = with_adapters(sd1.source, read_all(sd1.source, [(tmp_path / "a.safetensors", 1.0)]))
    with pytest.raises(AdapterError, match="infinite; use smaller strengths"):
        source.unet(torch.float32)
