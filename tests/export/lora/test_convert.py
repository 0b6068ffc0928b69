"""`stepforge lora convert`: exact pairs stay exact, the rest is cut with a stated error, and both files read back."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stepforge.export.lora.convert import convert, truncate
from stepforge.export.lora.merge import source_modules
from stepforge.export.models.load import load
from stepforge.runtime.bundle import UNET
from stepforge.runtime.cli.main import main
from stepforge.runtime.errors import AdapterError
from stepforge.runtime.lora.adapter import read_adapter
from stepforge.runtime.lora.layers import delta

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = "lora_unet_" + TO_Q.replace(".", "_")
PLACE = (UNET, TO_Q)


@pytest.fixture
def files(tmp_path):
    torch.manual_seed(0)
    pair = {f"{KOHYA}.lora_down.weight": torch.randn(4, 32), f"{KOHYA}.lora_up.weight": torch.randn(32, 4),
            f"{KOHYA}.alpha": torch.tensor(2.0)}  # fmt: skip
    save_file(pair, tmp_path / "lora.safetensors")
    save_file({**pair, f"{KOHYA}.dora_scale": torch.rand(32, 1) + 0.5}, tmp_path / "dora.safetensors")
    save_file({"lora_unet_conv_norm_out.w_norm": torch.ones(32), "lora_unet_conv_norm_out.b_norm": torch.ones(32), **pair},
              tmp_path / "norm.safetensors")  # fmt: skip
    return tmp_path


@pytest.mark.parametrize("suffix", [".safetensors", ".onnx_adapter"])
def test_exact_pairs_stay_exact(tiny_sd1, files, suffix):
    (layer,) = convert(files / "lora.safetensors", tiny_sd1, files / f"out{suffix}")
    assert (layer.rank, layer.error) == (4, 0.0)
    modules = source_modules(load(tiny_sd1))
    zeros = np.zeros((32, 32), np.float32)
    before, after = (read_adapter(files / name, modules) for name in ("lora.safetensors", f"out{suffix}"))
    wanted, found = (delta(one.layers[PLACE], zeros, None, 1.0)[0] for one in (before, after))
    assert np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted)


def test_what_is_no_pair_is_cut_with_its_error(tiny_sd1, files):
    with pytest.raises(AdapterError, match=r"lora\+dora, no low-rank pair; give a --rank"):
        convert(files / "dora.safetensors", tiny_sd1, files / "out.safetensors")
    (layer,) = convert(files / "dora.safetensors", tiny_sd1, files / "out.safetensors", rank=8)
    source = load(tiny_sd1)
    modules = source_modules(source)
    weight = source.unet(torch.float32).get_submodule(TO_Q).weight.numpy()
    exact = delta(read_adapter(files / "dora.safetensors", modules).layers[PLACE], weight, None, 1.0)[0]
    cut = delta(read_adapter(files / "out.safetensors", modules).layers[PLACE], weight, None, 1.0)[0]
    assert 0 < layer.error < 0.5
    assert np.linalg.norm(cut - exact) / np.linalg.norm(exact) == pytest.approx(layer.error, rel=1e-3)


def test_truncation_is_the_best_of_its_rank():
    random = np.random.default_rng(0)
    change = random.standard_normal((12, 20)).astype(np.float32)
    (down, up), error = truncate(change, 5)
    singular = np.linalg.svd(change, compute_uv=False)
    assert error == pytest.approx(np.sqrt((singular[5:] ** 2).sum() / (singular**2).sum()), rel=1e-5)
    assert np.linalg.norm(change - up @ down) / np.linalg.norm(change) == pytest.approx(error, rel=1e-4)
    assert truncate(np.zeros((3, 4), np.float32), 2)[1] == 0.0


def test_norms_are_left_out_and_said_so(tiny_sd1, files, capsys):
    with pytest.raises(SystemExit) as done:
        main(["lora", "convert", str(files / "norm.safetensors"), str(files / "out.safetensors"), "--model", str(tiny_sd1),
              "--rank", "4"])  # fmt: skip
    assert done.value.code == 0
    assert "left out: a norm has no low-rank form" in capsys.readouterr().out


def test_bad_places(tiny_sd1, files):
    with pytest.raises(AdapterError, match="unknown suffix"):
        convert(files / "lora.safetensors", tiny_sd1, files / "out.bin")
    with pytest.raises(AdapterError, match="exists"):
        convert(files / "lora.safetensors", tiny_sd1, files / "lora.safetensors")
    (files / "x.onnx_adapter").write_bytes(b"nonsense")
    with pytest.raises(AdapterError, match="not a readable ONNX Runtime adapter"):
        convert(files / "x.onnx_adapter", tiny_sd1, files / "out.safetensors")


def test_inspect_says_what_becomes_of_every_layer(tiny_sd1_banks, tiny_sd1_bundle, files, capsys):
    def rows(*arguments: str) -> list[dict[str, object]]:
        with pytest.raises(SystemExit) as done:
            main(["lora", "inspect", "--json", *arguments])
        assert done.value.code == 0
        return json.loads(capsys.readouterr().out)

    file = str(files / "norm.safetensors")
    fates = {
        row["module"]: (row["kind"], row["rank"], row["scale"], row["fate"])
        for row in rows(file, "--bundle", str(tiny_sd1_banks))
    }
    assert fates == {TO_Q: ("lora", 4, 0.5, "run time"), "conv_norm_out": ("full", None, 1.0, "merge")}
    assert {row["fate"] for row in rows(file, "--bundle", str(tiny_sd1_bundle))} == {"merge"}
    assert {row["fate"] for row in rows(file)} == {"?"}


def test_inspect_shows_hostile_names_harmlessly(tiny_sd1_banks, files, capsys):
    save_file(
        {"\x1b[31m" + "x" * 5000: torch.ones(1), "lora_unet_conv_norm_out.w_norm": torch.ones(32)},
        files / "h.safetensors",
    )
    with pytest.raises(SystemExit):
        main(["lora", "inspect", str(files / "h.safetensors"), "--bundle", str(tiny_sd1_banks)])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) < 400
