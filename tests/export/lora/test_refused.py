"""Every file that is refused, with one clear line; and no file, however mangled, raises anything but AdapterError."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from stepforge.export.lora.merge import merge
from stepforge.runtime.bundle import TEXT_ENCODERS, UNET
from stepforge.runtime.errors import AdapterError
from stepforge.runtime.lora.adapter import Adapter, read_adapter, survey
from stepforge.runtime.lora.file import LARGEST
from stepforge.runtime.lora.patterns import Expression, Patterns

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # 32 -> 32, no bias
KOHYA, DIFFUSERS, PEFT = f"lora_unet_{Q.replace('.', '_')}", f"unet.{Q}", f"base_model.model.{Q}"
CONV = "lora_unet_conv_in"  # 4 -> 32, 3x3


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def pair(name: str = KOHYA, rank: int = 4, inputs: int = 32) -> dict[str, np.ndarray]:
    return {f"{name}.lora_down.weight": floats(rank, inputs), f"{name}.lora_up.weight": floats(32, rank)}


def peft() -> dict[str, np.ndarray]:
    return {f"{PEFT}.lora_A.weight": floats(4, 32), f"{PEFT}.lora_B.weight": floats(32, 4)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "style.safetensors"


@pytest.fixture
def refuse(sd1, file: Path) -> Callable[..., str]:
    """Reading gives one short line with the text in it."""

    def run(text: str, path: Path = file) -> str:
        with pytest.raises(AdapterError, match=re.escape(text)) as caught:
            sd1.read(path)
        line = str(caught.value)
        assert len(line) < 400
        assert line.isprintable()
        return line

    return run


# ----- the file


def test_no_such_file(refuse, tmp_path: Path) -> None:
    refuse("does not exist", tmp_path / "nothing.safetensors")
    refuse("holds no LoRA", tmp_path)
    refuse("cannot be read: File name too long", tmp_path / f"{'a' * 300}.safetensors")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ""])
def test_pickle(suffix: str, refuse, tmp_path: Path) -> None:
    path = tmp_path / f"lora{suffix}"
    path.write_bytes(pickle.dumps(pair()))
    refuse("pickle files can run code", path)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0" * 7, b"\0" * 8, b"\xff" * 64, b"PK\x03\x04" + bytes(64), pickle.dumps(pair()), save(pair())[:-9],
        save(pair())[:60], save(pair()) + b"\0", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
    ids=["empty", "7 bytes", "zeros", "ones", "zip", "pickle", "truncated", "truncated header", "longer", "list",
         "long header", "deep"],
)  # fmt: skip
def test_not_safetensors(data: bytes, refuse, file: Path) -> None:
    file.write_bytes(data)
    refuse("is not a valid safetensors file")


def test_no_tensors(refuse, file: Path) -> None:
    file.write_bytes(save({}))
    refuse("changes nothing in this model: it is empty")
    with pytest.raises(AdapterError, match="holds no tensors"):
        survey(file)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_not_finite(value: float, dtype: type, refuse, file: Path) -> None:
    state = {key: tensor.astype(dtype) for key, tensor in pair().items()}
    state[f"{KOHYA}.lora_up.weight"][3, 1] = value
    save_file(state, file)
    refuse("lora_up.weight' holds NaN or infinity")


def test_too_large_for_float32(refuse, file: Path) -> None:
    save_file({**pair(), f"{KOHYA}.alpha": np.array(1e300)}, file)
    refuse("alpha' holds NaN or infinity")


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32])
def test_quantised(kind: type, sd1, refuse, file: Path) -> None:
    """A scale of theirs would stand elsewhere; an alpha may be whole."""
    save_file(pair() | {f"{KOHYA}.lora_up.weight": np.ones((32, 4), kind)}, file)
    refuse("quantised adapters are not supported")
    save_file(pair() | {f"{KOHYA}.alpha": np.array(2, kind)}, file)
    (layer,) = sd1.read(file).layers.values()
    assert layer.scale == 0.5


@pytest.mark.parametrize(
    "role", ["lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale", "lokr_w1", "diff"]
)
def test_single_numbers(role: str, refuse, file: Path) -> None:
    state = pair() if role[:4] in ("lora", "dora") else {f"{KOHYA}.lokr_w2": floats(8, 8)} if role == "lokr_w1" else {}
    save_file(state | {f"{KOHYA}.{role}": np.array(1.0, np.float32)}, file)
    refuse("is a single number")
    assert "is a single number" in survey(file)[KOHYA]


def sparse(file: Path, shapes: dict[str, list[int]]) -> None:
    """Zeros that take no place on the disk."""
    at, entries = 0, {}
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    file.write_bytes(header(entries, b""))
    os.truncate(file, file.stat().st_size + at)


def test_what_fits_nowhere_is_not_read(refuse, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """6 GB of zeros under names that the model has, and under others."""
    monkeypatch.setattr("stepforge.runtime.lora.file._read", lambda *_: pytest.fail("the body was read"))
    sparse(file, {f"{KOHYA}.lora_down.weight": [4, 400_000_000], f"{KOHYA}.lora_up.weight": [32, 4]})
    refuse("down is [4, 400000000], the module needs [4, 32]")
    sparse(file, {f"{KOHYA}.lora_down.weight": [24_000_000, 32], f"{KOHYA}.lora_up.weight": [32, 24_000_000]})
    refuse("its rank is 24000000, more than a weight [32, 32] has")
    sparse(file, {"other.lora_down.weight": [40_000, 40_000]})
    refuse("the model has no such module")
    os.truncate(file, LARGEST + 1)
    refuse("adapters have at most 8192")


@pytest.mark.slow
def test_many_keys(sd1, file: Path) -> None:
    found = {f"lora_unet_{i}.lora_down.weight": [1] for i in range(100_000)}
    sparse(file, found | {key: list(tensor.shape) for key, tensor in pair().items()})
    assert len(sd1.read(file).refused) == 100_000


def test_not_a_plain_file(refuse, file: Path) -> None:
    os.mkfifo(file)
    refuse("is not a plain file")


def header(entries: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "BOOL"])
def test_stored_type(kind: str, refuse, file: Path) -> None:
    file.write_bytes(header({"a.alpha": {"dtype": kind, "shape": [4], "data_offsets": [0, 4]}}, bytes(4)))
    refuse(f"'a.alpha' is stored as {kind}; supported: BF16, F64")


@pytest.mark.parametrize("shape", [[1] * 100, [1 << 62, 0, 2], [0, 1 << 40]])
def test_impossible_shapes(shape: list[int], refuse, file: Path) -> None:
    size = 4 * (0 not in shape)
    file.write_bytes(header({"a.alpha": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}, bytes(size)))
    refuse("a")


def test_same_key_twice_in_the_header(refuse, file: Path) -> None:
    """JSON allows it."""
    one = '"a.alpha":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    text = f"{{{one % (0, 4)},{one % (4, 8)}}}".encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    refuse("'a.alpha' is given twice")


# ----- the model


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (pair(inputs=48), "its lora_down"),
        (pair() | {f"{KOHYA}.lora_up.weight": floats(48, 4)}, "up is [48, 4], the module needs [32, 4]"),
        (pair() | {f"{KOHYA}.lora_up.weight": floats(32, 5)}, "up is [32, 5], the module needs [32, 4]"),
        (pair() | {f"{KOHYA}.lora_up.weight": floats(4, 32)}, "up is [4, 32], the module needs [32, 4]"),
        (pair() | {f"{KOHYA}.lora_down.weight": floats(4, 8, 2, 3)}, "down is [4, 8, 2, 3], the module needs [4, 32]"),
        (pair() | {f"{KOHYA}.dora_scale": floats(5)}, "its magnitude [5] fits no axis"),
        (pair() | {f"{KOHYA}.lora_mid.weight": floats(4, 5)}, "mid is [4, 5], the module needs [4, 4]"),
        ({f"{CONV}.lora_down.weight": floats(2, 4, 3, 1), f"{CONV}.lora_up.weight": floats(32, 2, 1, 1)}, "down is"),
        ({f"{KOHYA}.diff": floats(32, 31)}, "diff is [32, 31]"),
        ({f"{KOHYA}.diff_b": floats(32)}, "it changes a bias that the module does not have"),
        ({f"{CONV}.diff_b": floats(31)}, "diff_b has 31 numbers, the module 32"),
        ({f"{KOHYA}.weight": floats(33), f"{KOHYA}.on_input": np.array(1)}, "needs 32 numbers"),
        ({f"{KOHYA}.lokr_w1": floats(4, 4), f"{KOHYA}.lokr_w2": floats(8, 9)}, "do not make a weight [32, 32]"),
        ({f"{KOHYA}.lokr_w1": floats(32), f"{KOHYA}.lokr_w2": floats(32)}, "w1 is [32], not a matrix"),
        ({f"{KOHYA}.lokr_w1": floats(4, 4), f"{KOHYA}.lokr_w2_a": floats(8, 2), f"{KOHYA}.lokr_w2_b": floats(3, 8)},
         "do not multiply"),
        ({f"{KOHYA}.hada_{role}": floats(32, 4) if role[-1] == "a" else floats(4, 30)
          for role in ("w1_a", "w1_b", "w2_a", "w2_b")}, "w1_b is [4, 30]"),
        ({f"{CONV.replace('conv_in', 'conv_norm_out')}.{key}": floats(1, 1) for key in
          ("lora_down.weight", "lora_up.weight")}, "lora on a normalisation layer is not supported"),
    ],
)  # fmt: skip
def test_other_shapes(state: dict[str, np.ndarray], text: str, refuse, file: Path) -> None:
    save_file(state, file)
    refuse(text.replace("its lora_down", "down is [4, 48], the module needs [4, 32]"))
    refuse("made for another model: denoiser/unet ")


def test_adapter_of_another_model(sd1, sd2, xl, refuse, file: Path) -> None:
    """SD 2's and SDXL's transformers are wider; SDXL has blocks that SD 1 does not have."""
    for model in (sd2, xl):
        module = next(m for m in model.modules[TEXT_ENCODERS[0]] if m.path.endswith("layers.0.mlp.fc1"))
        key = "lora_te_text_model_encoder_layers_0_mlp_fc1"
        save_file(
            {f"{key}.lora_down.weight": floats(2, 2 * module.shape[1]), f"{key}.lora_up.weight": floats(64, 2)}, file
        )
        refuse("made for another model: text_encoder encoder.layers.0.mlp.fc1: its down is [2, 64]")
    save_file(pair("lora_te2_text_model_encoder_layers_0_mlp_fc1"), file)
    refuse("changes nothing in this model")


@pytest.mark.parametrize(
    "name",
    ["transformer.single_transformer_blocks.0.attn.to_q", "lora_unet_double_blocks_0_img_attn_proj", "", ".", "unet.",
     "lora_unet_", "base_model.model.", "../../etc/passwd", "a\nb\x1b[31m\0", "ключ", "\u202e\ud7ff", "x" * 10_000,
     "lora_unet_" + "conv_in." * 3_000, ".base_layer" * 2_000 + Q],
    ids=lambda name: ascii(name[:30]),
)  # fmt: skip
def test_no_such_module(name: str, refuse, file: Path) -> None:
    """Flux's names, and hostile ones: the message is short and printable."""
    save_file(pair(name), file)
    if name == "base_model.model.":
        (file.parent / "adapter_config.json").write_text('{"lora_alpha": 4}')
    refuse("changes nothing in this model: ")


