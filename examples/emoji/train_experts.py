"""Two experts of the demo UNet, one for high and one for low noise, after eDiff-I (arXiv 2211.01324).

    python examples/emoji/train_experts.py high    # experts/high/pytorch_lora_weights.safetensors
    python examples/emoji/train_experts.py low

Each starts as the base model and goes on with its data and loss, on the timesteps of its half only: from 500 up, below
500. What it learns is kept as a LoRA of rank 4 on the UNet (diffusers' file, alpha equals the rank), text encoder frozen.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from data import emoji, gallery, pictures
from peft import LoraConfig
from train_style import CONVOLUTIONS, LINEARS, Diffusion, encode, fresh_text_encoder, fresh_unet, tokenize
from train_unet import UNCONDITIONAL

HERE = Path(__file__).resolve().parent
SPLIT = 500
BETWEEN = {"high": (SPLIT, 1000), "low": (0, SPLIT)}
RANK = 4


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    seen = [index for index, picture in enumerate(pictures()) if not picture.held_out]
    kept = args.run / "expert_latents.pt"
    if kept.exists():
        latents = torch.load(kept, weights_only=True)
    else:
        latents = encode(args.model, gallery()[seen])
        args.run.mkdir(parents=True, exist_ok=True)
        torch.save(latents, kept)
    ids = tokenize(args.model, [pictures()[index].caption for index in seen])
    empty = tokenize(args.model, [""])
    encoder, unet = fresh_text_encoder(args.model), fresh_unet(args.model)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[*LINEARS, *CONVOLUTIONS]))
    weights = [p for p in unet.parameters() if p.requires_grad]
    print(f"{len(emoji())} emoji, {len(seen)} pictures, {sum(p.numel() for p in weights):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    diffusion = Diffusion(args.model, BETWEEN[args.expert], bf16=args.bf16)
    started, losses = time.time(), []
    for step in range(1, args.steps + 1):
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, step / 20, 2 * (1 - (step - 1) / args.steps))
        pick = torch.randint(len(seen), (args.batch,))
        with torch.no_grad():
            text = encoder(torch.where(torch.rand(args.batch, 1) < UNCONDITIONAL, empty, ids[pick]))[0]
        loss = diffusion(unet, latents[pick], text).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 25 == 0:
            rate = step * args.batch / (time.time() - started)
            print(f"step {step:5d}  loss {np.mean(losses[-50:]):.4f}  {rate:.1f} img/s", flush=True)
        if step % 50 == 0 or step == args.steps:
            unet.half().save_lora_adapter(args.out / args.expert)
            unet.float()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("expert", choices=BETWEEN)
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--run", type=Path, default=Path("runs/emoji"), help="keeps the latents")
    parser.add_argument("--out", type=Path, default=HERE / "experts", help="the expert's folder is made in it")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast")
    train(parser.parse_args())
