"""Files of a model to weights: safetensors and JSON only, nothing that a model says is ever run or imported."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from stepforge.runtime.bundle import NAME
from stepforge.runtime.errors import CheckpointError
from stepforge.runtime.files import is_lfs_pointer

Loader = Callable[[torch.dtype], Any]  # dtype of the weights -> network on the CPU, in eval mode
State = dict[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]  # name of a weight -> its shape

FLOATS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}  # safetensors' names
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
ONLY_SAFETENSORS = "only .safetensors weights are read, because pickle files can run code"
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.17


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors of the operating system inside the block become a CheckpointError of one line."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


def refuse_code(folder: Path) -> None:
    """Raises CheckpointError if a model's folder holds Python files."""
    if code := sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.py")):
        raise CheckpointError(f"{folder} contains code ({code[0]}); models with code of their own are refused")


def refuse_lfs_pointer(path: Path) -> None:
    """Raises CheckpointError if Git has left its note in place of the file."""
    if is_lfs_pointer(path):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull")


def read_json(path: Path) -> dict[str, Any]:
    try:
        refuse_lfs_pointer(path)
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} lacks {path.name}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return data


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one component: whole, fp16 variant, or the shards that an index names."""
    stems = ("diffusion_pytorch_model", "model")
    for stem in stems:
        for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
            if (folder / name).is_file():
                return [folder / name]
        for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors.index.fp16.json"):
            if (folder / name).is_file():
                shards = sorted(set(read_json(folder / name).get("weight_map", {}).values()))
                for shard in shards:
                    if not NAME.fullmatch(shard) or not (folder / shard).is_file():
                        raise CheckpointError(f"{folder / name} names the shard {shard!r}, which is not in its folder")
                return [folder / shard for shard in shards]
    if pickled := [file.name for file in sorted(folder.iterdir()) if file.suffix in PICKLES]:
        raise CheckpointError(f"{folder} has {pickled[0]} but no safetensors file; {ONLY_SAFETENSORS}")
    raise CheckpointError(f"{folder} has no weights; expected {stems[0]}.safetensors or {stems[1]}.safetensors")


def check_safetensors(path: Path) -> None:
    """Refuse pickle by its first bytes, whatever the file is called, and Git LFS pointers."""
    refuse_lfs_pointer(path)
    with path.open("rb") as file:
        magic = file.read(9)
    # safetensors begins with the length of its header in eight bytes, then {: any first byte is possible, 0x80 and PK as well
    header = magic[8:] == b"{" and int.from_bytes(magic[:8], "little") < path.stat().st_size
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
            raise CheckpointError(f"{path} is not a valid safetensors file: {error}") from error


def shapes_of(file: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights of an opened file, from its header."""
    return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a dict


def read_weights(files: list[Path], dtype: torch.dtype, prefix: str = "") -> State:
    """The weights under a prefix, in `dtype`; those that are so in the file stay views of it.

    The file is mapped anew for each weight to convert: what was read through a mapping stays resident until it ends, and
    would hold the whole file beside its copy.
    """
    state: State = {}
    for path in files:
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if not name.startswith(prefix):
                    continue
                kind = file.get_slice(name).get_dtype()
                if kind == FLOATS[dtype] or kind not in FLOATS.values():
                    state[name] = file.get_tensor(name)
                else:
                    with opened(path) as again:
                        state[name] = again.get_tensor(name).to(dtype)
    return state


def fill(network: nn.Module, state: State, dtype: torch.dtype, what: str) -> nn.Module:
    """Give an empty network its weights. Raises CheckpointError unless names and shapes are exactly the network's."""
    wanted = {current_name(key): (key, value.shape) for key, value in network.state_dict().items()}
    given = {current_name(key): value for key, value in state.items() if not key.endswith("position_ids")}
    if missing := sorted(wanted.keys() - given.keys()):
        raise CheckpointError(f"{what} lacks {first_few(missing)}")
    # a text encoder without projection may have been saved with one
    if unknown := sorted(given.keys() - wanted.keys() - {"text_projection.weight", "logit_scale"}):
        raise CheckpointError(f"{what} has unexpected weights: {first_few(unknown)}")
    if wrong := [
        f"{k} {list(given[k].shape)} instead of {list(s)}" for k, (_, s) in wanted.items() if given[k].shape != s
    ]:
        raise CheckpointError(f"{what} has weights of the wrong shape: {first_few(wrong)}")
    if odd := [k for k in wanted if given[k].dtype not in FLOATS]:
        raise CheckpointError(f"{what}: {odd[0]} is stored as {given[odd[0]].dtype}; quantized weights are not read")
    cast = {}
    for name, (key, _) in wanted.items():
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