def test_one_module_by_two_names(refuse, file: Path) -> None:
    save_file({**pair(), **pair(DIFFUSERS)}, file)
    refuse("are the same module of the model")


def test_one_tensor_by_two_names(refuse, file: Path) -> None:
    save_file({**pair(DIFFUSERS), f"{DIFFUSERS}.lora_A.weight": floats(4, 32)}, file)
    refuse(f"gives the down of {DIFFUSERS!r}"[:60])


# ----- one layer; with nothing else in the file


@pytest.mark.parametrize(
    ("state", "text"),
    {
        "no up": ({f"{KOHYA}.lora_down.weight": floats(4, 32)}, "incomplete: it has down"),
        "no down": ({f"{KOHYA}.lora_up.weight": floats(32, 4)}, "incomplete: it has up"),
        "half of LoHa": ({f"{KOHYA}.hada_w1_a": floats(32, 4), f"{KOHYA}.hada_w1_b": floats(4, 32)}, "incomplete"),
        "half of LoKr": ({f"{KOHYA}.lokr_w1": floats(4, 4)}, "incomplete: it has w1"),
        "alpha alone": ({f"{KOHYA}.alpha": floats(1)}, "a scale without anything to scale"),
        "two alphas": (pair() | {f"{KOHYA}.alpha": floats(2)}, "its alpha has 2 numbers"),
        "no rank": ({f"{KOHYA}.lora_down.weight": floats(0, 32), f"{KOHYA}.lora_up.weight": floats(32, 0)}, "no rank"),
        "flat": ({f"{KOHYA}.lora_down.weight": floats(128), f"{KOHYA}.lora_up.weight": floats(128)}, "no rank"),
        "two kinds": (pair() | {f"{KOHYA}.diff": floats(32, 32)}, "tensors of several kinds"),
        "w1 twice": ({f"{KOHYA}.lokr_w1": floats(4, 4), f"{KOHYA}.lokr_w1_a": floats(4, 1),
                      f"{KOHYA}.lokr_w2": floats(8, 8)}, "it has both w1 and w1_a"),
        "one core": ({f"{KOHYA}.hada_{r}": floats(4, 32) for r in ("w1_a", "w1_b", "w2_a", "w2_b", "t1")}, "one of t1"),
        "two magnitudes": (pair(DIFFUSERS) | {f"{DIFFUSERS}.dora_scale": floats(32, 1),
                           f"{DIFFUSERS}.lora_magnitude_vector": floats(32)}, "both magnitude and dora_scale"),
        "full DoRA": ({f"{KOHYA}.diff": floats(32, 32), f"{KOHYA}.dora_scale": floats(32, 1)}, "full with a magnitude"),
        "weight": ({f"{KOHYA}.weight": floats(32, 32)}, "a whole weight, not a change of one"),
        "on_input of 2": ({f"{KOHYA}.weight": floats(32), f"{KOHYA}.on_input": np.zeros(2, int)}, "on_input has 2"),
        "GLoRA": ({f"{KOHYA}.{r}.weight": floats(4, 4) for r in ("a1", "a2", "b1", "b2")}, "GLoRA is not supported"),
        "OFT": ({f"{KOHYA}.oft_blocks": floats(4, 8, 8), f"{KOHYA}.alpha": floats(1)}, "OFT is not supported"),
        "other": ({f"{KOHYA}.what": floats(4, 8)}, "not a key of any known LoRA format"),
    }.values(),
)  # fmt: skip
def test_layers(state: dict[str, np.ndarray], text: str, sd1, refuse, file: Path) -> None:
    """Alone it is refused; beside others it is left out, with the reason."""
    save_file(state, file)
    assert text in refuse("changes nothing in this model: ")
    save_file({**state, **pair("lora_unet_" + Q.replace(".", "_").replace("to_q", "to_v"))}, file)
    adapter = sd1.read(file)
    assert [path for _, path in adapter.layers] == [Q.replace("to_q", "to_v")]
    assert all(text in why for why in adapter.refused.values())


