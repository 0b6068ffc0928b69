"""Networks of diffusers and transformers: built empty from their configs, options that are refused, and their layers.

Class names are given here, never taken from a config, and configs are filtered to the options that the class names.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from accelerate import init_empty_weights
from torch import nn

from stepforge.export.models.weights import first_line
from stepforge.export.oracle import silent
from stepforge.runtime.bundle import Module
from stepforge.runtime.errors import CheckpointError
from stepforge.runtime.files import printable

# Options of a UNet that would need further graph inputs or another layout of the conditioning.
PLAIN_UNET = (
    "class_embed_type",
    "num_class_embeds",
    "time_cond_proj_dim",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "class_embeddings_concat",
)
CLIP_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
TEXTS = ("hidden_act",)  # members of CLIP_KEYS that are not numbers
REPEATS = ("layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block")
MOST = 10_000_000  # largest whole number in a config; real ones end at a vocabulary of 49,408
MOST_LEVELS = 16
SIZED = ("UpBlock2D", "CrossAttnUpBlock2D")  # blocks of diffusers that upsample to a given size
KINDS = {"linear": nn.Linear, "conv": nn.Conv2d, "norm": (nn.GroupNorm, nn.LayerNorm)}


def known_options(cls: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the class's constructor names; private ones, which can select code, are never among them.

    Raises CheckpointError for values that are not of the kind of the class's defaults, and for absurd numbers.
    """
    found = {}
    for key, parameter in inspect.signature(cls).parameters.items():
        if key in config and not key.startswith("_"):
            check_option(cls.__name__, key, config[key], parameter.default)
            found[key] = config[key]
    return found


def check_option(name: str, key: str, value: Any, default: Any) -> None:
    """Raises CheckpointError unless a value can be one of an option with this default."""
    given = f"{name}: {key} is {printable(repr(value), 80)}"
    for leaf in _leaves(value, given):
        if isinstance(leaf, int | float) and not -MOST <= leaf <= MOST:
            raise CheckpointError(f"{given}; numbers from -{MOST} to {MOST} are possible")
    numbers = isinstance(value, int | float) and not isinstance(value, bool)
    kinds: tuple[tuple[type | tuple[type, ...], str, bool], ...] = (
        (bool, "true or false", isinstance(value, bool | list | tuple)),
        (str, "a name", isinstance(value, str)),
        ((int, float), "a number", numbers or isinstance(value, list | tuple)),
        (tuple, "a list", isinstance(value, list | tuple)),
    )
    for kind, expected, fits in kinds:
        if isinstance(default, kind):
            if not fits and value is not None:
                raise CheckpointError(f"{given}; {expected} is expected")
            return


def _leaves(value: Any, given: str) -> Iterator[Any]:
    """All that stands in lists of lists."""
    if isinstance(value, list | tuple):
        if len(value) > MOST_LEVELS:
            raise CheckpointError(f"{given}; lists of at most {MOST_LEVELS} are possible")
        for each in value:
            yield from _leaves(each, given)
    else:
        yield value


def levels(config: Mapping[str, Any], default: tuple[int, ...] = ()) -> int:
    """Number of entries of block_out_channels. Raises CheckpointError unless it is a list of positive numbers."""
    sizes = config.get("block_out_channels", default)
    given = f"block_out_channels is {printable(repr(sizes), 80)}"
    if not isinstance(sizes, list | tuple) or not sizes or not all(type(s) is int and s > 0 for s in sizes):
        raise CheckpointError(f"{given}; a list of positive whole numbers is expected")
    return len(list(_leaves(sizes, given)))


def check_counts(config: Mapping[str, Any], weights: int) -> None:
    """Raises CheckpointError if a config asks for more layers than there are weights: no time is spent on building those."""
    layers = levels(config) if "block_out_channels" in config else 1
    for key in (*REPEATS, "num_hidden_layers"):
        given = f"{key} is {printable(repr(config.get(key)), 80)}"
        counts = [1 if count is None else count for count in _leaves(config.get(key), given)]
        if not all(type(count) is int for count in counts):
            raise CheckpointError(f"{given}; whole numbers are expected")
        layers *= max(1, *counts) if counts else 1
    if layers > weights:
        raise CheckpointError(f"the config asks for {layers} layers, the files hold {weights} weights")


