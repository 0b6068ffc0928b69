"""Models with the exact shapes of Stable Diffusion 1.5, 2.1 and XL and random weights, as diffusers folders. No download."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FAMILIES: dict[str, dict[str, Any]] = {
    "sd1": {
        "pipeline": "StableDiffusionPipeline",
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": {"sample_size": 512},
        "encoders": [(768, 12, 12, "quick_gelu", None)],
        "scheduler": lambda: PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
    },
    "sd2": {
        "pipeline": "StableDiffusionPipeline",
        "unet": {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        "vae": {"sample_size": 768},
        "encoders": [(1024, 23, 16, "gelu", None)],
        "scheduler": lambda: DDIMScheduler(
            **BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
    },
    "sdxl": {
        "pipeline": "StableDiffusionXLPipeline",
        "unet": {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": {"sample_size": 1024, "scaling_factor": 0.13025},
        "encoders": [(768, 12, 12, "quick_gelu", None), (1280, 32, 20, "gelu", 1280)],
        "scheduler": lambda: EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
    },
}


def save(folder: Path, family: str = "sd1", *, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
    """Write a model, one network at a time: 4.3 GB for SD 1.5, 5.2 for SD 2.1 and 13.9 for SDXL in fp32."""
    torch.manual_seed(seed)
    shapes = FAMILIES[family]
    names = {"scheduler": shapes["scheduler"]()}
    names["scheduler"].save_pretrained(folder / "scheduler")
    names["unet"] = network(folder / "unet", lambda: UNet2DConditionModel(**shapes["unet"]), dtype)
    names["vae"] = network(folder / "vae", lambda: vae(**shapes["vae"]), dtype)
    for end, encoder in zip(("", "_2"), shapes["encoders"], strict=False):
        names[f"text_encoder{end}"] = network(folder / f"text_encoder{end}", lambda e=encoder: text_encoder(*e), dtype)
        tokenizer(folder / f"tokenizer{end}")
    index = {name: [type(part).__module__.split(".")[0], type(part).__name__] for name, part in names.items()}
    index |= {
        name.replace("text_encoder", "tokenizer"): ["transformers", "CLIPTokenizer"] for name in index if "text" in name
    }
    (folder / "model_index.json").write_text(json.dumps({"_class_name": shapes["pipeline"], **index}), "utf-8")


def network(folder: Path, make: Callable[[], Any], dtype: torch.dtype) -> Any:
    """Save a network with weights that keep a signal's size; returns it without them."""
    with init_empty_weights(include_buffers=False):
        made = make()
    made.load_state_dict(
        {n: weight(n, value, dtype) for n, value in made.named_parameters()}, strict=False, assign=True
    )
    made.save_pretrained(folder)
    return made.to("meta")


def weight(name: str, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if like.ndim < 2:
        return torch.full(like.shape, float(name.endswith("weight")), dtype=dtype)  # norms' scales are 1, biases 0
    bound = 1 / math.sqrt(math.prod(like.shape[1:]))
    return torch.empty(like.shape, dtype=dtype).uniform_(-bound, bound)


def vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **options,
    )  # fmt: skip


def text_encoder(width: int, layers: int, heads: int, act: str, projection: int | None) -> Any:
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, hidden_act=act, projection_dim=projection or width,
    )  # fmt: skip
    return (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config)


def tokenizer(folder: Path) -> None:
    """One token a byte, with the ids and the length of CLIP's."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