def test_empty_tensor(refuse, file: Path) -> None:
    save_file({f"{KOHYA}.diff": floats(32, 32), f"{CONV}.diff": floats(32, 4, 3, 0)}, file)
    refuse("it has an empty tensor")


# ----- PEFT's settings


def test_no_config(refuse, file: Path) -> None:
    save_file(peft(), file)
    refuse("is in PEFT's layout but has no adapter_config.json beside it, which says how to scale it")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("", "it is not JSON"), ("[]", "not a JSON object"), ("[" * 100_000, "it nests deeper"),
        ('{"lora_alpha": ' + "1" * 400 + "}", "a number of 400 digits"), ({}, "no usable lora_alpha"),
        ({"lora_alpha": None}, "no usable"),
        ({"lora_alpha": "x\n" * 999}, "no usable"), ({"lora_alpha": float("nan")}, "it contains NaN"),
        ({"lora_alpha": 1e308}, "an alpha that is not below 1e+06"), ({"lora_alpha": "4"}, "no usable lora_alpha: '4'"),
        ({"lora_alpha": True}, "no usable lora_alpha"), ('{"lora_alpha": 4, "lora_alpha": 8}', "is given twice"),
        ({"alpha_pattern": [1]}, "no usable"), ({"alpha_pattern": "to_q"}, "no usable alpha_pattern: 'to_q'"),
        ({"alpha_pattern": {"a": {}}}, "no usable"), ({"alpha_pattern": {"(": 1}}, "its brackets do not match"),
        ({"alpha_pattern": {"a": "2"}}, "'2' is not a number"),
        ({"alpha_pattern": {"a{99999999999}": 1}}, "too often"),
        ({"alpha_pattern": {str(i): 1 for i in range(9_999)}}, "it has 9999 patterns; at most 4096"),
        ({"use_rslora": "false"}, "use_rslora='false'; it is true or false"), ({"use_rslora": 1}, "use_rslora='1'"),
        ({"use_dora": "False"}, "use_dora='False'"), ({"fan_in_fan_out": "false"}, "fan_in_fan_out='false'"),
        ({"r": 8}, f"gives '{Q}' rank 8, its tensors have rank 4"), ({"r": "4"}, "no usable r: '4' is not a rank"),
        ({"r": True}, "is not a rank"), ({"r": 4, "rank_pattern": {"to_q": 2}}, "rank 2, its tensors have rank 4"),
        ({"rank_pattern": {"to_q": 0}}, "no usable rank_pattern: '0' is not a rank"),
        ({"alpha_pattern": {f"{'ab' * 100}.*{i}": 1 for i in range(9)}}, "more than 1024 characters; give names"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA', which is not supported"), ({"peft_type": "OFT"}, "peft_type='OFT'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out='True'"), ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"), ({"layer_replication": [[0, 1]] * 999}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model; convert it with PEFT"),
        ({"init_lora_weights": "olora"}, "changes the base model"), ({"init_lora_weights": "loftq"}, "changes the base"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_config(config: Any, text: str, refuse, file: Path) -> None:
    save_file(peft(), file)
    path = file.parent / "adapter_config.json"
    path.write_text(config if isinstance(config, str) else json.dumps({"lora_alpha": 4, **config} if config else {}))
    refuse(text)


SLOW = ["(a+)+b", "(.*)*x", "(.*){5}x", "(?:.*)+x", "(.|.)" * 40, ".?" * 100 + "x" * 9, ".*" * 8 + "x"]
REFUSED = ["a" * 300, "(a+)(?#)*x", "(?x:(a+) *)x", r"(.*)(.*)(.*)\1\2\3x", "(?=a)a", r"\ba", "a$b", "a**", "a{2}{3}",
           "(" * 40 + ")" * 40]  # fmt: skip


@pytest.mark.parametrize("pattern", REFUSED, ids=lambda pattern: pattern[:16])
def test_expressions_that_are_not_understood(pattern: str, refuse, file: Path) -> None:
    save_file(peft(), file)
    (file.parent / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, "alpha_pattern": {pattern: 1}}))
    refuse("has an alpha_pattern that is not supported")


