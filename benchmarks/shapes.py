"""A network's graph without its weights: `python benchmarks/shapes.py sdxl benchmarks/shapes/sdxl.onnx.xz`, a minute.

A denoiser, or SD 1.5's VAE decoder (`sd15_decoder`). With `--banks all` it takes adapters: two slots of rank 16 in all
layers, or in the transformers' alone. The network of that shape is traced with weights that take no memory (one number
each, expanded); of the graph everything is kept but the values of its weights, which `network_model` replaces by shapes. What
is traced is what `stepforge export` traces.
"""

from __future__ import annotations

import argparse
import itertools
import lzma
import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from stepforge.export.graph import modules, trace
from stepforge.export.graph.bank import TARGETS, add_bank, transformer_only
from stepforge.export.models.networks import modules_of

SLOTS, RANK = 2, 16

SHAPES: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


DECODER: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


def weightless(kind: str, options: dict[str, Any]) -> Any:
    """A network whose weights are one number each, none like another: equal ones would be held once, and zeros left out."""
    import diffusers

    with torch.device("meta"):
        network = getattr(diffusers, kind)(**options)
    numbers = itertools.count(2)
    for module in network.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            number = torch.tensor(1.0 / next(numbers)).expand(value.shape)
            setattr(module, name, torch.nn.Parameter(number, requires_grad=False))
        for name, value in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.tensor(1.0 / next(numbers)).expand(value.shape))
    return network


def drop_weights(model: ir.Model) -> None:
    """Large initializers become places in a file that is not there."""
    at = 0
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= trace.INLINE:
            value.const_value = ir.ExternalTensor(
                trace.DATA, at, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name
            )
            at += tensor.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=[*sorted(SHAPES), "sd15_decoder"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--banks", choices=TARGETS)
    args = parser.parse_args()
    if args.shape in SHAPES:
        network = weightless("UNet2DConditionModel", SHAPES[args.shape])
        layers, traced = modules_of(network), modules.denoiser(network)
    else:
        traced = modules.vae_decoder(weightless("AutoencoderKL", DECODER))
    model = trace.trace(traced)
    trace.name_weights(model)
    trace.clean(model)
    trace.name_axes(model, traced)
    trace.forget_shapes(model)
    drop_weights(model)
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / trace.GRAPH
        ir.save(model, graph)
        if args.banks is not None:
            add_bank([graph], layers if args.banks == "all" else transformer_only(layers), SLOTS + 1, RANK)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_bytes(lzma.compress(graph.read_bytes(), preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    main()
