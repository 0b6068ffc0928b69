"""Train the SR network 64 -> 128 on 64-px crops, with noise-conditioning augmentation, and write it as a diffusers folder.

    python examples/emoji/train_sr.py                       # checkpoints into --run every --every minutes
    python examples/emoji/train_sr.py --resume --pool FILE  # goes on, half of the pairs from `sr_pool.py`

The first `--blind` steps leave the noisy picture out: a regression, from which the diffusion model starts. With it from the
first step, 350 steps of 8 crops let its grain through and stayed 5 dB below bicubic. The noise level of the low-res picture
is drawn per picture, denser at the low end: level = most · u², u uniform. The loss is the squared error of the clean
picture times min(SNR + 1, 2).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from sr import UNET_CONFIG, fresh, noising_scheduler, sampling_scheduler, save, upsample
from sr_data import random_pair, training_points
from train_unet import learning_rate
from train_vae import to_tensor

MOST_NOISE = 100  # highest noise level of the low-res picture, ᾱ = 0.97
CROP = 64
STRIDE = 8  # pixels a position of the deepest level: crops keep the phase of the strided convolutions


def crops(
    image: torch.Tensor, target: torch.Tensor, random: np.random.RandomState
) -> tuple[torch.Tensor, torch.Tensor]:
    """One crop of each picture, at the same place in both: of three random ones that with most contrast in the target."""
    chosen = []
    for i in range(len(target)):
        corners = random.randint(0, (target.shape[2] - CROP) // STRIDE + 1, (3, 2)) * STRIDE
        windows = [(i, slice(None), slice(y, y + CROP), slice(x, x + CROP)) for y, x in corners.tolist()]
        chosen.append(max(windows, key=lambda window: float(target[window].std())))
    return torch.stack([image[window] for window in chosen]), torch.stack([target[window] for window in chosen])


class Pairs:
    """Batches of (upsampled low-res, target) crops in [-1, 1], both [n, 3, size, size]."""

    def __init__(self, pool: Path | None, share: float, seed: int) -> None:
        self.points = training_points()
        self.random = np.random.RandomState(seed)
        self.pool = None if pool is None else np.load(pool)
        self.low, self.high = (None, None) if self.pool is None else (self.pool["low"], self.pool["high"])
        self.share = share if pool is not None else 0.0

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        if self.random.rand() >= self.share:
            return random_pair(self.points, self.random)
        index = self.random.randint(len(self.low))
        flip = slice(None, None, -1 if self.random.rand() < 0.5 else 1)
        return self.low[index][:, flip], self.high[index][:, flip]

    def batch(self, size: int, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = [self.draw() for _ in range(size)]
        image = upsample(to_tensor(np.stack([low for low, _ in drawn])))
        target = to_tensor(np.stack([high for _, high in drawn]))
        return (image, target) if whole else crops(image, target, self.random)


class Loss:
    """Weighted error of one batch at random timesteps and random noise levels of the low-res picture."""

    def __init__(self, device: str) -> None:
        self.alphas = sampling_scheduler().alphas_cumprod.to(device)
        self.noising = noising_scheduler().alphas_cumprod.to(device)
        snr = self.alphas / (1 - self.alphas)
        self.weights = (snr + 1).clamp(max=2.0)

    def __call__(
        self, unet: UNet2DConditionModel, image: torch.Tensor, target: torch.Tensor, levels: torch.Tensor
    ) -> torch.Tensor:
        n, device = len(image), image.device
        # stratified over the batch: lower gradient variance than independent draws, same distribution
        timesteps = ((torch.randperm(n, device=device) + torch.rand(n, device=device)) / n * 1000).long()
        a = self.alphas[timesteps].view(-1, 1, 1, 1)
        b = self.noising[levels].view(-1, 1, 1, 1)
        noise = torch.randn_like(target)
        noisy = a.sqrt() * target + (1 - a).sqrt() * noise
        image = b.sqrt() * image + (1 - b).sqrt() * torch.randn_like(image)
        output = unet(torch.cat([noisy, image], dim=1), timesteps, None, class_labels=levels).sample
        error = (output.float() - target).square().mean((1, 2, 3))
        return (self.weights[timesteps] * error).mean()


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    args.run.mkdir(parents=True, exist_ok=True)
    unet = fresh().to(args.device)
    shadow = {key: value.clone() for key, value in unet.state_dict().items()}
    print(f"{sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters", flush=True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-3)
    first, checkpoint = 1, args.run / "checkpoint.pt"
    if args.resume:
        state = torch.load(checkpoint, weights_only=True, map_location=args.device)
        unet.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        shadow, first = state["shadow"], state["step"] + 1
    pairs, loss_of = Pairs(args.pool, args.share, args.seed + first), Loss(args.device)
    started = saved = time.time()
    losses: list[float] = []
    for step in range(first, args.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        image, target = (x.to(args.device) for x in pairs.batch(args.batch, args.whole))
        levels = (MOST_NOISE * torch.rand(args.batch).square()).long().to(args.device)
        loss = loss_of(unet, image, target, levels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if step <= args.blind:
            unet.conv_in.weight.grad[:, :3] = 0.0
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        decay = min(args.ema, step / (step + 10))
        with torch.no_grad():
            for key, value in unet.state_dict().items():
                shadow[key].lerp_(value, 1 - decay)
        losses.append(loss.item())
        if step % 50 == 0:
            rate = (step - first + 1) * args.batch / (time.time() - started)
            print(f"step {step:5d}  loss {np.mean(losses[-200:]):.5f}  {rate:.1f} crops/s", flush=True)
        if time.time() - saved > 60 * args.every or step == args.steps:
            saved = time.time()
            state = {"model": unet.state_dict(), "optimizer": optimizer.state_dict(), "shadow": shadow, "step": step}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            averaged = UNet2DConditionModel(**UNET_CONFIG)
            averaged.load_state_dict(shadow)
            save(averaged, args.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/emoji/sr"), help="folder of the checkpoint")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji/sr/model"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --run")
    parser.add_argument("--pool", type=Path, help="pairs whose low-res pictures the demo model made (sr_pool.py)")
    parser.add_argument("--share", type=float, default=0.5, help="share of the pool's pairs in a batch")
    parser.add_argument("--whole", action="store_true", help="whole 128-px pictures instead of crops")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--blind", type=int, default=1000, help="steps without the noisy picture")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument("--every", type=float, default=3.0, help="minutes between checkpoints")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())