@pytest.mark.parametrize("pattern", SLOW, ids=lambda pattern: pattern[:16])
def test_expressions_that_never_end_elsewhere(pattern: str, file: Path) -> None:
    """Names have any length when no model says which there are."""
    name = f"base_model.model.{'a' * 40_000}!"
    save_file({f"{name}.lora_A.weight": floats(4, 32), f"{name}.lora_B.weight": floats(32, 4)}, file)
    (file.parent / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, "alpha_pattern": {pattern: 1}}))
    assert survey(file)[name].scale == 1.0


def test_worst_expressions_that_are_allowed(sd1, file: Path) -> None:
    """Every module of a model is looked up in a moment."""
    state = {}
    for module in sd1.modules[UNET]:
        if module.kind == "linear":
            name = f"base_model.model.{module.path}"
            state |= {
                f"{name}.lora_A.weight": floats(1, module.shape[1]),
                f"{name}.lora_B.weight": floats(module.shape[0], 1),
            }
    save_file(state, file)
    config = file.parent / "adapter_config.json"
    config.write_text(
        json.dumps({"lora_alpha": 4, "alpha_pattern": {"(.|_)*[a-z_](.|_){400}x": 1, ".?" * 120 + "!": 1}})
    )
    assert {layer.scale for layer in sd1.read(file).layers.values()} == {4.0}
    state = {f"base_model.model.{'a' * 99}{i}.lora_A.weight": floats(1, 1) for i in range(9_999)}
    save_file(state, file)
    with pytest.raises(AdapterError, match=r"patterns that are too complex for \d+ letters"):
        survey(file)


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(
    text=st.lists(
        st.sampled_from([*"ab.()|*+?{}-]", r"\.", "[ab]", "[^a]", "{2}", "{1,2}", "{,1}", "(?:", r"\d"]), max_size=8
    ),
    names=st.lists(st.text("ab.{}2]-", max_size=6), max_size=6),
)
def test_expressions_match_as_pythons_own(text: list[str], names: list[str]) -> None:
    try:
        ours = Expression("".join(text))
    except ValueError:
        return
    theirs = re.compile("".join(text))
    for name in names:
        assert ours.matches(name) == bool(theirs.fullmatch(name))


