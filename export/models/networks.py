"""Networks of diffusers and transformers: built empty from their configs, options that are refused, and their layers.

Class names are given here, never taken from a config, and configs are filtered to the options that the class names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from accelerate import init_empty_weights
from torch import nn

from stepforge.export.models.weights import first_line
from stepforge.runtime.bundle import Module
from stepforge.runtime.errors import CheckpointError

# Options of a UNet that would need further graph inputs or another layout of the conditioning.
PLAIN_UNET = (
    "class_embed_type",
    "num_class_embeds",
    "time_cond_proj_dim",
    "encoder_hid_dim_type",
    "class_embeddings_concat",
)
CLIP_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
KINDS = {"linear": nn.Linear, "conv": nn.Conv2d, "norm": (nn.GroupNorm, nn.LayerNorm)}


def known_options(cls: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the class's constructor names; private ones, which can select code, are never among them."""
    return {key: config[key] for key in inspect.signature(cls).parameters if key in config and not key.startswith("_")}


def empty_network(cls: type, config: Mapping[str, Any]) -> Any:
    """A network without memory for its weights; its buffers are real."""
    named = config.get("_class_name", cls.__name__)
    if named != cls.__name__:
        raise CheckpointError(f"the config is of class {named!r}; expected {cls.__name__}")
    return built(cls, lambda: cls(**known_options(cls, config)))


def built(cls: type, make: Callable[[], Any]) -> Any:
    """A network on the meta device. Raises CheckpointError for whatever `make` raises."""
    try:
        with init_empty_weights(include_buffers=False):
            return make()
    except Exception as error:  # diffusers and transformers raise whatever a bad value runs into
        raise CheckpointError(f"{cls.__name__} cannot be built from its config: {first_line(error)}") from error


def empty_unet(config: Mapping[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    for option in PLAIN_UNET:
        if config.get(option):
            raise CheckpointError(f"the UNet has {option}={config[option]!r}, which stepforge does not support")
    if (kind := config.get("addition_embed_type")) not in (None, "text_time"):
        raise CheckpointError(f"the UNet has addition_embed_type={kind!r}; supported: none (SD), 'text_time' (SDXL)")
    if config.get("in_channels", 4) != config.get("out_channels", 4):
        raise CheckpointError(
            f"the UNet has {config['in_channels']} input channels; only text-to-image models, whose input and output "
            "have equal channels, are supported (not inpainting)"
        )
    return empty_network(UNet2DConditionModel, config)


def empty_vae(config: Mapping[str, Any]) -> Any:
    from diffusers import AutoencoderKL

    for option in ("latents_mean", "latents_std", "shift_factor"):
        if config.get(option):
            raise CheckpointError(f"the VAE has {option}, which stepforge does not support")
    return empty_network(AutoencoderKL, config)


def empty_clip(config: Mapping[str, Any], *, projection: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if (kind := config.get("model_type", "clip_text_model")) != "clip_text_model":
        raise CheckpointError(f"the text encoder is a {kind!r}; supported: clip_text_model")
    if config.get("use_attention_mask"):
        raise CheckpointError("the text encoder has use_attention_mask, which stepforge does not support")
    values = {key: config[key] for key in CLIP_KEYS if config.get(key) is not None}
    cls = CLIPTextModelWithProjection if projection else CLIPTextModel
    return built(cls, lambda: cls(CLIPTextConfig(**values, attn_implementation="sdpa")))


def modules_of(network: nn.Module) -> tuple[Module, ...]:
    """The layers of a network that a LoRA may change."""
    found = []
    for path, module in named_modules(network).items():
        kind = next((k for k, cls in KINDS.items() if isinstance(module, cls)), None)
        weight = getattr(module, "weight", None)
        if kind is not None and weight is not None:
            has_bias = getattr(module, "bias", None) is not None
            found.append(Module(path, kind, tuple(weight.shape), has_bias))
    return tuple(found)


def named_modules(network: nn.Module) -> dict[str, nn.Module]:
    """Modules by the paths that bundles use: transformers before 5.6 put "text_model." before them."""
    return {name.removeprefix("text_model."): module for name, module in network.named_modules()}
