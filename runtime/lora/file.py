"""The bytes of a LoRA file: the header first, then each tensor by need, with the settings that stand beside or inside it."""

from __future__ import annotations

import hashlib
import math
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from stepforge.runtime.arrays import Float32
from stepforge.runtime.errors import AdapterError
from stepforge.runtime.files import LFS_POINTER, printable, strict_json
from stepforge.runtime.lora.peft import PeftConfig, brief

CONFIG = "adapter_config.json"
IN_FOLDERS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # PEFT's and diffusers' names
METADATA = "lora_adapter_metadata"  # diffusers' copy of PEFT's settings in the file's header
LARGEST = 8 << 30  # bytes; the largest SDXL adapters have a quarter of it
LARGEST_HEADER = 32 << 20  # bytes; 100,000 tensors have 15 MB
LARGEST_CONFIG = 4 << 20  # bytes
MOST_AXES = 8
CHUNK = 1 << 22  # numbers that are read at a time
# safetensors' types as NumPy's
STORED: dict[str, Any] = {
    "BF16": bfloat16, "F64": "<f8", "F32": "<f4", "F16": "<f2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A tensor of a file, read when it is asked for."""

    shape: tuple[int, ...]
    read: Callable[[bool], Float32 | None]  # checked for NaN and infinity; False: checked, and not kept

    @classmethod
    def of(cls, array: Float32) -> Tensor:
        return cls(array.shape, lambda _: array)

    @property
    def outline(self) -> Float32:
        """An array of its shape that takes no memory."""
        return np.broadcast_to(np.float32(0), self.shape)

    def load(self) -> Float32:
        """Raises AdapterError for numbers that are not finite, and for whole ones that stand for others (quantised)."""
        array = self.read(True)
        assert array is not None
        return array

    def check(self) -> None:
        """Read in passing. Raises AdapterError, see `load`."""
        self.read(False)


@dataclass(frozen=True, slots=True)
class Contents:
    """Tensors under their own names, and PEFT's settings by the prefix of the names that they rule."""

    name: str
    tensors: Mapping[str, Tensor]
    configs: Mapping[str, PeftConfig] = field(default_factory=dict)
    sha256: Callable[[], str] = str  # digest of all that was read


@contextmanager
def opened(path: Path) -> Iterator[Contents]:
    """A safetensors file, or the one in a PEFT or diffusers folder; its tensors can be read within the block.

    Raises AdapterError if there is none, or if it is another format.
    """
    try:
        path = _found(path)
        with path.open("rb") as file:
            yield _contents(path, file)
    except OSError as error:
        raise AdapterError(f"{printable(path)} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a name with a NUL
        raise AdapterError(f"{printable(path)} cannot be read: {error}") from error


def _found(path: Path) -> Path:
    shown = printable(path)
    if path.is_dir():
        found = [path / name for name in IN_FOLDERS if (path / name).is_file()]
        if not found:
            raise AdapterError(f"{shown} holds no LoRA; expected {' or '.join(IN_FOLDERS)} in it")
        path = found[0]
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise AdapterError(f"{shown} does not exist; give a .safetensors file, or a PEFT folder") from None
    if not stat.S_ISREG(mode):
        raise AdapterError(f"{shown} is not a plain file; give a .safetensors file, or a PEFT folder")
    if path.suffix not in (".safetensors", ".onnx_adapter"):
        raise AdapterError(
            f"{shown} is not a .safetensors (or .onnx_adapter) file; "
            "no others are read, because pickle files can run code"
        )
    if path.stat().st_size > LARGEST:
        raise AdapterError(f"{shown} has {path.stat().st_size >> 20} MiB; adapters have at most {LARGEST >> 20}")
    return path


def _contents(path: Path, file: BinaryIO) -> Contents:
    shown = printable(path)
    if file.read(len(LFS_POINTER)) == LFS_POINTER:
        raise AdapterError(f"{shown} is a Git LFS pointer, not the adapter; run `git lfs pull`")
    beside = b""
    configs: dict[str, PeftConfig] = {}
    if path.suffix == ".onnx_adapter":
        from stepforge.runtime.lora.onnx_adapter import read

        tensors = {name: _in_memory(shown, name, array) for name, array in read(path).items()}
    else:
        header, tensors = _header(shown, file)
        if any(key.startswith("base_model.model.") for key in tensors):
            beside = _beside(path)
            config = printable(path.parent / CONFIG)
            configs["base_model.model."] = PeftConfig.parse(config, _object(config, beside))
        else:
            configs = _embedded(shown, header)
    name = path.name if path.name not in IN_FOLDERS else f"{path.parent.name}/{path.name}"
    return Contents(printable(name), tensors, configs, partial(_sha256, file, beside))


def _beside(path: Path) -> bytes:
    """PEFT's settings in the file's folder."""
    config = path.parent / CONFIG
    if not config.is_file():
        raise AdapterError(
            f"{printable(path)} is in PEFT's layout but has no {CONFIG} beside it, which says how to scale it"
        )
    if config.stat().st_size > LARGEST_CONFIG:
        raise AdapterError(f"{printable(config)} is larger than {LARGEST_CONFIG >> 20} MiB")
    return config.read_bytes()


def _sha256(file: BinaryIO, beside: bytes) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while data := file.read(CHUNK):
        digest.update(data)
    digest.update(beside)
    return digest.hexdigest()


def _header(shown: str, file: BinaryIO) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file, whose header must describe every byte of it once."""
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    invalid = f"{shown} is not a valid safetensors file"
    if not 2 <= length <= min(LARGEST_HEADER, size - 8):
        raise AdapterError(f"{invalid}: its header would have {length} bytes, the file has {size}")
    entries = _object(invalid, file.read(length))
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise AdapterError(f"{invalid}: its metadata is no object")
    places: list[tuple[int, int, str]] = []
    tensors: dict[str, Tensor] = {}
    start = 8 + length
    for name, entry in entries.items():
        kind, shape, (begin, end) = _entry(invalid, name, entry)
        places.append((begin, end, name))
        if kind not in STORED:
            raise AdapterError(
                f"{shown}: {brief(name)} is stored as {brief(kind)[1:-1]}; supported: {', '.join(STORED)}"
            )
        if len(shape) > MOST_AXES or math.prod(max(n, 1) for n in shape) > LARGEST:
            raise AdapterError(f"{shown}: {brief(name)} has the shape {brief(list(shape))}")
        if end - begin != math.prod(shape) * np.dtype(STORED[kind]).itemsize:
            raise AdapterError(f"{invalid}: {brief(name)} has {end - begin} bytes, which is not what its shape takes")
        tensors[name] = Tensor(shape, partial(_read, shown, name, kind, shape, file, start + begin))
    at = 0
    for begin, end, name in sorted(places):
        if begin != at:
            raise AdapterError(f"{invalid}: {brief(name)} does not begin where the tensor before it ends")
        at = end
    if start + at != size:
        raise AdapterError(f"{invalid}: its header describes {start + at} bytes, the file has {size}")
    return metadata, tensors


def _entry(invalid: str, name: str, entry: object) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    if isinstance(entry, dict):
        kind, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if isinstance(kind, str) and _sizes(shape) and _sizes(offsets) and len(offsets) == 2:  # type: ignore[arg-type]
            begin, end = offsets  # type: ignore[misc]
            if begin <= end:
                return kind, tuple(shape), (begin, end)  # type: ignore[arg-type]
    raise AdapterError(f"{invalid}: it does not say what {brief(name)} is")


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _read(
    shown: str, name: str, kind: str, shape: tuple[int, ...], file: BinaryIO, start: int, keep: bool
) -> Float32 | None:
    stored, count = np.dtype(STORED[kind]), math.prod(shape)
    _check_kind(shown, name, stored, count)
    result = np.empty(count if keep else 0, np.float32)
    file.seek(start)
    for at in range(0, count, CHUNK):
        wanted = min(CHUNK, count - at)
        data = file.read(wanted * stored.itemsize)
        if len(data) != wanted * stored.itemsize:
            raise AdapterError(f"{shown} was cut while it was read")
        numbers = _finite(shown, name, np.frombuffer(data, stored))
        if keep:
            result[at : at + wanted] = numbers
    return result.reshape(shape) if keep else None


def _in_memory(shown: str, name: str, array: NDArray[Any]) -> Tensor:
    _check_kind(shown, name, array.dtype, array.size)
    return Tensor.of(_finite(shown, name, array))


def _check_kind(shown: str, name: str, stored: np.dtype[Any], count: int) -> None:
    """Whole numbers are an alpha or a mark; as weights they are quantised, and by what scale the file does not say."""
    if stored.kind not in "iu" or count <= 1:
        return
    raise AdapterError(f"{shown}: {brief(name)} is stored as {stored.name}; quantised adapters are not supported")


def _finite(shown: str, name: str, values: NDArray[Any]) -> Float32:
    """As float32."""
    with np.errstate(over="ignore"):  # what does not fit float32 is infinite, and refused
        array = values.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise AdapterError(f"{shown}: {brief(name)} holds NaN or infinity")
    return array


def _embedded(shown: str, metadata: Mapping[str, Any]) -> dict[str, PeftConfig]:
    """PEFT's settings as diffusers writes them: {"unet.r": 4, "unet.lora_alpha": 8, "text_encoder.r": ...}; by
    `unet.save_lora_adapter` without a prefix, as the file's keys are."""
    text = metadata.get(METADATA)
    if text is None:
        return {}
    what = f"{shown}: {METADATA}"
    if not isinstance(text, str):
        raise AdapterError(f"{what} is no text")
    options: dict[str, dict[str, Any]] = {}
    for key, value in _object(what, text.encode()).items():
        component, dot, option = key.rpartition(".")
        options.setdefault(component + dot, {})[option] = value
    return {prefix: PeftConfig.parse(what, values) for prefix, values in options.items()}


def _object(what: str, data: bytes) -> dict[str, Any]:
    """A JSON object in which no name is given twice."""
    try:
        value = strict_json(data)
    except ValueError as error:
        raise AdapterError(f"{what}: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{what}: not a JSON object")
    return value
