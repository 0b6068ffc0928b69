"""Train the demo ControlNet, silhouettes to emoji: `python examples/emoji/train_control.py`.

An emoji has one shape, which its name already tells; so the targets are emoji pulled into other shapes (`warps.py`), with
the base model's captions. The hint is white on black: the silhouette of the ink or, for half of the emoji in a shape that
is not their own, that shape filled, so that a plain heart suits a bicycle too. Half of the hints have hard edges.

The ControlNet (arXiv 2302.05543) starts as the frozen UNet's encoder; its hint encoder halves twice, as the autoencoder
does. The loss is the base model's. Resumes from its checkpoint, if there is one. Written in diffusers' layout, fp16.
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
from pathlib import Path

import numpy as np
import torch
from data import BACKGROUNDS, emoji, pictures
from diffusers import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from train_style import Diffusion, encode, fresh_text_encoder, fresh_unet, tokenize
from train_unet import UNCONDITIONAL, learning_rate
from warps import composite, draw_warp, silhouette, warp

HINT_CHANNELS = (16, 32, 64)  # each step but the first halves the picture: 64 -> 16, the latents' side
FILLED = 0.5  # share of the emoji in other shapes whose hint is the shape itself
HARD = 0.5  # share of hints without antialiasing


class Controlled(torch.nn.Module):
    """The UNet with the ControlNet's residuals at scale 1."""

    def __init__(self, unet: torch.nn.Module, control: ControlNetModel) -> None:
        super().__init__()
        self.unet, self.control = unet, control

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, hint: torch.Tensor
    ) -> UNet2DConditionOutput:
        down, middle = self.control(noisy, timesteps, text, hint, return_dict=False)
        return self.unet(
            noisy, timesteps, text, down_block_additional_residuals=down, mid_block_additional_residual=middle
        )


class Pool:
    """`count` warped pictures: rows of `pictures()`, latents [n, 4, 16, 16], hints [n, 64, 64] uint8."""

    def __init__(self, model: Path, count: int, random: np.random.RandomState, bf16: bool) -> None:
        seen = [index for index, picture in enumerate(pictures()) if not picture.held_out]
        self.rows = torch.tensor(random.choice(seen, count))
        images, hints = [], []
        for chunk in self.rows.split(64):
            chosen = [pictures()[index] for index in chunk.tolist()]
            warps = [draw_warp(picture.emoji, random) for picture in chosen]
            ink, filled = warp(warps)
            images.append(composite(ink, [picture.background for picture in chosen]))
            use = torch.tensor([row.target is not None and random.rand() < FILLED for row in warps])
            hint = torch.where(use[:, None, None], filled, silhouette(ink))
            hard = torch.tensor(random.rand(len(chosen)) < HARD)
            hints.append((torch.where(hard[:, None, None], (hint > 0.5).float(), hint) * 255).round().byte())
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            self.latents = encode(model, np.concatenate(images)).float()
        self.hints = torch.cat(hints)

    def hint(self, pick: torch.Tensor) -> torch.Tensor:
        return (self.hints[pick].float() / 255)[:, None].expand(-1, 3, -1, -1)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        encoder = fresh_text_encoder(args.model)
        text = torch.cat([encoder(ids)[0] for ids in tokenize(args.model, [p.caption for p in pictures()]).split(257)])
        text, empty = text.to(args.device), encoder(tokenize(args.model, [""]))[0][0].to(args.device)

    unet = fresh_unet(args.model).to(args.device)
    if args.init is None:
        control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=HINT_CHANNELS)
    else:
        control = ControlNetModel.from_pretrained(args.init, local_files_only=True).float()
    control.train()
    control.to(args.device).requires_grad_(True)
    shadow = copy.deepcopy(control).requires_grad_(False)
    weights = list(control.parameters())
    print(f"{len(emoji())} emoji, {len(BACKGROUNDS)} backgrounds, {sum(p.numel() for p in weights):,} parameters")
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-2)

    first, checkpoint = 1, args.run / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=args.device)
        control.load_state_dict(state["model"])
        shadow.load_state_dict(state["shadow"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"] + 1
    random, model = np.random.RandomState(first), Controlled(unet, control)
    diffusion = Diffusion(args.model, bf16=args.bf16, device=args.device)
    started, losses = time.time(), []
    for step in range(first, args.steps + 1):
        if (step - first) % args.refresh == 0:
            pool = Pool(args.model, args.pool, random, args.bf16)
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.steps, args.lr)
        pick = torch.randint(args.pool, (args.batch,))
        condition = text[pool.rows[pick]]
        condition[torch.rand(args.batch, device=args.device) < UNCONDITIONAL] = empty
        hint, latents = pool.hint(pick).to(args.device), pool.latents[pick].to(args.device)
        loss = diffusion(functools.partial(model, hint=hint), latents, condition).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        decay = min(0.998, (1 + step) / (10 + step))
        for average, value in zip(shadow.parameters(), weights, strict=True):
            average.lerp_(value.detach(), 1 - decay)
        losses.append(loss.item())
        if step % 50 == 0:
            rate = (step - first + 1) * args.batch / (time.time() - started)
            print(f"step {step:5d}  loss {np.mean(losses[-50:]):.4f}  {rate:.1f} img/s", flush=True)
        if step % args.every == 0 or step == args.steps:
            args.run.mkdir(parents=True, exist_ok=True)
            state = {"model": control.state_dict(), "shadow": shadow.state_dict(), "step": step}
            torch.save(state | {"optimizer": optimizer.state_dict()}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            copy.deepcopy(shadow).half().save_pretrained(args.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent
    parser.add_argument("--model", type=Path, default=here / "model")
    parser.add_argument("--run", type=Path, default=Path("runs/emoji/control"), help="checkpoints; resumes from here")
    parser.add_argument(
        "--init", type=Path, help="folder of a ControlNet to go on from, in place of the UNet's encoder"
    )
    parser.add_argument("--out", type=Path, default=here / "control/silhouette")
    parser.add_argument("--steps", type=int, default=3300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--pool", type=int, default=6000, help="warped pictures held at a time")
    parser.add_argument("--refresh", type=int, default=500, help="steps between new pools")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast")
    parser.add_argument("--threads", type=int, help="of torch")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    train(arguments)
