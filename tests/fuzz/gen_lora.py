"""LoRA files: headers, keys, shapes, types, numbers and PEFT's settings mutated; files cut, flipped, sparse, or no files.

What is read is compared with safetensors' own reading of the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from mutate import NAMES, flipped, json_text, mutated
from safetensors import deserialize

from stepforge.runtime.bundle import TEXT_ENCODERS, UNET, Module
from stepforge.runtime.errors import AdapterError
from stepforge.runtime.lora.adapter import read_adapter, survey
from stepforge.runtime.lora.layers import delta, low_rank
from stepforge.runtime.lora.onnx_adapter import write

ERRORS = (AdapterError,)
QUICK, SOAK = 250, 4000

Q, K = (f"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_{name}" for name in "qk")
MODULES = {
    UNET: (Module(Q, "linear", (8, 8), False), Module(K, "linear", (8, 8), False),
           Module("conv_in", "conv", (8, 4, 3, 3), True), Module("conv_norm_out", "norm", (8,), True),
           Module("time_embedding.linear_1", "linear", (16, 8), True)),
    TEXT_ENCODERS[0]: (Module("encoder.layers.0.self_attn.q_proj", "linear", (8, 8), True),),
}  # fmt: skip
STEMS = [f"lora_unet_{Q.replace('.', '_')}", f"unet.{K}", f"base_model.model.{Q}", "lora_unet_conv_in",
         "lora_unet_conv_norm_out", "lora_unet_time_embedding_linear_1",
         "lora_te_text_model_encoder_layers_0_self_attn_q_proj", "other", ""]  # fmt: skip
ENDINGS = ["lora_down.weight", "lora_up.weight", "lora_mid.weight", "lora_A.weight", "lora_B.weight", "lora_B.bias", "alpha",
           "dora_scale", "lora_magnitude_vector", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
           "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "weight", "on_input", "diff",
           "diff_b", "w_norm", "b_norm", "bias", "oft_blocks", "default.lora_A.weight", "x"]  # fmt: skip
SHAPES = [(2, 8), (8, 2), (2, 4, 3, 3), (8, 2, 1, 1), (2, 2, 3, 3), (8, 8), (8,), (1,), (), (0,), (2, 0), (8, 4, 3, 3), (16, 2),
          (16, 8), (1, 8), (8, 1), (4, 4), (2, 2), (3, 5), (1,) * 9]  # fmt: skip
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I8": 1, "U8": 1, "F8_E4M3": 1, "BOOL": 1}
TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": bfloat16, "I64": "<i8", "I8": "i1", "U8": "u1"}
PIECES = [
    "to_q",
    r"\.",
    ".",
    ".*",
    "(",
    ")",
    "|",
    "+",
    "?",
    "{2}",
    "[a-z]",
    "attn[12]",
    "^",
    "$",
    "a" * 90,
    "(a+)+",
    r"\1",
    "(?=",
]


@dataclass(frozen=True)
class Case:
    files: dict[str, bytes]
    length: int  # what the file is cut or stretched to, without being written
    kind: str


@dataclass(frozen=True)
class Base:
    folder: Path
    onnx: bytes  # an ONNX Runtime adapter that is read


def pairs(rng: random.Random) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Keys with types and shapes, most of which fit."""
    peft = rng.random() < 0.3
    stem = f"base_model.model.{Q}" if peft else rng.choice(STEMS[:2])
    down, up = ("lora_A", "lora_B") if peft else ("lora_down", "lora_up")
    found = {f"{stem}.{down}.weight": ("F32", (2, 8)), f"{stem}.{up}.weight": ("F32", (8, 2))}
    if rng.random() < 0.5:
        found["lora_unet_conv_in.lora_down.weight"] = "F16", (2, 4, 3, 3)
        found["lora_unet_conv_in.lora_up.weight"] = "BF16", (8, 2, 1, 1)
    if rng.random() < 0.3:
        found[f"{stem}.alpha"] = rng.choice(("F32", "I64")), ()
    for _ in range(rng.choice((0, 0, 0, 1, 2, 6))):
        key = f"{rng.choice((*STEMS, rng.choice(NAMES)))}.{rng.choice((*ENDINGS, rng.choice(NAMES)))}"
        found[key] = rng.choice(list(SIZES)), rng.choice(SHAPES)
    if rng.random() < 0.3:
        key = rng.choice(list(found))
        found[key] = rng.choice(list(SIZES)), rng.choice(SHAPES)
    return found


def numbers(kind: str, count: int, rng: random.Random) -> bytes:
    if kind not in ("F64", "F32", "F16", "BF16"):
        return rng.randbytes(SIZES[kind] * count)
    values = np.array([rng.choice((0.5, -1.0, 2.0, rng.gauss(0, 1))) for _ in range(count)], np.float32)
    if rng.random() < 0.05 and count:
        values[rng.randrange(count)] = rng.choice((np.nan, np.inf, 3e38))
    if kind == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    with np.errstate(over="ignore"):
        return values.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[kind]).tobytes()


