"""What the networks of a diffusers pipeline were given and made during one run, as inputs and outputs of a bundle's graphs.

The reference's numbers are taken where its networks meet its loop, so that a network of the bundle is compared on what
diffusers' pipeline chose to feed it, and what the pipeline took of its outputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stepforge.export.graph.rewire import RESIDUAL
from stepforge.runtime.arrays import Float32
from stepforge.runtime.bundle import TEXT_ENCODERS, UNET, VAE_DECODER, ComponentId

Arrays = Mapping[str, NDArray[Any]]
Heard = tuple[tuple[Any, ...], dict[str, Any], Any]  # arguments by place and by name, and what came out


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a network: a graph of the bundle gives these outputs for these inputs."""

    component: ComponentId
    name: str  # label of the check
    inputs: Arrays
    outputs: Arrays  # values by the graph's names; one output `residuals` is all residuals of a ControlNet together


class Recorder:
    """A context in which calls of some modules are kept, by name of the module."""

    def __init__(self, **modules: torch.nn.Module) -> None:
        self.heard: defaultdict[str, list[Heard]] = defaultdict(list)
        self._modules = modules

    def __enter__(self) -> Recorder:
        self._handles = [
            module.register_forward_hook(partial(self._hear, name), with_kwargs=True)
            for name, module in self._modules.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hear(self, name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.heard[name].append((_copied(args), _copied(kwargs), _copied(output)))


def plain_recorder(pipeline: Any) -> Recorder:
    """Text encoders, denoiser and decoder."""
    modules = {"unet": pipeline.unet, "decoder": pipeline.vae.decoder}
    return Recorder(**modules, **{key.name: getattr(pipeline, key.name) for key in _encoders(pipeline)})


def plain_calls(pipeline: Any, recorder: Recorder, latents: Float32) -> Iterator[Call]:
    """Text encoders on the prompts, denoiser at start, middle and end, decoder on the last latents [C, h, w]."""
    heard = recorder.heard
    yield from _text_calls(pipeline, recorder, _denoiser_inputs(heard["unet"][0]))
    yield from denoiser_calls(UNET, "denoiser", heard["unet"])
    pixels = heard["decoder"][-1][2]
    yield Call(VAE_DECODER, VAE_DECODER.label, {"latents": latents[None]}, {"pixels": as_array(pixels)})


def denoiser_calls(key: ComponentId, label: str, heard: list[Heard]) -> Iterator[Call]:
    """A UNet at start, middle and end of what it was asked; nothing if it was not."""
    for index in places(len(heard)) if heard else ():
        inputs, (_, _, output) = _denoiser_inputs(heard[index]), heard[index]
        yield Call(key, f"{label} t={inputs['timestep'][0]:g}", inputs, {"prediction": as_array(output[0])})


def _text_calls(pipeline: Any, recorder: Recorder, denoiser: Arrays) -> Iterator[Call]:
    """What the denoiser read of each encoder: its own columns of the hidden states, and the pooled text.

    Rows are the negative prompt and the prompt, or the prompt alone where the pipeline has zeros for the other.
    """
    start = 0
    for key in _encoders(pipeline):
        network = getattr(pipeline, key.name)
        ids = [as_array(args[0]) for args, _, _ in recorder.heard[key.name]][1::-1]  # the prompt came first
        rows = slice(2 - len(ids), 2)
        end = start + network.config.hidden_size
        outputs = {"hidden_states": denoiser["encoder_hidden_states"][rows, :, start:end]}
        if hasattr(network, "text_projection"):
            outputs["pooled"] = denoiser["text_embeds"][rows]
        yield Call(key, key.label, {"input_ids": np.concatenate(ids)}, outputs)
        start = end


def control_recorder(network: Any) -> Recorder:
    return Recorder(control=network, hint=network.controlnet_cond_embedding)


def control_calls(name: str, recorder: Recorder) -> Iterator[Call]:
    """The hint encoder, and all residuals together at start, middle and end."""
    hint_key, key = ComponentId("control_hint", name), ComponentId("control_residuals", name)
    calls = recorder.heard["control"]
    image, hint = as_array(calls[0][1]["controlnet_cond"]), as_array(recorder.heard["hint"][0][2])
    yield Call(hint_key, str(hint_key), {"image": image}, {"hint": hint})
    for index in places(len(calls)):
        down, mid = calls[index][2]
        residuals = [as_array(value) for value in (*down, mid)]
        inputs = _denoiser_inputs(calls[index])
        # a pipeline runs a ControlNet with pooled residuals on the conditional row alone
        inputs |= {"hint": hint, "scale": np.ones((len(inputs["sample"]), len(residuals)), np.float32)}
        outputs = {f"{RESIDUAL}{number}": value for number, value in enumerate(residuals)}
        yield Call(key, f"{key} t={inputs['timestep'][0]:g}", inputs, outputs)


def places(calls: int) -> list[int]:
    """Start, middle and end of a trajectory."""
    return sorted({0, calls // 2, calls - 1})


def _encoders(pipeline: Any) -> list[ComponentId]:
    return [key for key in TEXT_ENCODERS if getattr(pipeline, key.name, None) is not None]


def _denoiser_inputs(call: Heard) -> dict[str, NDArray[Any]]:
    """Inputs of a denoiser or a ControlNet under the names of a bundle's graphs."""
    (sample, t), kwargs, _ = call
    inputs = {
        "sample": as_array(sample),
        "timestep": np.full(len(sample), float(t), np.float32),
        "encoder_hidden_states": as_array(kwargs["encoder_hidden_states"]),
    }
    added = kwargs.get("added_cond_kwargs") or {}
    return inputs | {name: as_array(added[name]) for name in ("text_embeds", "time_ids") if name in added}


def as_array(value: torch.Tensor) -> NDArray[Any]:
    array: NDArray[Any] = (value.float() if value.is_floating_point() else value).numpy()
    return array


def _copied(value: Any) -> Any:
    """Tensors in tuples and dicts as copies, since a pipeline changes some of its own in place; other values as they are."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, list | tuple):
        return tuple(_copied(each) for each in value)
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return value
