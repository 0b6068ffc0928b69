"""Train the demo AutoencoderKL (64x64x3 -> 16x16x4), broadly first and then mostly on the demo's own pictures:

    python examples/emoji/train_vae.py
    python examples/emoji/train_vae.py --resume --domain 0.7 --steps 700 --lr 6e-4

The autoencoder must also serve pictures the diffusion model never saw (other emoji, style LoRAs, a DreamBooth subject),
so it trains on every emoji of the font, in random colours, positions, sizes and a few plain image styles.
"""

from __future__ import annotations

import argparse
import time
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import BACKGROUNDS, FONT, gallery, pictures, render
from diffusers import AutoencoderKL
from fontTools.ttLib import TTFont
from PIL import Image, ImageFilter, ImageOps

CONFIG = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(32, 64, 128),
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=16,
    sample_size=64,
    mid_block_add_attention=False,
)
KL_WEIGHT = 1e-6


def all_code_points() -> list[int]:
    """Every single-code-point emoji of the font that has a picture of its own."""
    cmap = TTFont(FONT).getBestCmap()
    blocks = (*range(0x1F300, 0x1F650), *range(0x1F680, 0x1F700), *range(0x1F900, 0x1FB00), *range(0x2600, 0x27C0))
    return [point for point in blocks if point in cmap and unicodedata.name(chr(point), "")]


def random_picture(points: list[int], random: np.random.RandomState) -> np.ndarray:
    """One augmented picture, uint8 [64, 64, 3]."""
    colours = list(BACKGROUNDS.values())
    colour = colours[random.randint(len(colours))] if random.rand() < 0.6 else tuple(random.randint(0, 256, 3).tolist())
    picture = Image.fromarray(
        render(
            points[random.randint(len(points))],
            colour,
            longest=random.uniform(40, 62),
            shift=tuple(random.uniform(-6, 6, 2)),
        )
    )
    style = random.rand()
    if style < 0.05:
        picture = ImageOps.grayscale(picture).convert("RGB")
    elif style < 0.10:
        small = int(random.choice([16, 21, 32]))
        picture = picture.resize((small, small), Image.Resampling.BOX).resize((64, 64), Image.Resampling.NEAREST)
    elif style < 0.13:
        picture = ImageOps.posterize(picture, 2)
    elif style < 0.16:
        picture = ImageOps.invert(picture.convert("L").filter(ImageFilter.FIND_EDGES)).convert("RGB")
    if random.rand() < 0.5:
        picture = ImageOps.mirror(picture)
    return np.asarray(picture)


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [n, h, w, 3] -> float [n, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def gradient(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 + L2 + L1 of the image gradient: the last term keeps thin lines (eyes, mouths) alive."""
    edges = sum(F.l1_loss(a, b) for a, b in zip(gradient(output), gradient(target), strict=True))
    return F.l1_loss(output, target) + F.mse_loss(output, target) + edges


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    random = np.random.RandomState(0)
    points = all_code_points()
    vae = AutoencoderKL(**CONFIG)
    if args.resume:
        vae.load_state_dict(AutoencoderKL.from_pretrained(args.out).state_dict())
    vae = vae.to(args.device, memory_format=torch.channels_last)
    seen = gallery()[[i for i, picture in enumerate(pictures()) if not picture.held_out]]
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters, {len(points)} emoji", flush=True)

    def forward(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = vae.encode(pixels).latent_dist
        return vae.decode(posterior.sample()).sample, posterior.kl().mean()

    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=args.steps, pct_start=0.15)
    started = time.time()
    for step in range(1, args.steps + 1):
        batch = np.stack(
            [
                seen[random.randint(len(seen))] if random.rand() < args.domain else random_picture(points, random)
                for _ in range(args.batch)
            ]
        )
        pixels = to_tensor(batch).to(args.device, memory_format=torch.channels_last)
        with torch.autocast(pixels.device.type, torch.bfloat16):
            output, kl = forward(pixels)
        loss = reconstruction_loss(output.float(), pixels) + KL_WEIGHT * kl.float()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == args.steps:
            mse = F.mse_loss(output.detach().float(), pixels).item()
            rate = step * args.batch / (time.time() - started)
            print(f"step {step:5d}  loss {loss.item():.4f}  mse {mse:.5f}  {rate:.1f} img/s", flush=True)
        if step % 400 == 0 or step == args.steps:
            save(vae, args.out)


@torch.no_grad()
def save(vae: AutoencoderKL, out: Path) -> None:
    """Write the model with the scaling factor that gives the training latents unit variance."""
    vae.eval()
    pixels = to_tensor(gallery()[::7]).to(vae.device)
    latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in pixels.split(64)])
    vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 5))
    vae.save_pretrained(out)
    vae.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji/vae"))
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--resume", action="store_true", help="start from the weights in --out")
    parser.add_argument("--domain", type=float, default=0.0, help="share of pictures of the diffusion model's own set")
    parser.add_argument("--device", default="cpu")
    train(parser.parse_args())
