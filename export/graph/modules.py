"""Networks of diffusers and transformers as modules with a graph's inputs and outputs, and examples to trace them with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stepforge.export.graph.resample import for_any_size
from stepforge.export.graph.trace import Traced
from stepforge.export.models.networks import reads_text, size_multiple


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
        # not bias + (1 − seen)·lowest: OpenVINO 2026.4.1 moves a constant summand into the product q·kᵀ and spreads it wrongly;
        # and not 1 − seen, which torch.onnx decomposes at the price of the whole program
        bias = self.bias * seen + (seen - 1) * -lowest
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


def denoiser(unet: Any, *, probe: bool = False, ids: int = 6) -> Traced:
    """probe: with the inner values that ControlNets and reuse variants need as further outputs, see `Denoiser`. ids: numbers of
    SDXL's time_ids."""
    example, inputs, least = network_inputs(unet.config, ids)
    module = Denoiser(unet, probe=probe)
    outputs = {"prediction": ("rows", unet.config.out_channels, "height", "width")}
    multiple = size_multiple(unet.config)
    return Traced(
        module, example, inputs, outputs, multiple, max(1, least // multiple), derive=True, probes=module.probes
    )


def network_inputs(config: Any, ids: int = 6) -> tuple[dict[str, Tensor], dict[str, tuple[int | str, ...]], int]:
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
        pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        example |= {"text_embeds": torch.zeros(2, pooled), "time_ids": torch.zeros(2, ids)}
        inputs |= {"text_embeds": ("rows", pooled), "time_ids": ("rows", ids)}
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
