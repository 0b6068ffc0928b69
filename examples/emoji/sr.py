"""The SR network's configuration, its sampling in torch, and its folder: IF's stage II layout without text.

Efficient U-Net habits: 16 channels at full resolution, 128 at an eighth of it. The input is [noisy 128 px, noised low-res
upsampled to 128 px], the class label is the noise level of the latter. The prediction is the clean picture: `fresh` can then
start as the bilinear upsampling, which v, a mixture that differs with the timestep, would not allow. Predicting v from
random weights, 500 steps of 8 crops were still 8 dB worse than bicubic.
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
    cross_attention_dim=32,  # a width that no block reads; the config demands one
)
SCHEDULER_CONFIG = dict(
    beta_schedule="squaredcos_cap_v2",
    prediction_type="sample",
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


CONSTANT = 6.0  # value of a group's third channel in `fresh`


@torch.no_grad()
def fresh() -> UNet2DConditionModel:
    """Random weights, except that the output is the upsampled low-res picture, within 8 %.

    Colour c goes through channels 4c and 4c+1 as ±c, from `conv_in` over the last skip connection to `conv_out`. Channel 4c+2
    is a constant that outweighs the colour in its group's variance, so that group norm hardly scales the picture; SiLU at
    2.5 is nearly straight, and the difference of the two channels cancels its even part and the mean. The noisy picture has
    weight zero, which training changes.
    """
    unet = UNet2DConditionModel(**UNET_CONFIG)
    last = unet.up_blocks[-1].resnets[-1]
    skip = last.conv_shortcut.in_channels - unet.conv_in.out_channels
    unet.conv_in.weight[:, :3] = 0.0
    unet.conv_out.weight.zero_()
    unet.conv_out.bias.zero_()
    for colour in range(3):
        plus, minus, constant = 4 * colour, 4 * colour + 1, 4 * colour + 2
        for row in (plus, minus, constant):
            for layer in (unet.conv_in, last.conv_shortcut, last.conv2):
                layer.weight[row] = 0.0
                layer.bias[row] = 0.0
            last.conv_shortcut.weight[row, skip + row] = 1.0
        unet.conv_in.weight[plus, 3 + colour, 1, 1] = 1.0
        unet.conv_in.weight[minus, 3 + colour, 1, 1] = -1.0
        unet.conv_in.bias[constant] = CONSTANT
        unet.conv_norm_out.bias[[plus, minus]] = 2.5
        unet.conv_out.weight[colour, plus, 1, 1] = (
            1.22  # standard deviation of a group 2.65, slope of SiLU 1.09, halved
        )
        unet.conv_out.weight[colour, minus, 1, 1] = -1.22
    return unet


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
        clean = unet(torch.cat([x, image], dim=1), t, None, class_labels=levels).sample
        x = scheduler.step(clean, t, x).prev_sample
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
