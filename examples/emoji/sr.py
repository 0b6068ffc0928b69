"""The SR network's configuration, its sampling in torch, and its folder: IF's stage II layout without text.

Efficient U-Net habits: 16 channels at full resolution, 128 at an eighth of it. The input is [noisy 128 px, noised low-res
upsampled to 128 px], the class label is the noise level of the latter, the prediction is v.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel

UNET_CONFIG = dict(
    sample_size=128,
    in_channels=6,
    out_channels=3,
    block_out_channels=(16, 32, 64, 128),
    layers_per_block=1,
    down_block_types=("DownBlock2D",) * 4,
    up_block_types=("UpBlock2D",) * 4,
    mid_block_type="UNetMidBlock2D",
    class_embed_type="timestep",
    norm_num_groups=4,
    cross_attention_dim=32,  # of no block: the config demands one
)
SCHEDULER_CONFIG = dict(
    beta_schedule="squaredcos_cap_v2",
    prediction_type="v_prediction",
    clip_sample=False,
    timestep_spacing="trailing",
)
INDEX = {
    "_class_name": "IFSuperResolutionPipeline",
    "feature_extractor": [None, None],
    "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": [None, None],
    "tokenizer": [None, None],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "watermarker": [None, None],
}


def upsample(low: torch.Tensor) -> torch.Tensor:
    """[n, 3, 64, 64] -> [n, 3, 128, 128], as the layout does it."""
    return F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=True)


def sampling_scheduler() -> DDIMScheduler:
    return DDIMScheduler(**SCHEDULER_CONFIG)


def noising_scheduler() -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2")


@torch.no_grad()
def upscale(
    unet: UNet2DConditionModel, low: torch.Tensor, *, steps: int = 8, noise_level: int = 20, seed: int = 0
) -> torch.Tensor:
    """Low-res pictures [n, 3, 64, 64] in [-1, 1] to [n, 3, 128, 128]; draws as the pipeline's: latents, then low-res noise."""
    generator = torch.Generator().manual_seed(seed)
    scheduler, noising = sampling_scheduler(), noising_scheduler()
    shape = (len(low), 3, 2 * low.shape[2], 2 * low.shape[3])
    x = torch.randn(shape, generator=generator).to(low.device)
    noise = torch.randn(shape, generator=generator).to(low.device)
    levels = torch.full((len(low),), noise_level, device=low.device)
    image = noising.add_noise(upsample(low), noise, levels)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        v = unet(torch.cat([x, image], dim=1), t, None, class_labels=levels).sample
        x = scheduler.step(v, t, x).prev_sample
    return x.clamp(-1, 1)


def save(unet: UNet2DConditionModel, out: Path) -> None:
    """The diffusers folder, fp16 weights."""
    half = UNet2DConditionModel(**UNET_CONFIG)
    half.load_state_dict(unet.state_dict())
    half.half().save_pretrained(out / "unet")
    sampling_scheduler().save_pretrained(out / "scheduler")
    noising_scheduler().save_pretrained(out / "image_noising_scheduler")
    (out / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")


def load(folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.float32).eval()
