"""Networks to ONNX graphs: fixed signatures, dynamic rows and sizes, one standard graph and one fused for ONNX Runtime.

    denoiser      sample [rows, C, height, width], timestep [rows], encoder_hidden_states [rows, tokens, dim]
                  (SDXL: text_embeds [rows, p], time_ids [rows, 6]; a noise level: class_labels [rows]; networks that read
                  no text: without it) -> prediction [rows, C', height, width]
    text encoder  input_ids [rows, L] int64 -> hidden_states [rows, L, dim] (SDXL's second: pooled [rows, p])
    T5            input_ids [rows, L] int64, attention_mask [rows, L] int64 -> hidden_states [rows, L, dim]
    VAE encoder   pixels [rows, 3, s·height, s·width] in [-1, 1] -> moments [rows, 2C, height, width]
    VAE decoder   latents [rows, C, height, width], as the sampler leaves them -> pixels [rows, 3, s·height, s·width]
    ControlNet    see control.py

All inputs and outputs are float32 but ids, masks and class labels of a table; a network in fp16 casts at its border. What is
embedded as sines, timesteps, noise levels and SDXL's time_ids, stays float32 up to them, and pooled text joins those before the
cast: no operator reads two types.
Height and width of latents are any numbers of at least 2: see `Upsample`; but for UNets with a `size_multiple`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim

from stepforge.export.graph.exporter import lean
from stepforge.export.graph.passes import clean, forget_shapes, name_weights
from stepforge.runtime import bundle
from stepforge.runtime.bundle import Component

# Opset 20 writes attention as MatMul, Softmax, MatMul. OpenVINO and TensorRT fuse that, and `derive` does for ONNX
# Runtime. Opset 23 has an Attention operator, but no engine was faster with it (benchmarks/bench_export.py --opsets),
# ONNX Runtime splits its GroupNormalization into nine operators, and TensorRT before 10.14 cannot read it.
OPSET = 20
GRAPH = "model.onnx"
DATA = "model.onnx.data"
DERIVED = "model.onnxruntime.onnx"
INLINE = 1024  # bytes; smaller weights stand in the graph file, where engines can fold them


Axes = Mapping[str, tuple[int | str, ...]]


@dataclass(frozen=True, slots=True)
class Traced:
    """A module ready for export: example inputs, and the shapes of its inputs and outputs as the manifest names them."""

    module: nn.Module
    example: Mapping[str, Tensor]
    inputs: Axes
    outputs: Axes
    multiple: int = 1  # height and width must be multiples of this
    least: int = 2  # ... and at least this for the trace: torch.export takes a side of 1, also inside, for a constant
    derive: bool = False  # write a graph for ONNX Runtime as well
    probes: tuple[str, ...] = ()  # further outputs: inner values that rewrites of the graph need to find again


def trace(traced: Traced, opset: int = OPSET) -> ir.Model:
    """The module as one ONNX graph without traces of the machine that made it."""
    # Rows below 64: diffusers copies activations from there on, which torch.export takes for another graph, and finds out by
    # exporting twice. The ONNX graph is the same.
    sizes = {"rows": Dim("rows", max=63), "tokens": Dim("tokens")}
    for name in ("height", "width"):
        # multiples stated as such: else torch.export finds that a hint encoder does not fit every size
        least = traced.least
        sizes[name] = traced.multiple * Dim(f"{name}_", min=least) if traced.multiple > 1 else Dim(name, min=least)
    shapes = {
        name: {axis: sizes[size] for axis, size in enumerate(shape) if isinstance(size, str)}
        for name, shape in traced.inputs.items()
    }
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # silence torch.onnx: torchvision is optional
    try:
        with warnings.catch_warnings(), torch.no_grad(), lean():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                traced.module.eval(),
                kwargs=dict(traced.example),
                dynamo=True,
                opset_version=opset,
                input_names=list(traced.inputs),
                output_names=[*traced.outputs, *traced.probes],
                dynamic_shapes=shapes,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    return program.model


def save(traced: Traced, folder: Path, opset: int = OPSET) -> Component:
    """Export into `folder`. The graph names of the component are relative to `folder`."""
    write(traced, folder, opset)
    return Component(
        graph=GRAPH,
        inputs=tuple(
            bundle.Tensor(name, "int64" if traced.example[name].dtype == torch.int64 else "float32", shape)
            for name, shape in traced.inputs.items()
        ),
        outputs=tuple(bundle.Tensor(n, "float32", s) for n, s in traced.outputs.items()),
        derived={"onnxruntime": DERIVED} if traced.derive else {},
    )


def write(traced: Traced, folder: Path, opset: int) -> None:
    """model.onnx, its weights in model.onnx.data, and the graph for ONNX Runtime over the same."""
    folder.mkdir(parents=True, exist_ok=True)
    model = trace(traced, opset)
    name_weights(model)
    clean(model)
    name_axes(model, traced)
    ir.save(model, folder / GRAPH, external_data=DATA, size_threshold_bytes=INLINE)
    del model
    if traced.derive:
        derive(folder / GRAPH, folder / DERIVED)
    model = ir.load(folder / GRAPH)  # its weights stay in their file
    forget_shapes(model)
    ir.save(model, folder / GRAPH)


def derive(graph: Path, out: Path) -> None:
    """ONNX Runtime's copy of a graph: MultiHeadAttention and SkipLayerNormalization, over the same weights file.

    Without it the CPU provider writes every attention score to memory. The shapes inside the graph guide the fusions.
    Only for denoisers: in the VAE and the text encoder the optimizer packs or copies weights, and they run once.
    """
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    with lean():
        model, _ = optimize_for_ort(ir.load(graph))
    clean(model)
    forget_shapes(model)
    ir.save(model, out)


def name_axes(model: ir.Model, traced: Traced) -> None:
    """Dynamic axes under the manifest's names, instead of torch's expressions such as `8*height_`."""
    plain = model.graph.outputs[: len(traced.outputs)]
    for values, shapes in ((model.graph.inputs, traced.inputs), (plain, traced.outputs)):
        for value, shape in zip(values, shapes.values(), strict=True):
            value.shape = ir.Shape(shape)
    for value in model.graph.outputs[len(traced.outputs) :]:
        assert value.shape is not None
        axes = [size if isinstance(size, int) else f"{value.name}_{axis}" for axis, size in enumerate(value.shape)]
        value.shape = ir.Shape(["rows", *axes[1:]])