def config(rng: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": rng.choice((True, False)),
                             "alpha_pattern": {}, "rank_pattern": {}, "fan_in_fan_out": False}  # fmt: skip
    for name in rng.sample(("alpha_pattern", "rank_pattern"), rng.choice((0, 0, 1, 2))):
        for _ in range(rng.choice((1, 1, 3, 40))):
            found[name]["".join(rng.choices(PIECES, k=rng.choice((1, 1, 2, 8))))] = 2 if name == "rank_pattern" else 8
    return found


def start(folder: Path) -> Base:
    file = folder / "a.onnx_adapter"
    write(
        file,
        {
            f"unet.{Q}.lora_A.weight": np.ones((2, 8), np.float32),
            f"unet.{Q}.lora_B.weight": np.ones((8, 2), np.float32),
        },
    )
    return Base(folder, file.read_bytes())


def case(rng: random.Random, base: Base) -> Case:
    if rng.random() < 0.1:
        data = flipped(base.onnx, rng)
        return Case({"a.onnx_adapter": data}, len(data), "onnx")
    header: dict[str, Any] = {}
    body = b""
    for key, (kind, shape) in pairs(rng).items():
        data = numbers(kind, int(np.prod(shape)), rng)
        header[key] = {"dtype": kind, "shape": list(shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    kind = rng.choice(("plain", "plain", "plain", "header", "text", "flipped", "config", "metadata", "sparse"))
    files = {"adapter_config.json": json.dumps(config(rng)).encode()} if rng.random() < 0.9 else {}
    if kind == "metadata":
        settings = {f"{rng.choice(('unet', 'text_encoder', ''))}.{key}": value for key, value in config(rng).items()}
        inner = json_text(mutated(settings, rng) if rng.random() < 0.5 else settings, rng).decode(errors="replace")
        header["__metadata__"] = {"lora_adapter_metadata": inner}
    if kind == "config":
        files["adapter_config.json"] = json_text(mutated(config(rng), rng), rng)
    text = json.dumps(header).encode()
    if kind == "header":
        text = json.dumps(mutated(header, rng)).encode()
    elif kind == "text":
        text = json_text(header, rng)
    length = rng.choice((len(text),) * 30 + (0, 1, len(text) + 1, 2**40, 2**63))
    data = struct.pack("<Q", length) + text + body
    if kind == "flipped":
        data = flipped(data, rng)
    files["adapter_model.safetensors"] = data
    return Case(files, rng.choice((len(data), 6 << 30)) if kind == "sparse" else len(data), kind)


def check(case: Case, base: Base) -> None:
    folder = base.folder / "adapter"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, data in case.files.items():
        (folder / name).write_bytes(data)
    if case.kind == "onnx":
        for layer in read_adapter(folder / "a.onnx_adapter", MODULES).layers.values():
            assert all(np.isfinite(tensor).all() for tensor in layer.tensors.values())
        return
    path = folder / "adapter_model.safetensors"
    os.truncate(path, case.length)
    try:
        survey(folder)
    finally:  # what it says of a file that is refused is checked as well
        adapter = read_adapter(folder, MODULES)
    theirs = {
        key: np.frombuffer(entry["data"], TYPES[entry["dtype"]]).reshape(entry["shape"]).astype(np.float32)
        for key, entry in deserialize(path.read_bytes())
    }
    wanted = hashlib.sha256(path.read_bytes())
    read_beside = any(key.startswith("base_model.model.") for key in theirs)
    wanted.update(case.files.get("adapter_config.json", b"") if read_beside else b"")
    assert adapter.sha256 == wanted.hexdigest()
    shapes = {(component, module.path): module for component, modules in MODULES.items() for module in modules}
    for place, layer in adapter.layers.items():
        mine = {role: tensor for role, tensor in layer.tensors.items() if role != "on_input"}
        own = [value for key, value in theirs.items() if key.startswith(adapter.names[place])]
        for role, tensor in mine.items():
            assert np.isfinite(tensor).all(), role
            assert any(tensor.shape == one.shape and (tensor == one).all() for one in own), role
        assert np.isfinite(layer.scale)
        module = shapes[place]
        with np.errstate(all="ignore"):
            bias = np.ones(module.shape[0], np.float32) if module.bias else None
            change, _ = delta(layer, np.ones(module.shape, np.float32), bias, 1.0)
            pair = low_rank(layer, module.shape)
        assert change.shape == module.shape
        if pair is not None and np.isfinite(change).all():
            again = (pair[1].astype(np.float64) @ pair[0]).reshape(module.shape)
            assert np.allclose(again, change, rtol=1e-3, atol=1e-3 * (1 + np.abs(change).max()))
