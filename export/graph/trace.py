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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from stepforge.export.graph.passes import clean, forget_shapes, name_weights
from stepforge.export.models.networks import reads_text, size_multiple
from stepforge.runtime import bundle
from stepforge.runtime.bundle import Component
from stepforge.runtime.errors import CheckpointError

# Opset 20 writes attention as MatMul, Softmax, MatMul. OpenVINO and TensorRT fuse that, and `derive` does for ONNX
# Runtime. Opset 23 has an Attention operator, but no engine was faster with it (benchmarks/bench_export.py --opsets),
# ONNX Runtime splits its GroupNormalization into nine operators, and TensorRT before 10.14 cannot read it.
OPSET = 20
GRAPH = "model.onnx"
DATA = "model.onnx.data"
DERIVED = "model.onnxruntime.onnx"
INLINE = 1024  # bytes; smaller weights stand in the graph file, where engines can fold them

NEVER_DIVIDES = 40  # levels: diffusers' UNet forwards the sizes of skip connections unless 2^levels divides all sides

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


class Upsample(nn.Module):
    """diffusers' Upsample2D to a given size, or to twice its own. diffusers' compares sides as numbers (a detour for 2^31
    elements), which an export cannot for a side that varies."""

    def __init__(self, conv: nn.Module | None) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, hidden_states: Tensor, output_size: Any = None) -> Tensor:
        scale = 2.0 if output_size is None else None
        result = functional.interpolate(hidden_states, size=output_size, scale_factor=scale, mode="nearest")
        return result if self.conv is None else self.conv(result)


def for_any_size(unet: Any) -> None:
    """Have a UNet upsample to the sizes of its skip connections, as diffusers' forward does for sides that are no multiples
    of 2^levels; for those that are, both are the same. Changes the UNet.

    Raises CheckpointError for other upsamplers.
    """
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    for block in unet.up_blocks:
        for index, layer in enumerate(block.upsamplers or ()):
            if type(layer) is ResnetBlock2D and type(layer.upsample) is Upsample2D and not layer.upsample.use_conv:
                layer.upsample = Upsample(None)
                continue
            if (
                type(layer) is not Upsample2D
                or layer.norm is not None
                or layer.use_conv_transpose
                or not layer.use_conv
            ):
                raise CheckpointError(
                    f"the UNet upsamples by {type(layer).__name__}, which stepforge does not support; supported: "
                    "nearest neighbours and a convolution"
                )
            block.upsamplers[index] = Upsample(layer.conv)
    unet.num_upsamplers = NEVER_DIVIDES if size_multiple(unet.config) == 1 else 0


def pooled_text(pool: Any, x: Tensor) -> Tensor:
    """diffusers' AttentionPooling, the text of IF in the time embedding, by products of matrices: its own has Einsum, which a
    graph of a bundle must not have."""
    token = x.mean(dim=1, keepdim=True) + pool.positional_embedding.to(x.dtype)
    x = torch.cat([token, x], dim=1)
    scale = pool.dim_per_head**-0.25
    q, k, v = (
        layer(value).unflatten(-1, (pool.num_heads, pool.dim_per_head)).transpose(1, 2)
        for layer, value in ((pool.q_proj, token), (pool.k_proj, x), (pool.v_proj, x))
    )
    weight = torch.softmax(((q * scale) @ (k * scale).transpose(2, 3)).float(), dim=-1).to(x.dtype)
    return (weight @ v).flatten(1)  # [rows, heads, 1, dim] side by side


class Denoiser(nn.Module):
    """A UNet, which it changes (`for_any_size`), and the inner values that `probes` names.

    skip_i   the value that the i-th skip connection carries, in the order in which the down path makes them
    mid      what the middle block makes
    text_i   output of the i-th cross-attention, before it is added to what it attended from
    """

    def __init__(self, unet: Any, *, probe: bool = False) -> None:
        super().__init__()
        for_any_size(unet)
        if unet.config.addition_embed_type == "text":
            pool = unet.add_embedding.pool
            pool.forward = partial(pooled_text, pool)
        self.unet = unet
        self._text: list[Tensor] = []
        self._skips: list[tuple[Tensor, tuple[Tensor, ...]]] = []
        self.probes: tuple[str, ...] = ()
        if probe:
            blocks = len(unet.up_blocks)
            for block in unet.up_blocks:
                block.register_forward_pre_hook(self._see_block, with_kwargs=True)
            attentions = [module for name, module in unet.named_modules() if name.endswith(".attn2")]
            for module in attentions:
                module.register_forward_hook(lambda module, args, output: self._text.append(output))
            skips = blocks * (unet.config.layers_per_block + 1)
            self.probes = (
                *(f"skip_{index}" for index in range(skips)),
                "mid",
                *(f"text_{index}" for index in range(len(attentions))),
            )

    def _see_block(self, block: Any, args: Any, values: dict[str, Any]) -> None:
        self._skips.append((values["hidden_states"], values["res_hidden_states_tuple"]))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        dtype = self.unet.dtype
        self._text.clear()
        self._skips.clear()
        extra = None
        if text_embeds is not None:
            extra = {"text_embeds": text_embeds, "time_ids": time_ids}  # cast by the UNet, behind time_ids' sines
        context = None if encoder_hidden_states is None else encoder_hidden_states.to(dtype)
        out = self.unet(
            sample.to(dtype), timestep, context, class_labels=class_labels, added_cond_kwargs=extra, return_dict=False
        )[0].float()
        if not self.probes:
            return out
        skips = [value for _, values in reversed(self._skips) for value in values]  # deepest block first
        probes = (*skips, self._skips[0][0], *self._text)
        self._text, self._skips = [], []
        return out, *probes


