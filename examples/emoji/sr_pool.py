"""Training pairs whose 64-px picture came out of the demo model: `python examples/emoji/sr_pool.py` writes --out.

A third passed the autoencoder only; the others were noised to a random timestep and denoised again with their caption (six
DDIM steps at most, no guidance), which melts detail as the demo model melts it and leaves shapes where they were. Held-out
emoji are left out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from data import BACKGROUNDS, emoji
from diffusers import DDIMScheduler, StableDiffusionPipeline
from sr_data import HELD_OUT, canvas, pair, training_points
from train_vae import to_tensor

STRIDE = 80  # timesteps between denoising steps
MOST_STEPS = 6


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """[n, 3, h, w] in [-1, 1] -> uint8 [n, h, w, 3]."""
    return pixels.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def round_trip(pipe: StableDiffusionPipeline, low: np.ndarray, captions: list[str] | None, steps: int) -> np.ndarray:
    """Encode, noise to timestep 80·steps and denoise (not at all for 0 steps), decode: uint8 [n, 64, 64, 3] in and out."""
    latents = pipe.vae.encode(to_tensor(low).to(pipe.device)).latent_dist.sample() * pipe.vae.config.scaling_factor
    if steps:
        text, _ = pipe.encode_prompt(captions, pipe.device, 1, False)
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(scheduler.config.num_train_timesteps // STRIDE)
        timesteps = scheduler.timesteps[-steps:]
        latents = scheduler.add_noise(latents, torch.randn_like(latents), timesteps[:1].expand(len(latents)))
        for t in timesteps:
            latents = scheduler.step(pipe.unet(latents, t, text).sample, t, latents).prev_sample
    return to_uint8(pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample)


def make(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    random = np.random.RandomState(args.seed)
    pipe = StableDiffusionPipeline.from_pretrained(args.model, safety_checker=None, dtype=torch.float32).to(args.device)
    names = {row.code_point: row.name for row in emoji() if row.code_point not in HELD_OUT}
    every, ours, colours = training_points(), list(names), list(BACKGROUNDS)
    lows, highs, started = [], [], time.time()
    for index in range(args.batches):
        steps = 0 if index % 3 == 0 else int(random.randint(1, MOST_STEPS + 1))
        points = random.choice(ours if steps else every, args.batch)
        grounds = random.choice(colours, args.batch)
        drawn = [
            pair(canvas(point, BACKGROUNDS[ground], shift=tuple(random.uniform(-1, 1, 2))))
            for point, ground in zip(points, grounds, strict=True)
        ]
        captions = None
        if steps:
            captions = [
                f"{names[point]} on a {ground} background" for point, ground in zip(points, grounds, strict=True)
            ]
        lows.append(round_trip(pipe, np.stack([low for low, _ in drawn]), captions, steps))
        highs.append(np.stack([high for _, high in drawn]))
        if index % 10 == 9 or index == args.batches - 1:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            np.savez(args.out, low=np.concatenate(lows), high=np.concatenate(highs))
            print(f"{(index + 1) * args.batch} pairs, {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent
    parser.add_argument("--model", type=Path, default=here / "model")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji/sr/pool.npz"))
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    make(parser.parse_args())