def empty_network(cls: type, config: Mapping[str, Any]) -> Any:
    """A network without memory for its weights; its buffers are real."""
    named = config.get("_class_name", cls.__name__)
    if named != cls.__name__:
        raise CheckpointError(f"the config is of class {printable(repr(named), 80)}; expected {cls.__name__}")
    options = known_options(cls, config)
    return built(cls, lambda: cls(**options))


def built(cls: type, make: Callable[[], Any]) -> Any:
    """A network on the meta device. Raises CheckpointError for whatever `make` raises."""
    try:
        with silent(), init_empty_weights(include_buffers=False):
            return make()
    except Exception as error:  # diffusers and transformers raise whatever a bad value runs into
        raise CheckpointError(
            f"{cls.__name__} cannot be built from its config: {printable(first_line(error))}"
        ) from error


def empty_unet(config: Mapping[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel

    for option in PLAIN_UNET:
        if config.get(option):
            raise CheckpointError(
                f"the UNet has {option}={printable(repr(config[option]), 80)}, which stepforge does not support"
            )
    if (kind := config.get("addition_embed_type")) not in (None, "text_time"):
        raise CheckpointError(
            f"the UNet has addition_embed_type={printable(repr(kind), 80)}; supported: none (SD), 'text_time' (SDXL)"
        )
    channels, out = config.get("in_channels", 4), config.get("out_channels", 4)
    if channels != out and not (type(channels) is type(out) is int and channels == 2 * out + 1):
        raise CheckpointError(
            f"the UNet has {printable(repr(channels), 80)} input channels for {printable(repr(out), 80)} of its output; "
            "supported: as many (text to image), or those, a mask and a masked image (inpainting)"
        )
    return empty_network(UNet2DConditionModel, config)


def empty_vae(config: Mapping[str, Any], *, encoder: bool = True) -> Any:
    """encoder: False for a VAE that was saved without it, to decode only."""
    from diffusers import AutoencoderKL

    for option in ("latents_mean", "latents_std", "shift_factor"):
        if config.get(option):
            raise CheckpointError(f"the VAE has {option}, which stepforge does not support")
    vae = empty_network(AutoencoderKL, config)
    if not encoder:
        vae.encoder = vae.quant_conv = None
    return vae


def empty_clip(config: Mapping[str, Any], *, projection: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if (kind := config.get("model_type", "clip_text_model")) != "clip_text_model":
        raise CheckpointError(f"the text encoder is a {printable(repr(kind), 80)}; supported: clip_text_model")
    if config.get("use_attention_mask"):
        raise CheckpointError("the text encoder has use_attention_mask, which stepforge does not support")
    values = {key: config[key] for key in CLIP_KEYS if config.get(key) is not None}
    for key, value in values.items():
        check_option("the text encoder", key, value, "" if key in TEXTS else math.pi)
        if isinstance(value, list):
            raise CheckpointError(f"the text encoder: {key} is {printable(repr(value), 80)}; a number is expected")
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


def reads_text(config: Any) -> bool:
    """Whether a UNet or a ControlNet attends to text, or has it in its time embedding."""
    blocks = (*config.down_block_types, getattr(config, "mid_block_type", None))
    added = getattr(config, "addition_embed_type", None)
    return any("CrossAttn" in str(block) for block in blocks) or added in ("text", "text_time")


def size_multiple(config: Any) -> int:
    """What height and width of a UNet's sample must be multiples of: 1, or 2^levels where a block can only double them."""
    blocks = config.up_block_types[:-1]  # the last does not upsample
    return 1 if all(block in SIZED for block in blocks) else 2 ** len(blocks)
