"""ControlNets of the reference: by `ControlNetModel`'s own loaders, and by the exporter's reading only where those fail."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from accelerate import init_empty_weights
from diffusers import ControlNetModel

from stepforge.export.build import read_controls
from stepforge.export.models.controlnet import ControlSource
from stepforge.export.models.source import Source
from stepforge.export.parity.loaders import FP32, check_complete, quiet, variant_among
from stepforge.export.parity.staging import reason, stage_component, staging, write_json
from stepforge.runtime.bundle import Bundle
from stepforge.runtime.errors import CheckpointError

POOL = "global_pool_conditions"


def exported_controls(bundle: Bundle, source: Source, controls: Mapping[str, str | Path]) -> list[ControlSource]:
    """The ControlNets that the bundle was exported with. Raises CheckpointError if others are given, or not all."""
    if set(controls) != set(bundle.controls):
        needed = " ".join(f"--control {name}=PATH" for name in bundle.controls) or "no --control"
        raise CheckpointError(f"{bundle.path} was exported with other ControlNets; verify it with {needed}")
    nets = read_controls(source, controls)
    known = bundle.source.get("controls", {})
    for net in nets:
        if net.provenance.get("sha256") != known[net.name].get("sha256"):
            raise CheckpointError(
                f"{bundle.path} was exported from another ControlNet {net.name} than {controls[net.name]}"
            )
    return nets


def load_network(path: Path, net: ControlSource, unet: Any) -> tuple[Any, tuple[str, ...]]:
    """A ControlNetModel in fp32, and a line for each of its settings that stepforge has read.

    unet: the base model's, whose config a single file shares, as `ControlNetModel.from_unet` has it.
    """
    with quiet():
        try:
            network = _load(path, net, unet)
        except MemoryError:
            raise
        except Exception as error:  # diffusers raises whatever a strange file runs into
            return net.network(FP32), (f"ControlNet {net.name} is loaded as stepforge reads it: {reason(error)}",)
    if path.is_file() and net.config.get(POOL):
        network.register_to_config(**{POOL: True})  # no single file states it
        return network, (f"ControlNet {net.name}: residuals are pooled, as its file's name says",)
    return network, ()


def _load(path: Path, net: ControlSource, unet: Any) -> Any:
    with staging() as place:
        if path.is_dir():
            files = list(net.provenance["sha256"])
            stage_component(path, files, place)
            network = ControlNetModel.from_pretrained(
                str(place),
                torch_dtype=FP32,
                use_safetensors=True,
                local_files_only=True,
                variant=variant_among(files),
            )
        else:
            with init_empty_weights():
                config = ControlNetModel.from_unet(unet, load_weights_from_unet=False).config
            write_json(place / "config.json", {**config, "_class_name": "ControlNetModel"})
            network = ControlNetModel.from_single_file(
                str(path.resolve()), config=str(place), local_files_only=True, torch_dtype=FP32
            )
    check_complete(network, net.name)
    return network


def control_pipeline(pipeline: Any, network: Any) -> Any:
    """diffusers' ControlNet pipeline over the networks of a plain one."""
    xl = isinstance(pipeline, diffusers.StableDiffusionXLPipeline)
    options: dict[str, Any] = {"controlnet": network}
    if xl:
        options |= {
            "force_zeros_for_empty_prompt": pipeline.config.force_zeros_for_empty_prompt,
            "add_watermarker": False,
        }
    else:
        options["requires_safety_checker"] = False
    kind = diffusers.StableDiffusionXLControlNetPipeline if xl else diffusers.StableDiffusionControlNetPipeline
    made = kind(**{**pipeline.components, **options})
    made.set_progress_bar_config(disable=True)
    return made
