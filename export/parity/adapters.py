"""LoRA files merged into the reference by diffusers and PEFT; by stepforge's reading only where those do not read a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepforge.export.lora.merge import Merged, merge
from stepforge.export.models.files import read_json
from stepforge.export.models.networks import named_modules
from stepforge.export.models.weights import opened
from stepforge.export.parity.loaders import quiet
from stepforge.export.parity.staging import reason, staging, write_json
from stepforge.runtime.bundle import ComponentId
from stepforge.runtime.errors import AdapterError

PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
PEFT_OPTIONS = (  # what says how weights are changed; others name modules to import or models to fetch
    "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora",
    "use_dora", "bias", "lora_bias", "fan_in_fan_out", "layers_to_transform", "layers_pattern",
)  # fmt: skip


def merge_adapters(pipeline: Any, files: Sequence[tuple[Path, float]], merged: Sequence[Merged]) -> tuple[str, ...]:
    """Merge LoRA files into the networks of a pipeline; returns a line for each that stepforge has read.

    files: paths and strengths. merged: the exporter's reading of the same. Changes are of the pristine weights: where DoRA
    stands beside another file, which PEFT would merge after it, stepforge merges all.
    """
    assumed = []
    several_dora = len(files) > 1 and any(
        layer.magnitude is not None for one in merged for layer in one.adapter.layers.values()
    )
    for (path, strength), one in zip(files, merged, strict=True):
        try:
            if several_dora:
                raise AdapterError("PEFT merges DoRA of weights that another file has changed")
            with quiet():
                _merge(pipeline, path, strength, one)
        except MemoryError:
            raise
        except Exception as error:  # diffusers and PEFT raise whatever a strange file runs into
            assumed.append(f"LoRA {one.adapter.file} is merged as stepforge reads it: {reason(error)}")
            _unload(pipeline)
            if not several_dora:
                _merge_as_read(pipeline, [one])
    if several_dora:
        _merge_as_read(pipeline, merged)
    return tuple(assumed)


def _merge(pipeline: Any, path: Path, strength: float, one: Merged) -> None:
    """By diffusers, or by PEFT for its own folders. Raises before any weight has changed."""
    if odd := sorted({layer.kind for layer in one.adapter.layers.values()} - {"lora"}):
        raise AdapterError(f"diffusers merges no {odd[0]}")
    folder = path if path.is_dir() else path.parent
    if (folder / PEFT_CONFIG).is_file() and (path.is_dir() or path.name == PEFT_FILE):
        _merge_peft(pipeline, folder, strength, one)
        return
    file = path / one.adapter.file if path.is_dir() else path
    with opened(file) as weights:
        if "megatron" in json.dumps(weights.metadata() or {}):  # names a module to import
            raise AdapterError("its metadata name code")
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, local_files_only=True, use_safetensors=True)
    components = list(pipeline.get_list_adapters())
    _check_coverage(pipeline, one)
    pipeline.fuse_lora(components=components, lora_scale=strength)
    pipeline.unload_lora_weights()


def _merge_peft(pipeline: Any, folder: Path, strength: float, one: Merged) -> None:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    [component] = one.adapter.components
    config = read_json(folder / PEFT_CONFIG)
    with staging() as place:
        write_json(place / PEFT_CONFIG, {key: config[key] for key in PEFT_OPTIONS if key in config})
        (place / PEFT_FILE).symlink_to((folder / PEFT_FILE).resolve())
        wrapped = PeftModel.from_pretrained(getattr(pipeline, component.name), str(place), local_files_only=True)
    setattr(pipeline, component.name, wrapped.get_base_model())
    _check_coverage(pipeline, one)
    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(strength)
    setattr(pipeline, component.name, wrapped.merge_and_unload())


def _check_coverage(pipeline: Any, one: Merged) -> None:
    """Raises AdapterError if diffusers has left out layers of the file that the exporter reads, which it does in silence."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {
        (component, path)
        for component in one.adapter.components
        for path, module in named_modules(getattr(pipeline, component.name)).items()
        if isinstance(module, BaseTunerLayer)
    }
    if left := sorted(set(one.adapter.layers) - found):
        raise AdapterError(f"diffusers leaves out {len(left)} of its layers, such as {left[0][1]}")


def _unload(pipeline: Any) -> None:
    """Remove what a loader has left in the networks before it gave up; their weights are as they were."""
    for name in ("unet", "text_encoder", "text_encoder_2"):
        network: Any = getattr(pipeline, name, None)
        if getattr(network, "peft_config", None):
            from peft.tuners.tuners_utils import BaseTunerLayer

            for path, module in list(network.named_modules()):
                if isinstance(module, BaseTunerLayer):
                    parent, _, leaf = path.rpartition(".")
                    setattr(network.get_submodule(parent), leaf, module.get_base_layer())
            del network.peft_config


def _merge_as_read(pipeline: Any, merged: Sequence[Merged]) -> None:
    components: dict[ComponentId, None] = dict.fromkeys(key for one in merged for key in one.adapter.components)
    for component in components:
        layers = [
            ({path: layer for (where, path), layer in one.adapter.layers.items() if where == component}, one.strength)
            for one in merged
        ]
        merge(getattr(pipeline, component.name), layers, str(component))
