"""Files of a model to weights: safetensors only, nothing that a model says is ever run or imported."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from stepforge.export.models.files import check_file, parse_json, read_json, reading
from stepforge.runtime.bundle import NAME
from stepforge.runtime.errors import CheckpointError
from stepforge.runtime.files import printable

Loader = Callable[[torch.dtype], Any]  # dtype of the weights -> network on the CPU, in eval mode
State = dict[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]  # name of a weight -> its shape

FLOATS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}  # safetensors' names
CASTS = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}  # plain casts, as ComfyUI saves them
WHOLE_NUMBERS = {
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint64: "U64",
    torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
TYPES = {name: dtype for dtype, name in (FLOATS | CASTS | WHOLE_NUMBERS).items()}
# Scales beside float8 or integer weights: ComfyUI's and NVIDIA's names. Without them the weights are numbers of no meaning.
SCALED = re.compile(r"(.*\.)?(scaled_fp8|comfy_quant|scale_weight|scale_input|weight_scale(_2)?|input_scale)")
MOST_HEADER = 32 << 20  # bytes; that of SDXL has 0.3 MB
MOST_WEIGHTS = 20_000  # weights of one file
MOST_AXES, LONGEST_AXIS = 8, 1 << 40
STEMS = ("diffusion_pytorch_model", "model")
VARIANTS = ("fp16", "bf16")  # taken in this order, other ones if there is one only
SHARD = re.compile(r"-\d{5}-of-\d{5}")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
NOT_READ = "only floating-point weights are read, float8 casts among them, no quantized ones"
ONLY_SAFETENSORS = "only .safetensors weights are read, because pickle files can run code"
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.17


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says before its weights."""

    kinds: Mapping[str, str]  # name of a weight -> safetensors' name of its type
    shapes: Shapes
    metadata: Mapping[str, str]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one component: whole, or the shards that an index names, else those of a variant.

    Raises CheckpointError if there are none, or several variants of which none is known.
    """
    for stem in STEMS:
        names = [file.name for file in folder.iterdir() if file.name.startswith(f"{stem}.")]
        others = sorted({own for name in names if (own := _variant(name)) and own not in VARIANTS})
        for variant in ("", *(f".{name}" for name in (*VARIANTS, *others))):
            whole = f"{stem}{variant}.safetensors"
            indices = [f"{stem}.safetensors.index{variant}.json", f"{stem}.safetensors{variant}.index.json"]
            found = [name for name in (whole, *indices) if name in names]
            if found and variant[1:] in others[:1] and others[1:]:
                raise CheckpointError(
                    f"{folder} has weights of several variants, {first_few(others)}; keep one of them"
                )
            if found:
                return [folder / whole] if found[0] == whole else _shards(folder / found[0])
    if pickled := [file.name for file in sorted(folder.iterdir()) if file.suffix in PICKLES]:
        raise CheckpointError(f"{folder} has {pickled[0]} but no safetensors file; {ONLY_SAFETENSORS}")
    if odd := [file.name for file in sorted(folder.iterdir()) if file.suffix == ".safetensors"]:
        raise CheckpointError(
            f"{folder} has {printable(first_few(odd))}, none of it under a known name; expected "
            f"{STEMS[0]}.safetensors or {STEMS[1]}.safetensors"
        )
    raise CheckpointError(f"{folder} has no weights; expected {STEMS[0]}.safetensors or {STEMS[1]}.safetensors")


def _variant(name: str) -> str | None:
    """The variant that a file of whole weights, or an index of shards, is named for."""
    parts = SHARD.sub("", name).split(".")[1:]
    parts = [part for part in parts if part not in ("safetensors", "index", "json")]
    known = NAME.fullmatch(name) and name.endswith((".safetensors", ".json")) and ".safetensors" in name
    return parts[0] if known and not SHARD.search(name) and len(parts) == 1 else None


def variant_of(files: Sequence[Path]) -> str | None:
    """The variant of a component's files; None: the plain ones."""
    parts = SHARD.sub("", files[0].name).split(".")
    return parts[1] if len(parts) == 3 else None


def _shards(index: Path) -> list[Path]:
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(shard, str) for shard in named.values()):
        raise CheckpointError(f"{index} has no weight_map from the names of weights to those of shards")
    shards = sorted(set(named.values()))
    for shard in shards:
        if not NAME.fullmatch(shard) or not (index.parent / shard).is_file():
            raise CheckpointError(f"{index} names the shard {shard!r:.80}, which is not in its folder")
    return [index.parent / shard for shard in shards]


