"""diffusers, as its documentation has it: eager, or its UNet compiled. Adapters stay apart from the weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from suite.cases import Workload
from suite.models import DDIM, HINT, Model


def pipeline(model: Model, precision: str, *, control: bool) -> Any:
    from diffusers import (
        ControlNetModel,
        DDIMScheduler,
        StableDiffusionControlNetPipeline,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    kind = StableDiffusionXLPipeline if model.name == "sdxl" else StableDiffusionPipeline
    if model.name != "sdxl":
        options |= {"safety_checker": None, "requires_safety_checker": False}
    if control:
        options["controlnet"] = ControlNetModel.from_pretrained(model.control, dtype=dtype, local_files_only=True)
        kind = StableDiffusionControlNetPipeline
    made = kind.from_pretrained(model.folder, **options)
    made.scheduler = DDIMScheduler.from_config(made.scheduler.config, **DDIM)
    made.set_progress_bar_config(disable=True)
    return made


class Diffusers:
    def __init__(self, name: str, model: Model, precision: str, like: Sequence[Workload], kind: str) -> None:
        self.pipelines: dict[bool, Any] = {}
        for control in sorted({one.control is not None for one in like}):
            pipe = pipeline(model, precision, control=control)
            for adapter in dict.fromkeys(name for one in like for name, _ in one.adapters):
                path = model.adapter(adapter)
                load_adapter(pipe, path, adapter)
            self.pipelines[control] = pipe
        if kind == "merged":
            for pipe in self.pipelines.values():
                pipe.set_adapters([n for n, _ in like[0].adapters], [s for _, s in like[0].adapters])
                pipe.fuse_lora()
                pipe.unload_lora_weights()
        self.merged = kind == "merged"
        if name.endswith("torch.compile"):
            for pipe in self.pipelines.values():
                pipe.unet = torch.compile(pipe.unet)

    def draw(self, workloads: Sequence[Workload]) -> list[np.ndarray]:
        return [self.one(workload) for workload in workloads]

    def one(self, workload: Workload) -> np.ndarray:
        pipe = self.pipelines[workload.control is not None]
        if not self.merged and hasattr(pipe.unet, "peft_config"):
            if workload.adapters:
                pipe.enable_lora()
                pipe.set_adapters([n for n, _ in workload.adapters], [s for _, s in workload.adapters])
            else:
                pipe.disable_lora()
        options: dict[str, Any] = {}
        if workload.control is not None:
            image = Image.open(HINT).convert("RGB").resize((workload.size, workload.size))
            options |= {"image": image, "control_guidance_end": workload.control}
        if workload.guided < 1:
            options |= {
                "callback_on_step_end": stop_guiding(round(workload.guided * workload.steps)),
                "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
            }
        made = pipe(
            workload.prompt, width=workload.size, height=workload.size, num_inference_steps=workload.steps,
            guidance_scale=workload.guidance, generator=torch.Generator().manual_seed(workload.seed), output_type="np",
            **options,
        )  # fmt: skip
        return made.images[0]  # type: ignore[no-any-return]


def stop_guiding(step: int) -> Any:
    """The recipe of diffusers' guide to callbacks: from `step` on the conditional row alone."""

    def callback(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index + 1 == step:
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return tensors

    return callback


def load_adapter(pipe: Any, path: Path, name: str) -> None:
    """diffusers' loader; a folder that PEFT wrote has other names for the UNet's layers, and its alpha in a file of its own."""
    if not path.is_dir():
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name, local_files_only=True)
        return
    from safetensors.torch import load_file

    alpha = json.loads((path / "adapter_config.json").read_text())["lora_alpha"]
    given = load_file(path / "adapter_model.safetensors")
    state = {key.replace("base_model.model.", "unet."): value for key, value in given.items()}
    alphas = {key.replace(".lora_A.weight", ".alpha"): float(alpha) for key in state if ".lora_A." in key}
    pipe.unet.load_lora_adapter(state, prefix="unet", adapter_name=name, network_alphas=alphas)


def open_runner(name: str, model: Model, precision: str, like: Sequence[Workload], kind: str) -> Diffusers:
    return Diffusers(name, model, precision, like, kind)
