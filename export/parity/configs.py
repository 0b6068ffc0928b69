"""Published settings of the families' first models, which `from_single_file` fetches when it is online.

diffusers tells the kind of a checkpoint and takes the configs of one published model for it (single_file_utils.py,
DIFFUSERS_DEFAULT_PIPELINE_PATHS). These are the configs of the same models, so that it finds them without a network:
stable-diffusion-v1-5, stable-diffusion-2-1 and stable-diffusion-xl-base-1.0. Options at their class's default are left out.
Inpainting models are these with nine channels; their schedulers are the base models', which verify tells as assumed.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

BETAS: Config = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
VAE: Config = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
UNET: Config = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
}
CLIP: Config = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
CLIP_L = CLIP | {
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
TOKENIZER: Config = {
    "tokenizer_class": "CLIPTokenizer",
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "model_max_length": 77,
}
SD_INDEX: Config = {
    "_class_name": "StableDiffusionPipeline",
    "requires_safety_checker": False,
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

MODELS: dict[str, dict[str, Config]] = {  # diffusers' name of the kind -> file of the published folder -> what it holds
    "v1": {
        "model_index.json": SD_INDEX | {"scheduler": ["diffusers", "PNDMScheduler"]},
        "unet/config.json": UNET | {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64},
        "vae/config.json": VAE | {"sample_size": 512},
        "text_encoder/config.json": CLIP_L,
        "tokenizer/tokenizer_config.json": TOKENIZER,
        "scheduler/scheduler_config.json": BETAS
        | {
            "_class_name": "PNDMScheduler",
            "skip_prk_steps": True,
            "set_alpha_to_one": False,
            "clip_sample": False,
        },
    },
    "v2": {
        "model_index.json": SD_INDEX | {"scheduler": ["diffusers", "DDIMScheduler"]},
        "unet/config.json": UNET
        | {
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "sample_size": 96,
            "upcast_attention": True,
            "use_linear_projection": True,
        },
        "vae/config.json": VAE | {"sample_size": 768},
        "text_encoder/config.json": CLIP
        | {
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 23,
            "projection_dim": 512,
        },
        "tokenizer/tokenizer_config.json": TOKENIZER | {"pad_token": "!"},
        "scheduler/scheduler_config.json": BETAS
        | {
            "_class_name": "DDIMScheduler",
            "prediction_type": "v_prediction",
            "set_alpha_to_one": False,
            "clip_sample": False,
        },
    },
    "xl_base": {
        "model_index.json": SD_INDEX
        | {
            "_class_name": "StableDiffusionXLPipeline",
            "force_zeros_for_empty_prompt": True,
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        },
        "unet/config.json": UNET
        | {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "cross_attention_dim": 2048,
            "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
            "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
        },
        "vae/config.json": VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        "text_encoder/config.json": CLIP_L,
        "text_encoder_2/config.json": CLIP
        | {
            "architectures": ["CLIPTextModelWithProjection"],
            "hidden_act": "gelu",
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_attention_heads": 20,
            "num_hidden_layers": 32,
            "projection_dim": 1280,
        },
        "tokenizer/tokenizer_config.json": TOKENIZER,
        "tokenizer_2/tokenizer_config.json": TOKENIZER | {"pad_token": "!"},
        "scheduler/scheduler_config.json": BETAS
        | {
            "_class_name": "EulerDiscreteScheduler",
            "prediction_type": "epsilon",
            "timestep_spacing": "leading",
            "interpolation_type": "linear",
            "use_karras_sigmas": False,
        },
    },
}


def _inpainting(base: str, size: int, prediction: str) -> dict[str, Config]:
    """The configs of a base model's inpainting model: nine channels in, latents, a mask and the masked image."""
    files = MODELS[base]
    named = str(files["model_index.json"]["_class_name"]).replace("Pipeline", "InpaintPipeline")
    return files | {
        "model_index.json": files["model_index.json"] | {"_class_name": named},
        "unet/config.json": files["unet/config.json"] | {"in_channels": 9, "sample_size": size},
        "scheduler/scheduler_config.json": files["scheduler/scheduler_config.json"] | {"prediction_type": prediction},
    }


MODELS |= {
    "inpainting": _inpainting("v1", 64, "epsilon"),
    "inpainting_v2": _inpainting("v2", 64, "epsilon"),
    "xl_inpaint": _inpainting("xl_base", 128, "epsilon"),
}
PIPELINES = {str(files["model_index.json"]["_class_name"]) for files in MODELS.values()}
SD2_BASE_SIZE = 64  # sample_size of stable-diffusion-2-base, the epsilon checkpoint of 512 x 512 pixels
