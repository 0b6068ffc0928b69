"""Any LoRA file to a plain low-rank one: what is a pair stays exact, the rest is cut to a rank when asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from stepforge.export.lora.merge import source_modules
from stepforge.export.models.load import load
from stepforge.export.models.networks import named_modules
from stepforge.runtime.arrays import Float32
from stepforge.runtime.bundle import ComponentId
from stepforge.runtime.errors import AdapterError
from stepforge.runtime.files import written
from stepforge.runtime.lora.adapter import read_adapter
from stepforge.runtime.lora.layers import delta, low_rank

FORMATS = (".safetensors", ".onnx_adapter")


@dataclass(frozen=True, slots=True)
class Converted:
    """Fate of one layer."""

    component: ComponentId
    module: str
    kind: str
    rank: int | None  # rank of the pair that was written; None if the layer was left out
    error: float  # ‖ΔW − up·down‖ / ‖ΔW‖; 1 if the layer was left out
    note: str = ""


def convert(file: Path, model: Path, out: Path, *, rank: int | None = None, **source_options: Any) -> list[Converted]:
    """Write a LoRA as diffusers' layout, scales folded in, for the run-time banks or for ONNX Runtime (.onnx_adapter).

    model: the base model; its weights are read only where the change depends on them (DoRA, IA3).
    rank: cut layers that are not low-rank to this rank by SVD; without it they are an error. Biases and norms cannot be
    written and are reported as left out. Raises AdapterError, CheckpointError.
    """
    if out.suffix not in FORMATS:
        raise AdapterError(f"{out} has an unknown suffix; choose one of {', '.join(FORMATS)}")
    if out.exists():
        raise AdapterError(f"{out} exists; choose another place")
    source = load(model, **source_options)
    modules = source_modules(source)
    adapter = read_adapter(file, modules)
    shapes = {(component, m.path): m.shape for component, entries in modules.items() for m in entries}

    @cache
    def layers(component: ComponentId) -> dict[str, Any]:
        """Layers of a network, which is read when the first of them is asked for."""
        return named_modules(source.adaptable[component](torch.float32))

    tensors: dict[str, Float32] = {}
    done = []
    for (component, path), layer in adapter.layers.items():
        shape = shapes[component, path]
        pair, error, note = low_rank(layer, shape), 0.0, ""
        if pair is None:
            if rank is None:
                raise AdapterError(
                    f"{adapter.file}: {component} {path} is {layer.name}, no low-rank pair; give a --rank"
                )
            if len(shape) < 2:
                done.append(Converted(component, path, layer.name, None, 1.0, "left out: a norm has no low-rank form"))
                continue
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused
                change, bias = delta(layer, *_weights(layers(component)[path]), 1.0)
            if not np.isfinite(change).all():
                raise AdapterError(f"{adapter.file}: {component} {path} is infinite once it is scaled")
            pair, error = truncate(change.reshape(shape[0], -1), rank)
            note = "" if bias is None else "its bias is left out"
        down, up = pair
        if not (np.isfinite(down).all() and np.isfinite(up).all()):  # after a cut, too
            raise AdapterError(f"{adapter.file}: {component} {path} is infinite once it is scaled")
        stem = f"{component.name}.{path}"  # network as diffusers calls it, and layer
        tensors[f"{stem}.lora_A.weight"] = np.ascontiguousarray(down.reshape(len(down), *shape[1:]))
        tensors[f"{stem}.lora_B.weight"] = np.ascontiguousarray(up.reshape(shape[0], -1, *(1 for _ in shape[2:])))
        done.append(Converted(component, path, layer.name, len(down), error, note))
    _write(out, tensors)
    return done


def _write(out: Path, tensors: Mapping[str, Float32]) -> None:
    """In one atomic step. Raises AdapterError."""
    try:
        with written(out) as file:
            if out.suffix == ".safetensors":
                file.write(save(dict(tensors), metadata={"format": "pt"}))
            else:
                from stepforge.runtime.lora.onnx_adapter import write

                write(Path(file.name), tensors)
    except OSError as error:
        raise AdapterError(f"{out} cannot be written: {error.strerror or error}") from error


def truncate(change: Float32, rank: int) -> tuple[tuple[Float32, Float32], float]:
    """The best pair of a rank, (down, up), and its relative error (Eckart-Young)."""
    matrix = torch.from_numpy(change)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    down, up = root[:, None] * vh[:rank], u[:, :rank] * root
    norm = float(s.square().sum())
    return (down.numpy(), up.numpy()), (float(s[rank:].square().sum()) / norm) ** 0.5 if norm else 0.0


def _weights(module: Any) -> tuple[Float32, Float32 | None]:
    """Weight and bias of a layer of the base model."""
    bias = getattr(module, "bias", None)
    return module.weight.detach().numpy(), None if bias is None else bias.detach().numpy()