def test_patterns_are_looked_up_as_peft_does() -> None:
    from peft.utils.other import get_pattern_key

    values = {
        "to_q": 1,
        "attn1.to_k": 2,
        "^mid_block.attn.to_v": 3,
        r".*attn[12]\.to_[kv]": 4,
        "mid_block.*": 5,
        r"ff\.net": 6,
    }
    patterns = Patterns(values)
    for path in ("a.attn1.to_q", "a.xto_q", "attn1.to_k", "b.attn1.to_k", "mid_block.attn.to_v", "a.mid_block.attn.to_v",
                 "a.attn2.to_v", "a.mid_block.proj", "ff.net", "ff_net", "other"):  # fmt: skip
        assert patterns.find(path) == values.get(get_pattern_key(values, path)), path


@pytest.mark.parametrize(
    "metadata",
    [{"lora_adapter_metadata": "{"}, {"lora_adapter_metadata": "[]"}, {"lora_adapter_metadata": '{"unet.r": 4}'},
     {"lora_adapter_metadata": '{"unet.lora_alpha": {}, "r": 1}'}, {"lora_adapter_metadata": '{"unet.lora_alpha": NaN}'}],
)  # fmt: skip
def test_metadata(metadata: dict[str, str], refuse, file: Path) -> None:
    save_file(pair(DIFFUSERS), file, metadata=metadata)
    refuse("lora_adapter_metadata")