class ClipEncoder(nn.Module):
    """Hidden states of the last layer through the final norm (SD 1 and 2), or of the last but one as they are (SDXL)."""

    def __init__(self, model: Any, length: int, *, penultimate: bool) -> None:
        super().__init__()
        self.model = model
        self.penultimate = penultimate
        # transformers builds its mask with shape-dependent Python; ours is a constant of the graph
        mask = torch.full((length, length), torch.finfo(model.dtype).min, dtype=model.dtype).triu(1)
        self.mask: Tensor
        self.register_buffer("mask", mask[None, None], persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        core = getattr(self.model, "text_model", self.model)
        hidden = core.embeddings(input_ids=input_ids)
        layers = core.encoder.layers
        for layer in layers[:-1]:
            hidden = layer(hidden, self.mask)
        before_last = hidden
        if self.penultimate and not hasattr(self.model, "text_projection"):
            return before_last.float()
        last = core.final_layer_norm(layers[-1](hidden, self.mask))
        if not self.penultimate:
            return last.float()
        return before_last.float(), self.model.text_projection(at_end(core, input_ids, last)).float()


def at_end(core: Any, input_ids: Tensor, hidden: Tensor) -> Tensor:
    """CLIP's pooled text: hidden states of the end token, [rows, dim]."""
    # an eos_token_id of 2 is an old default, and the end token then the one with the highest id; see CLIPTextModel.forward
    marks = input_ids if core.eos_token_id == 2 else input_ids == core.eos_token_id
    end = marks.int().argmax(dim=-1)
    return hidden[torch.arange(hidden.shape[0]), end]


class T5Encoder(nn.Module):
    """T5's hidden states through its final norm. Masked tokens are not attended to, yet have hidden states of their own.

    transformers builds mask and position bias with shape-dependent Python; here the bias is a constant of the graph.
    """

    def __init__(self, model: Any, length: int) -> None:
        super().__init__()
        self.embed, self.blocks, self.norm = model.shared, model.encoder.block, model.encoder.final_layer_norm
        first = self.blocks[0].layer[0].SelfAttention
        self.bias: Tensor
        self.register_buffer("bias", first.compute_bias(length, length).detach().clone(), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        lowest = torch.finfo(hidden.dtype).min
        seen = attention_mask[:, None, None, :].to(hidden.dtype)
        # not bias + (1 − seen)·lowest: OpenVINO 2026.4.1 moves a constant summand into the product q·kᵀ and spreads it wrongly
        bias = self.bias * seen + (1 - seen) * lowest
        for block in self.blocks:
            attention, norm = block.layer[0].SelfAttention, block.layer[0].layer_norm
            normed = norm(hidden)
            shape = (*normed.shape[:2], attention.n_heads, attention.key_value_proj_dim)
            q, k, v = (layer(normed).view(shape).transpose(1, 2) for layer in (attention.q, attention.k, attention.v))
            weights = torch.softmax(q @ k.transpose(2, 3) + bias, dim=-1)
            hidden = hidden + attention.o((weights @ v).transpose(1, 2).flatten(2))
            hidden = block.layer[1](hidden)
        return self.norm(hidden).float()


class VaeEncoder(nn.Module):
    """Means and log variances of the latents, unscaled: who samples them has the seed."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder, self.quant_conv, self.dtype = vae.encoder, vae.quant_conv, vae.dtype

    def forward(self, pixels: Tensor) -> Tensor:
        moments = self.encoder(pixels.to(self.dtype))
        return (moments if self.quant_conv is None else self.quant_conv(moments)).float()


class VaeDecoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder
        self.scale = 1.0 / vae.config.scaling_factor
        self.dtype = vae.dtype

    def forward(self, latents: Tensor) -> Tensor:
        x = (latents * self.scale).to(self.dtype)
        return self.decoder(x if self.post_quant_conv is None else self.post_quant_conv(x)).float()


def denoiser(unet: Any, *, probe: bool = False) -> Traced:
    """probe: with the inner values that ControlNets and reuse variants need as further outputs, see `Denoiser`."""
    example, inputs, least = network_inputs(unet.config)
    module = Denoiser(unet, probe=probe)
    outputs = {"prediction": ("rows", unet.config.out_channels, "height", "width")}
    multiple = size_multiple(unet.config)
    return Traced(
        module, example, inputs, outputs, multiple, max(1, least // multiple), derive=True, probes=module.probes
    )


def network_inputs(config: Any) -> tuple[dict[str, Tensor], dict[str, tuple[int | str, ...]], int]:
    """Inputs of a UNet and its ControlNets: examples, shapes, and height and width of which 2 are left at the middle."""
    channels = config.in_channels
    projected = getattr(config, "encoder_hid_dim_type", None) == "text_proj"
    dim = config.encoder_hid_dim if projected else config.cross_attention_dim
    least = 2 ** len(config.block_out_channels)
    # Two rows, and height unequal to width: torch.export takes a 1, and two equal sizes, for constants.
    example = {
        "sample": torch.zeros(2, channels, 2 * least, 3 * least),
        "timestep": torch.zeros(2),
    }
    inputs: dict[str, tuple[int | str, ...]] = {
        "sample": ("rows", channels, "height", "width"),
        "timestep": ("rows",),
    }
    if reads_text(config):
        example["encoder_hidden_states"] = torch.zeros(2, 77, dim)
        inputs["encoder_hidden_states"] = ("rows", "tokens", dim)
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        example |= {"text_embeds": torch.zeros(2, pooled), "time_ids": torch.zeros(2, 6)}
        inputs |= {"text_embeds": ("rows", pooled), "time_ids": ("rows", 6)}
    sines, table = config.class_embed_type == "timestep", config.num_class_embeds is not None
    if sines or table:
        example["class_labels"] = torch.zeros(2, dtype=torch.float32 if sines else torch.int64)
        inputs["class_labels"] = ("rows",)
    return example, inputs, least


def text_encoder(model: Any, length: int, *, penultimate: bool) -> Traced:
    """length: tokens of one chunk. penultimate: SDXL's choice of layer."""
    outputs: dict[str, tuple[int | str, ...]] = {"hidden_states": ("rows", length, model.config.hidden_size)}
    if penultimate and hasattr(model, "text_projection"):
        outputs["pooled"] = ("rows", model.config.projection_dim)
    example = {"input_ids": torch.zeros(2, length, dtype=torch.int64)}
    return Traced(
        ClipEncoder(model, length, penultimate=penultimate), example, {"input_ids": ("rows", length)}, outputs
    )


def t5_encoder(model: Any, length: int) -> Traced:
    """length: tokens of a prompt, padding included."""
    shape = ("rows", length)
    example = {"input_ids": torch.zeros(2, length, dtype=torch.int64)}
    example["attention_mask"] = torch.ones(2, length, dtype=torch.int64)
    outputs = {"hidden_states": (*shape, model.config.d_model)}
    return Traced(T5Encoder(model, length), example, {"input_ids": shape, "attention_mask": shape}, outputs)


def vae_encoder(vae: Any) -> Traced:
    config = vae.config
    scale = 2 ** (len(config.block_out_channels) - 1)
    return Traced(
        VaeEncoder(vae),
        {"pixels": torch.zeros(2, config.in_channels, 8 * scale, 12 * scale)},
        {"pixels": ("rows", config.in_channels, "height", "width")},
        {"moments": ("rows", 2 * config.latent_channels, f"height/{scale}", f"width/{scale}")},
        multiple=scale,
    )


def vae_decoder(vae: Any) -> Traced:
    config = vae.config
    channels, scale = config.latent_channels, 2 ** (len(config.block_out_channels) - 1)
    return Traced(
        VaeDecoder(vae),
        {"latents": torch.zeros(2, channels, 8, 12)},
        {"latents": ("rows", channels, "height", "width")},
        {"pixels": ("rows", config.out_channels, f"{scale}*height", f"{scale}*width")},
    )


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
        with warnings.catch_warnings(), torch.no_grad(), slice_rule_at_slices():
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


@contextmanager
def slice_rule_at_slices() -> Iterator[None]:
    """onnxscript's optimizer (0.7) lists the whole graph at every node, to see whether two Slices are a Split: the square of
    its nodes. Inside the block it does so at Slices only."""
    from onnxscript.rewriter.rules.common import slice_split_rule as rule

    whole = rule.try_rewrite
    rule.try_rewrite = lambda model, graph, node, **options: (
        whole(model, graph, node, **options) if node.op_type == "Slice" else None
    )
    try:
        yield
    finally:
        del rule.try_rewrite  # the class's own shows again


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

    with slice_rule_at_slices():
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
