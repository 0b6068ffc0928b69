"""Merge LoRA files into the networks of a model: W + Σ strength·ΔW in float32, each ΔW against the pristine W."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepforge.export.models.networks import modules_of, named_modules
from stepforge.export.models.source import Source
from stepforge.export.models.weights import Loader
from stepforge.runtime.bundle import ComponentId, Module
from stepforge.runtime.errors import AdapterError
from stepforge.runtime.lora.adapter import Adapter, read_adapter
from stepforge.runtime.lora.layers import Layer, delta


@dataclass(frozen=True, slots=True)
class Merged:
    """One adapter of a merge."""

    adapter: Adapter
    strength: float


def read_all(source: Source, files: Sequence[tuple[Path, float]]) -> list[Merged]:
    """Read LoRA files for a model, in order. Raises AdapterError."""
    modules = source_modules(source)
    merged = [Merged(read_adapter(path, modules), strength) for path, strength in files]
    for one in merged:
        one.adapter.warn_of_refused()
    return merged


def source_modules(source: Source) -> dict[ComponentId, tuple[Module, ...]]:
    """Component -> its modules, from empty networks: no weights are read."""
    return {component: modules_of(build()) for component, build in source.empty.items()}


def with_adapters(source: Source, merged: Sequence[Merged]) -> Source:
    """The model whose loaders give merged weights."""
    if not merged:
        return source

    def loader(component: ComponentId, load: Loader) -> Loader:
        mine = [
            ({path: layer for (where, path), layer in one.adapter.layers.items() if where == component}, one.strength)
            for one in merged
            if component in one.adapter.components
        ]
        return lambda dtype: merge(load(torch.float32), mine, str(component)).to(dtype) if mine else load(dtype)

    unet, *text_encoders = (loader(component, load) for component, load in source.adaptable.items())
    return replace(
        source,
        unet=unet,
        text_encoders=tuple(text_encoders),
        provenance={
            **source.provenance,
            "adapters": [{"file": m.adapter.file, "sha256": m.adapter.sha256, "strength": m.strength} for m in merged],
        },
    )


@torch.no_grad()
def merge(network: Any, adapters: Sequence[tuple[Mapping[str, Layer], float]], what: str = "the network") -> Any:
    """Change a float32 network in place; adapters: path of a module -> its layer, and the strength.

    Changes are summed before they are added, so the order of the adapters does not matter, and each is computed from the
    weights as they were. Strength 0 means no adapter, also for DoRA, whose formulas do not end in the pristine weight.
    Raises AdapterError if a merged weight is not finite.
    """
    adapters = [(layers, strength) for layers, strength in adapters if strength]
    modules = named_modules(network)
    for path in dict.fromkeys(path for layers, _ in adapters for path in layers):
        module = modules[path]
        weight = module.weight.detach().numpy()
        bias = None if getattr(module, "bias", None) is None else module.bias.detach().numpy()
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
            changes = [delta(layers[path], weight, bias, strength) for layers, strength in adapters if path in layers]
            new = {"weight": weight + sum(change for change, _ in changes)}
            biases = [change for _, change in changes if change is not None]
            if biases and bias is not None:
                new["bias"] = bias + sum(biases)
        if not all(np.isfinite(values).all() for values in new.values()):
            raise AdapterError(f"merging makes {what} {path} infinite; use smaller strengths")
        for name, values in new.items():
            setattr(module, name, torch.nn.Parameter(torch.from_numpy(values), requires_grad=False))
    return network
