"""Train a style LoRA on the demo UNet: `python examples/emoji/train_style.py thermal` (or `poster`).

PEFT LoRA of rank 4 on the linears of attention and feed-forward and on the convolutions of the residual blocks, text
encoder frozen, two thirds of the emoji (`styles.HELD_OUT` keeps the rest). Captions are the base model's, with any
background. The loss is the base model's: v-prediction, weight min(SNR + 1, 6) / (SNR + 1).

thermal is written as PEFT does (a folder with adapter_config.json), poster as diffusers does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from data import BACKGROUNDS, emoji
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from styles import HELD_OUT, STYLES, stylised
from train_unet import MAX_TOKENS, UNCONDITIONAL
from train_vae import to_tensor
from transformers import CLIPTextModel, CLIPTokenizer

LINEARS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
CONVOLUTIONS = ["conv1", "conv2"]
RANK, ALPHA = 4, 8


def fresh_unet(model: Path) -> UNet2DConditionModel:
    """The UNet in ordinary memory: as `from_pretrained` maps it from the file, it trains at half the speed."""
    loaded = UNet2DConditionModel.from_pretrained(model / "unet").float()
    unet = UNet2DConditionModel.from_config(loaded.config)
    unet.load_state_dict(loaded.state_dict())
    return unet.requires_grad_(False)


def fresh_text_encoder(model: Path) -> CLIPTextModel:
    loaded = CLIPTextModel.from_pretrained(model / "text_encoder").float()
    encoder = CLIPTextModel(loaded.config)
    encoder.load_state_dict(loaded.state_dict())
    return encoder.eval().requires_grad_(False)


def tokenize(model: Path, captions: list[str]) -> torch.Tensor:
    """Ids [n, 32]."""
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    return tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids


@torch.no_grad()
def encode(model: Path, pictures: np.ndarray) -> torch.Tensor:
    """Scaled latents [n, 4, 16, 16] of uint8 [n, 64, 64, 3]."""
    vae = AutoencoderKL.from_pretrained(model / "vae").float().eval()
    chunks = to_tensor(pictures).split(64)
    return torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in chunks]) * vae.config.scaling_factor


Teacher = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Diffusion:
    """The training objective: noise a latent, compare the predicted v, one number an example.

    Timesteps are drawn from `between`; `bf16=False` is for processors that compute bf16 in software.
    """

    def __init__(
        self, model: Path, between: tuple[int, int] = (0, 1000), bf16: bool = True, device: str = "cpu"
    ) -> None:
        self.first, self.span, self.bf16 = between[0], between[1] - between[0], bf16
        self.device = torch.device(device)
        self.alphas = DDIMScheduler.from_pretrained(model / "scheduler").alphas_cumprod.to(self.device)
        snr = self.alphas / (1 - self.alphas)
        self.weights = (snr + 1).clamp(max=6.0) / (snr + 1)

    def __call__(
        self, unet: torch.nn.Module, x0: torch.Tensor, text: torch.Tensor, teacher: Teacher | None = None
    ) -> torch.Tensor:
        """`teacher` predicts, from noisy latents and timesteps, what is wanted of the last rows in place of their v."""
        count = len(x0)
        noise = torch.randn_like(x0)
        strata = (torch.randperm(count, device=self.device) + torch.rand(count, device=self.device)) / count
        timesteps = self.first + (strata * self.span).long()
        a = self.alphas[timesteps].view(-1, 1, 1, 1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            noisy, wanted = a.sqrt() * x0 + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x0
            output = unet(noisy, timesteps, text).sample
            if teacher is not None:
                taught = teacher(noisy, timesteps).float()
                wanted = torch.cat([wanted[: count - len(taught)], taught])
        return self.weights[timesteps] * (output.float() - wanted).square().mean((1, 2, 3))


def save(unet: PeftModel, style: str, out: Path) -> None:
    """fp16: thermal in PEFT's layout, poster in diffusers'."""
    state = {key: value.half() for key, value in unet.state_dict().items()}
    if style == "thermal":
        unet.save_pretrained(out, state_dict=state)
        (out / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    else:
        adapter = get_peft_model_state_dict(unet, state_dict=state)
        adapter = {key.removeprefix("base_model.model."): value for key, value in adapter.items()}
        StableDiffusionPipeline.save_lora_weights(
            out,
            unet_lora_layers=convert_state_dict_to_diffusers(adapter),
            unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),  # without it alpha would be the rank
        )


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    seen = [index for index in range(len(emoji())) if index not in HELD_OUT]
    latents = encode(args.model, stylised(args.style)[seen]).to(args.device)
    with torch.no_grad():
        encoder = fresh_text_encoder(args.model)
        captions = [f"{emoji()[i].name} on a {colour} background" for i in seen for colour in BACKGROUNDS]
        text = encoder(tokenize(args.model, captions))[0].unflatten(0, (len(seen), len(BACKGROUNDS))).to(args.device)
        empty = encoder(tokenize(args.model, [""]))[0][0].to(args.device)

    unet = fresh_unet(args.model).to(args.device)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS + CONVOLUTIONS)
    unet = get_peft_model(unet, config)
    weights = [p for p in unet.parameters() if p.requires_grad]
    print(f"{len(seen)} pictures, {sum(p.numel() for p in weights):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    diffusion = Diffusion(args.model, bf16=args.bf16, device=args.device)
    forward = torch.compile(unet) if args.compile else unet
    started, losses = time.time(), []
    for step in range(1, args.steps + 1):
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, step / 50, 2 * (1 - (step - 1) / args.steps))
        pick = torch.randint(len(seen), (args.batch,), device=args.device)
        condition = text[pick, torch.randint(len(BACKGROUNDS), (args.batch,), device=args.device)]
        condition[torch.rand(args.batch, device=args.device) < UNCONDITIONAL] = empty
        loss = diffusion(forward, latents[pick], condition).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0:
            rate = step * args.batch / (time.time() - started)
            print(f"step {step:5d}  loss {np.mean(losses[-50:]):.4f}  {rate:.1f} img/s", flush=True)
        if step % 200 == 0 or step == args.steps:
            save(unet, args.style, args.out / args.style)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("style", choices=STYLES)
    here = Path(__file__).resolve().parent
    parser.add_argument("--model", type=Path, default=here / "model")
    parser.add_argument("--out", type=Path, default=here / "adapters", help="the folder of the style is made in it")
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args())
