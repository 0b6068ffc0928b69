"""DreamBooth (arXiv 2208.12242, section 4.4) on the SR network: a LoRA that knows the subject's fine detail.

    python examples/emoji/train_sr_subject.py        # adapters/subject_sr/pytorch_lora_weights.safetensors
    python examples/emoji/sr_merge.py out/subject_sr # the SR folder with the adapter merged into it

Pairs: the five pictures of adapters/subject/ at 64 px, as drawn and as the demo's decoder draws them at best
(train_subject.refine), and the same drawings at 128 px. As in the paper the noise level of the low-res picture is far below
pretraining's: variance 1e-3 at most (levels 0 to 12 of the cosine schedule) instead of 0.01, and 0.21 in `--most-noise 300`,
the ablation. Prior preservation is not used for SR, as in the paper. A run that finds its checkpoint in --run goes on from
it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from checkpoint import keep, resume
from data import BACKGROUNDS, SIZE
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from sr import load, upsample
from sr_data import pair
from sr_pool import to_uint8
from subject import TRAINING, Pose, ink
from train_sr import Loss
from train_style import encode
from train_subject import refine
from train_vae import to_tensor

HERE = Path(__file__).resolve().parent
RANK = 8
TARGETS = ["conv1", "conv2", "conv_shortcut", "conv_in", "conv_out"]
WEIGHTS = "pytorch_lora_weights.safetensors"  # a name: without one diffusers asks the hub
MOST_NOISE = 12  # 1 - ᾱ = 9e-4


def drawing(background: str, pose: Pose = Pose()) -> tuple[np.ndarray, np.ndarray]:
    """The subject at 64 px and at 128 px, placed as `sr_data.pair` places emoji."""
    picture = Image.new("RGBA", (4 * SIZE, 4 * SIZE), BACKGROUNDS[background])
    picture.alpha_composite(ink(pose, size=4 * SIZE))
    return pair(picture.convert("RGB"), Image.Resampling.BOX)


def redrawn(model: Path, low: np.ndarray) -> np.ndarray:
    """Pictures as the decoder draws them at best, uint8 [n, 64, 64, 3] in and out."""
    vae = AutoencoderKL.from_pretrained(model / "vae").float().eval()
    latents = refine(model, encode(model, low), low)
    with torch.no_grad():
        return to_uint8(vae.decode(latents / vae.config.scaling_factor).sample)


def training_pairs(model: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Upsampled low-res pictures and targets: five as drawn, five as decoded."""
    low, high = (np.stack(column) for column in zip(*(drawing(*row) for row in TRAINING), strict=True))
    decoded = redrawn(model, low)
    return upsample(to_tensor(np.concatenate([low, decoded]))), to_tensor(np.concatenate([high, high]))


def adapted(folder: Path, adapter: Path) -> UNet2DConditionModel:
    """The SR network with the adapter merged."""
    unet = load(folder)
    unet.load_lora_adapter(adapter, weight_name=WEIGHTS, prefix=None)
    unet.fuse_lora()
    unet.unload_lora()
    return unet


def train(args: argparse.Namespace) -> None:
    images, targets = (x.to(args.device) for x in training_pairs(args.model))
    unet = load(args.sr).to(args.device).requires_grad_(False).train()
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    weights = [p for p in unet.parameters() if p.requires_grad]
    print(f"{sum(p.numel() for p in weights):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    loss_of = Loss(args.device)
    checkpoint = args.run / f"noise_{args.most_noise}.pt"
    first = resume(unet, optimizer, checkpoint, args.device)
    started, losses = time.time(), []
    for step in range(first, args.steps + 1):
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, step / 10) * (1 - step / (args.steps + 1))
        pick = torch.randint(len(images), (args.batch,), device=args.device)
        levels = torch.randint(0, args.most_noise + 1, (args.batch,), device=args.device)
        loss = loss_of(unet, images[pick], targets[pick], levels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 25 == 0:
            rate = (step - first + 1) * args.batch / (time.time() - started)
            print(f"step {step:5d}  loss {np.mean(losses[-50:]):.5f}  {rate:.1f} pictures/s", flush=True)
        if step % 50 == 0 or step == args.steps:
            keep(unet, optimizer, step, checkpoint)
    unet.half().save_lora_adapter(args.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sr", type=Path, default=HERE / "sr", help="folder of the SR network")
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--run", type=Path, default=Path("runs/emoji/sr_subject"), help="folder of the checkpoint")
    parser.add_argument("--out", type=Path, default=HERE / "adapters" / "subject_sr")
    parser.add_argument("--most-noise", type=int, default=MOST_NOISE)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--device", default="cpu")
    train(parser.parse_args())