# ----- anything


VALID = {
    **pair(), f"{KOHYA}.alpha": np.array(2, np.float32), **pair(f"unet.{Q.replace('to_q', 'to_v')}"),
    f"{CONV}.lora_down.weight": floats(2, 4, 1, 1), f"{CONV}.lora_mid.weight": floats(2, 2, 3, 3),
    f"{CONV}.lora_up.weight": floats(32, 2, 1, 1), f"{CONV}.dora_scale": floats(32, 1, 1, 1),
    "lora_unet_conv_out.hada_w1_a": floats(4, 2), "lora_unet_conv_out.hada_w1_b": floats(2, 288),
    "lora_unet_conv_out.hada_w2_a": floats(4, 2), "lora_unet_conv_out.hada_w2_b": floats(2, 288),
    "lora_unet_time_embedding_linear_2.lokr_w1": floats(8, 8), "lora_unet_conv_norm_out.w_norm": floats(32),
    "lora_unet_time_embedding_linear_2.lokr_w2_a": floats(16, 2), "lora_unet_conv_norm_out.b_norm": floats(32),
    "lora_unet_time_embedding_linear_2.lokr_w2_b": floats(2, 16),
    "lora_unet_time_embedding_linear_1.weight": floats(32), "lora_unet_time_embedding_linear_1.on_input": np.array(1),
}  # fmt: skip
ENDINGS = sorted({key.partition(".")[2] for key in VALID} | {"lora_A.weight", "lokr_t2", "hada_t1", "bias", "diff"})
SHAPES = st.one_of(st.sampled_from([v.shape for v in VALID.values()]), st.lists(st.integers(0, 33), max_size=4))


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid file with some keys renamed, some tensors of other shapes or types, and perhaps some bytes changed."""
    state = dict(VALID)
    for key in draw(st.lists(st.sampled_from(sorted(VALID)), max_size=4, unique=True)):
        tensor = state.pop(key)
        name, _, ending = key.partition(".")
        change = draw(st.sampled_from(["drop", "rename", "ending", "shape", "reshape", "type", "number"]))
        if change == "rename":
            name = draw(st.sampled_from([KOHYA, CONV, DIFFUSERS, PEFT, ""]) | st.text(max_size=20))
        elif change == "ending":
            ending = draw(st.sampled_from(ENDINGS) | st.text(max_size=20))
        elif change == "shape":
            tensor = np.ones(draw(SHAPES), tensor.dtype)
        elif change == "reshape":
            tensor = tensor.reshape(draw(st.sampled_from([(-1,), (1, -1), (-1, 1), (1, -1, 1), tensor.shape[::-1]])))
        elif change == "type":
            tensor = tensor.astype(draw(st.sampled_from([np.int8, np.float16, np.float64, np.bool_, np.uint8])))
        elif change == "number":
            tensor = np.full_like(
                tensor, draw(st.sampled_from([0, 3e38, -1, np.nan]) if tensor.dtype.kind == "f" else st.just(7))
            )
        if change != "drop":
            state[f"{name}.{ending}"] = tensor
    data = bytearray(save({key: np.ascontiguousarray(tensor) for key, tensor in state.items()}))
    if draw(st.integers(0, 4)) == 4:
        data[draw(st.integers(0, 1500)) % len(data)] = draw(st.integers(32, 126))
    return bytes(data[: len(data) - draw(st.sampled_from([0] * 9 + [400]))])


@settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=mutated(), strength=st.sampled_from([1.0, -100.0]))
def test_mutated_files(data: bytes, strength: float, sd1, file: Path) -> None:
    """A file is read and merges, or AdapterError says why not."""
    file.write_bytes(data)
    try:
        adapter: Adapter = read_adapter(file, sd1.modules)
        layers = {path: layer for (component, path), layer in adapter.layers.items() if component == UNET}
        merge(sd1.only(layers), [(layers, strength)])
    except AdapterError:
        pass


def test_the_valid_one(sd1, file: Path) -> None:
    save_file(VALID, file)
    assert len(sd1.read(file).layers) == 7