def check_safetensors(path: Path) -> None:
    """Refuse pickle by its first bytes, whatever the file is called, and Git LFS pointers."""
    size = check_file(path)
    with path.open("rb") as file:
        magic = file.read(9)
    # safetensors begins with the length of its header in eight bytes, then {: any first byte is possible, 0x80 and PK as well
    header = magic[8:] == b"{" and int.from_bytes(magic[:8], "little") < size
    pickled = not header and (magic[:2] == b"PK" or magic[:1] == b"\x80")
    if pickled or path.suffix in PICKLES:
        raise CheckpointError(f"{path} is a pickle file; {ONLY_SAFETENSORS}")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is not a .safetensors file; {ONLY_SAFETENSORS}")


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file; its tensors are views of the mapped file until they are changed."""
    with reading(path):
        check_safetensors(path)
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a valid safetensors file: {printable(error)}") from error


def read_header(path: Path) -> Header:
    """Names, types and shapes of all weights. Raises CheckpointError, also for a name that is given twice."""
    with reading(path):
        check_safetensors(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MOST_HEADER:
                raise CheckpointError(f"{path} has a header of {length} bytes; at most {MOST_HEADER} are read")
            text = file.read(length)
    with opened(path):  # the library's own checks: places of the weights, and the file's length
        pass
    entries = parse_json(text, f"{path}: its header")
    metadata = entries.pop("__metadata__", {})
    if len(entries) > MOST_WEIGHTS:
        raise CheckpointError(f"{path} holds {len(entries)} weights; at most {MOST_WEIGHTS} are read")
    for name, entry in entries.items():
        shape = entry["shape"]
        if len(shape) > MOST_AXES or max(shape, default=0) > LONGEST_AXIS:
            raise CheckpointError(f"{path}: {printable(name, 80)} has the shape {printable(shape, 80)}")
    return Header(
        {name: entry["dtype"] for name, entry in entries.items()},
        {name: tuple(entry["shape"]) for name, entry in entries.items()},
        metadata or {},
    )


def header_state(files: Sequence[Path], prefix: str = "") -> State:
    """The weights under a prefix as their headers tell of them: tensors without contents, on the meta device.

    Raises CheckpointError for types that torch does not know, scaled float8 weights, and names that two shards hold.
    """
    state: State = {}
    for path in files:
        header = read_header(path)
        for name in header.shapes:
            if not name.startswith(prefix):
                continue
            if name in state:
                raise CheckpointError(f"{path} holds {printable(name, 80)}, and so does another shard")
            if SCALED.fullmatch(name):
                raise CheckpointError(
                    f"{path} holds scaled weights ({printable(name, 80)}); only plain floating-point weights are read"
                )
            if header.kinds[name] not in TYPES:
                raise CheckpointError(f"{path}: {printable(name, 80)} is stored as {header.kinds[name]}; {NOT_READ}")
            try:
                state[name] = torch.empty(header.shapes[name], dtype=TYPES[header.kinds[name]], device="meta")
            except (RuntimeError, TypeError) as error:
                raise CheckpointError(f"{path}: {printable(name, 80)}: {first_line(error)}") from error
    return state


def read_weights(files: Sequence[Path], dtype: torch.dtype, prefix: str = "") -> State:
    """The weights under a prefix, in `dtype`; those that are so in the file stay views of it.

    The file is mapped anew for each weight to convert: what was read through a mapping stays resident until it ends, and
    would hold the whole file beside its copy. Whole numbers stay what they are.
    """
    state: State = {}
    for path in files:
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if not name.startswith(prefix):
                    continue
                kind = file.get_slice(name).get_dtype()
                if kind == FLOATS[dtype] or TYPES.get(kind) in WHOLE_NUMBERS:
                    state[name] = file.get_tensor(name)
                else:
                    with opened(path) as again:
                        state[name] = again.get_tensor(name).to(dtype)
    return state


def check_fit(network: nn.Module, state: State, what: str) -> None:
    """Raises CheckpointError unless names and shapes are exactly the network's, and types floating-point."""
    wanted = {current_name(key): value.shape for key, value in network.state_dict().items()}
    given = {current_name(key): value for key, value in state.items() if not key.endswith("position_ids")}
    if len(given) < sum(not key.endswith("position_ids") for key in state):
        raise CheckpointError(f"{what} has weights twice, under names of two layouts")
    if missing := sorted(wanted.keys() - given.keys()):
        raise CheckpointError(f"{what} lacks {first_few(missing)}")
    # a text encoder without projection may have been saved with one
    if unknown := sorted(given.keys() - wanted.keys() - {"text_projection.weight", "logit_scale"}):
        raise CheckpointError(f"{what} has unexpected weights: {first_few([printable(name, 80) for name in unknown])}")
    if wrong := [
        f"{key} {list(given[key].shape)} instead of {list(shape)}"
        for key, shape in wanted.items()
        if given[key].shape != shape
    ]:
        raise CheckpointError(f"{what} has weights of the wrong shape: {first_few(wrong)}")
    if odd := [key for key in wanted if given[key].dtype in WHOLE_NUMBERS]:
        raise CheckpointError(f"{what}: {odd[0]} is stored as {WHOLE_NUMBERS[given[odd[0]].dtype]}; {NOT_READ}")


def fill(network: nn.Module, state: State, dtype: torch.dtype, what: str) -> nn.Module:
    """Give an empty network its weights. Raises CheckpointError unless names and shapes are exactly the network's."""
    check_fit(network, state, what)
    given = {current_name(key): value for key, value in state.items()}
    cast = {}
    for key in network.state_dict():
        name = current_name(key)
        cast[key] = given.pop(name).to(dtype)
        if not torch.isfinite(cast[key]).all():
            raise CheckpointError(f"{what}: {name} holds NaN or infinity{' in fp16' * (dtype == torch.float16)}")
    network.load_state_dict(cast, assign=True)
    return network.eval().requires_grad_(False)


def current_name(key: str) -> str:
    """One name for the layouts that libraries have written over the years."""
    key = key.removeprefix("text_model.")  # transformers 5.6 dropped the prefix from CLIPTextModel
    module, _, leaf = key.rpartition(".")
    head, _, last = module.rpartition(".")
    if "mid_block.attentions" in head and last in OLD_VAE_ATTENTION:
        return f"{head}.{OLD_VAE_ATTENTION[last]}.{leaf}"
    return key


def first_line(error: Exception) -> str:
    """First line of a library's error."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def first_few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
