"""Two experts of the demo UNet, one for high and one for low noise, after eDiff-I (arXiv 2211.01324).

    python examples/emoji/train_experts.py high    # experts/high/pytorch_lora_weights.safetensors
    python examples/emoji/train_experts.py low
    python examples/emoji/train_experts.py single --out runs/emoji/experts    # the same, of all timesteps: the control

Each starts as the base model and goes on with its data and loss, on the timesteps of its half only: from 500 up, below
500. What it learns is kept as a LoRA of rank 16 on the UNet (diffusers' file, alpha equals the rank), text encoder frozen.
Latents and hidden states of the captions are made once; a run that finds its checkpoint in --run goes on from it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from checkpoint import keep, resume
from data import gallery, pictures
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from train_style import CONVOLUTIONS, LINEARS, Diffusion, encode, fresh_text_encoder, fresh_unet, tokenize
from train_unet import UNCONDITIONAL

HERE = Path(__file__).resolve().parent
SPLIT = 500
BETWEEN = {"high": (SPLIT, 1000), "low": (0, SPLIT), "single": (0, 1000)}
RANK = 16


@torch.no_grad()
def conditions(model: Path, file: Path, held_out: bool = False) -> dict[str, torch.Tensor]:
    """Scaled latents [n, 4, 16, 16], hidden states of the captions [n, 32, 128] and of "" [32, 128]; kept in `file`."""
    if file.exists():
        return torch.load(file, weights_only=True)
    some = [index for index, picture in enumerate(pictures()) if picture.held_out == held_out]
    encoder = fresh_text_encoder(model)
    ids = tokenize(model, ["", *(pictures()[index].caption for index in some)])
    text = torch.cat([encoder(chunk)[0] for chunk in ids.split(64)])
    made = {"latents": encode(model, gallery()[some]), "text": text[1:].clone(), "empty": text[0].clone()}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(made, file)
    return made


def save(unet: UNet2DConditionModel, out: Path) -> None:
    """fp16, diffusers' file."""
    unet.half().save_lora_adapter(out)
    unet.float()


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    kept = conditions(args.model, args.run / "conditions.pt")
    latents, text, empty = (kept[name].to(args.device) for name in ("latents", "text", "empty"))
    unet = fresh_unet(args.model).to(args.device)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[*LINEARS, *CONVOLUTIONS]))
    weights = [p for p in unet.parameters() if p.requires_grad]
    print(f"{len(latents)} pictures, {sum(p.numel() for p in weights):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    checkpoint = args.run / f"{args.expert}.pt"
    first = resume(unet, optimizer, checkpoint, args.device)
    diffusion = Diffusion(args.model, BETWEEN[args.expert], bf16=args.bf16, device=args.device)
    started, losses = time.time(), []
    for step in range(first, args.steps + 1):
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, step / 20, 2 * (1 - (step - 1) / args.steps))
        pick = torch.randint(len(latents), (args.batch,), device=args.device)
        dropped = torch.rand(args.batch, 1, 1, device=args.device) < UNCONDITIONAL
        loss = diffusion(unet, latents[pick], torch.where(dropped, empty, text[pick])).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0:
            rate = (step - first + 1) * args.batch / (time.time() - started)
            print(f"step {step:5d}  loss {np.mean(losses[-50:]):.4f}  {rate:.1f} img/s", flush=True)
        if step % 20 == 0 or step == args.steps:
            keep(unet, optimizer, step, checkpoint)
    save(unet, args.out / args.expert)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("expert", choices=BETWEEN)
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--run", type=Path, default=Path("runs/emoji/experts"), help="latents and checkpoints")
    parser.add_argument("--out", type=Path, default=HERE / "experts", help="the expert's folder is made in it")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast")
    train(parser.parse_args())
