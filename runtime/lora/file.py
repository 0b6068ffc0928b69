"""The bytes of a LoRA file: safetensors to float32 arrays, with the settings that stand beside or inside it."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from stepforge.runtime.arrays import Float32
from stepforge.runtime.errors import AdapterError
from stepforge.runtime.files import is_lfs_pointer
from stepforge.runtime.lora.peft import PeftConfig, brief

CONFIG = "adapter_config.json"
IN_FOLDERS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # PEFT's and diffusers' names
METADATA = "lora_adapter_metadata"  # diffusers' copy of PEFT's settings in the file's header
LARGEST = 8 << 30  # bytes; the largest SDXL adapters have a quarter of it
MOST_AXES = 8
# safetensors' types as NumPy's
STORED = {
    "BF16": bfloat16, "F64": "<f8", "F32": "<f4", "F16": "<f2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Contents:
    """Tensors under their own names, and PEFT's settings by the prefix of the names that they rule."""

    name: str
    tensors: Mapping[str, Float32]
    configs: Mapping[str, PeftConfig] = field(default_factory=dict)
    raw: tuple[bytes, ...] = ()  # what was read, for its hash


def read_file(path: Path) -> Contents:
    """Read a safetensors file, or the one in a PEFT or diffusers folder.

    Raises AdapterError if there is none, if it is another format, or if a number in it is not finite.
    """
    try:
        return _read(path)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}") from error


def _read(path: Path) -> Contents:
    if path.is_dir():
        found = [path / name for name in IN_FOLDERS if (path / name).is_file()]
        if not found:
            raise AdapterError(f"{path} holds no LoRA; expected {' or '.join(IN_FOLDERS)} in it")
        path = found[0]
    if not path.is_file():
        raise AdapterError(f"{path} does not exist; give a .safetensors file, or a PEFT folder")
    if path.suffix not in (".safetensors", ".onnx_adapter"):
        raise AdapterError(
            f"{path} is not a .safetensors (or .onnx_adapter) file; no others are read, because pickle files can run code"
        )
    if path.stat().st_size > LARGEST:
        raise AdapterError(f"{path} has {path.stat().st_size >> 20} MiB; adapters have at most {LARGEST >> 20}")
    data = path.read_bytes()
    if is_lfs_pointer(data):
        raise AdapterError(f"{path} is a Git LFS pointer, not the adapter; run `git lfs pull`")
    if path.suffix == ".onnx_adapter":
        from stepforge.runtime.lora.onnx_adapter import read

        return Contents(
            path.name, {name: _checked(path, name, array) for name, array in read(path).items()}, raw=(data,)
        )
    tensors = _tensors(path, data)
    raw, configs = [data], {}
    beside = path.parent / CONFIG
    if any(key.startswith("base_model.model.") for key in tensors):
        if not beside.is_file():
            raise AdapterError(f"{path} is in PEFT's layout but has no {CONFIG} beside it, which says how to scale it")
        raw.append(beside.read_bytes())
        configs["base_model.model."] = PeftConfig.parse(str(beside), _json(str(beside), raw[-1]))
    else:
        configs = _embedded(path, data)
    name = path.name if path.name not in IN_FOLDERS else f"{path.parent.name}/{path.name}"
    return Contents(name, tensors, configs, tuple(raw))


def _tensors(path: Path, data: bytes) -> dict[str, Float32]:
    from safetensors import SafetensorError, deserialize

    try:
        entries = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise AdapterError(f"{path} is not a valid safetensors file: {brief(error)}") from error
    tensors: dict[str, Float32] = {}
    for name, entry in entries:
        tensors[name] = _checked(path, name, _array(path, name, entry))
    return tensors


def _checked(path: Path, name: str, values: NDArray[Any]) -> Float32:
    """As float32, finite."""
    with np.errstate(over="ignore"):  # what does not fit float32 is infinite, and refused
        array = values.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise AdapterError(f"{path}: {brief(name)} holds NaN or infinity")
    return array


def _array(path: Path, name: str, entry: Mapping[str, Any]) -> NDArray[Any]:
    kind, shape = entry["dtype"], entry["shape"]
    if len(shape) > MOST_AXES or max(shape, default=0) > LARGEST:
        raise AdapterError(f"{path}: {brief(name)} has the shape {brief(shape)}")
    if kind not in STORED:
        raise AdapterError(f"{path}: {brief(name)} is stored as {kind}; supported: {', '.join(STORED)}")
    values: NDArray[Any] = np.frombuffer(entry["data"], STORED[kind])
    return values.reshape(shape)


def _embedded(path: Path, data: bytes) -> dict[str, PeftConfig]:
    """PEFT's settings as diffusers writes them: {"unet.r": 4, "unet.lora_alpha": 8, "text_encoder.r": ...}."""
    (length,) = struct.unpack("<Q", data[:8])
    header = _json(str(path), data[8 : 8 + length])
    text = (header.get("__metadata__") or {}).get(METADATA)
    if text is None:
        return {}
    options: dict[str, dict[str, Any]] = {}
    for key, value in _json(f"{path}: {METADATA}", text.encode()).items():
        component, _, option = key.partition(".")
        options.setdefault(f"{component}.", {})[option] = value
    return {prefix: PeftConfig.parse(f"{path}: {METADATA}", values) for prefix, values in options.items()}


def _json(what: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{what} is not readable JSON: {brief(error)}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{what} does not hold a JSON object")
    return value
