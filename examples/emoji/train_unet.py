"""Train the demo text encoder and UNet on the latents of `train_vae.py`, and write the model as a diffusers folder.

`python examples/emoji/train_unet.py` trains (resuming from its checkpoint, if there is one) and writes `--out` in
Stable Diffusion's folder layout, fp16 safetensors. AdamW, EMA, a constant rate that falls linearly at the end (`--decay`).
An emoji is drawn with a weight of 1 plus its running error, each error over the usual one of its noise level.
Latents are made once and kept in `--run`. `--device cuda --batch 256` for a GPU; `--no-bf16` for processors without bf16.
The committed weights go on with `--init examples/emoji/model --vae examples/emoji/model/vae --out runs/emoji/model`.

The network predicts v (arXiv 2202.00512), scaled-linear betas. With epsilon, an error in the clean latent counts by the
signal-to-noise ratio, so at high noise, where only the text can say what to draw, next to nothing is learnt: 1,750 steps
gave the right background and 0 of 40 emoji. With v it counts by SNR + 1, here cut at 6 as in min-SNR (arXiv 2303.09556).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from data import BACKGROUNDS, emoji, gallery, pictures
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from train_vae import to_tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MAX_TOKENS = 32
UNCONDITIONAL = 0.1  # share of captions replaced by "", which classifier-free guidance needs
NOISE_LEVELS = 20  # equal spans of timesteps, within which errors are compared
NAME_ONLY = 0.1  # share of captions without a background; the picture is then on white

UNET_CONFIG = dict(
    sample_size=16,
    in_channels=4,
    out_channels=4,
    block_out_channels=(64, 128, 192),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    attention_head_dim=4,
    cross_attention_dim=128,
    norm_num_groups=16,
)
SCHEDULER_CONFIG = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    prediction_type="v_prediction",
    num_train_timesteps=1000,
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
    timestep_spacing="leading",
)


def captions() -> list[str]:
    return [picture.caption for picture in pictures()] + [row.name for row in emoji()]


def train_tokenizer(out: Path) -> CLIPTokenizer:
    """A CLIP byte-level BPE whose merges cover every word of the captions."""
    words = Counter(word for caption in captions() for word in re.findall(r"[a-z]+", caption))
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=4000, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(sorted(words), trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=MAX_TOKENS
    )
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    (out / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    (out / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return tokenizer


def find_tokenizer(run: Path, init: Path | None) -> CLIPTokenizer:
    """The run's own, that of the model folder `init`, or a new one: equal merges get their ids in no fixed order."""
    if not run.exists():
        if init is None or not init.is_dir():
            return train_tokenizer(run)
        shutil.copytree(init / "tokenizer", run)
    return CLIPTokenizer.from_pretrained(run)


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            hidden_act="quick_gelu",
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Denoiser(torch.nn.Module):
    """Caption ids and noisy latents to the predicted v."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = text_encoder(tokenizer)
        self.unet = UNet2DConditionModel(**UNET_CONFIG)

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.unet(noisy, timesteps, self.text_encoder(ids)[0]).sample


@torch.no_grad()
def encode_all(vae: AutoencoderKL, file: Path) -> torch.Tensor:
    """Scaled latents of all pictures, [n, 4, 16, 16]; kept in `file` with the autoencoder's digest."""
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in vae.state_dict().values())).hexdigest()
    if file.exists():
        kept = torch.load(file, weights_only=True)
        if kept["vae"] == digest:
            return kept["latents"]
    chunks = to_tensor(gallery()).split(64)
    latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in chunks]) * vae.config.scaling_factor
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"vae": digest, "latents": latents}, file)
    return latents


def learning_rate(step: int, steps: int, peak: float, decay: float = 0.25) -> float:
    """Warm-up over 100 steps, constant, linear to zero over the last `decay` of the steps."""
    return peak * min(1.0, step / 100, max(0.0, (steps - step) / (steps * decay)))


def follow(averages: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
    """Move running averages [n] at `index` [b] a twentieth of the way to `values` [b]; of an index given twice one counts."""
    averages[index] = averages[index].lerp(values, 0.05)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    tokenizer = find_tokenizer(args.run / "tokenizer", args.init)
    vae = AutoencoderKL.from_pretrained(args.vae).eval()
    device = torch.device(args.device)
    latents = encode_all(vae, args.run / "latents.pt").to(device)
    seen = torch.tensor([i for i, picture in enumerate(pictures()) if not picture.held_out], device=device)
    print(f"{len(seen)} pictures, {len(tokenizer)} tokens, latent std {latents.std():.3f}", flush=True)

    def tokenize(texts: list[str]) -> torch.Tensor:
        return tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids.to(device)

    full = tokenize([picture.caption for picture in pictures()])
    short = tokenize([emoji()[picture.emoji].name for picture in pictures()])
    empty = tokenize([""])
    white = list(BACKGROUNDS).index("white")

    model = Denoiser(tokenizer).to(device)
    shadow = {key: value.clone() for key, value in model.state_dict().items()}
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-2)
    alphas = DDIMScheduler(**SCHEDULER_CONFIG).alphas_cumprod.to(device)
    snr = alphas / (1 - alphas)
    weights = (snr + 1).clamp(max=6.0) / (snr + 1)

    first, checkpoint, state = 1, args.run / "checkpoint.pt", None
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        shadow, first = state["shadow"], state["step"] + 1
    elif args.init is not None and args.init.is_dir():
        model.unet.load_state_dict(UNet2DConditionModel.from_pretrained(args.init / "unet").float().state_dict())
        model.text_encoder.load_state_dict(
            CLIPTextModel.from_pretrained(args.init / "text_encoder").float().state_dict()
        )
        shadow = {key: value.clone() for key, value in model.state_dict().items()}
    elif args.init is not None:
        model.load_state_dict(torch.load(args.init, weights_only=True, map_location=device)["model"])
    forward = torch.compile(model) if args.compile else model
    hardness = torch.ones(len(emoji()), device=device) if state is None else state["hardness"]
    usual = torch.ones(NOISE_LEVELS, device=device) if state is None else state["usual"]

    started, losses = time.time(), []
    for step in range(first, args.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.decay)
        pick = seen[torch.multinomial(1 + hardness[seen // len(BACKGROUNDS)], args.batch, replacement=True)]
        ids = full[pick].clone()
        draw = torch.rand(args.batch, device=device)
        named = (draw < UNCONDITIONAL + NAME_ONLY) & (draw >= UNCONDITIONAL)
        pick = torch.where(named, pick - pick % len(BACKGROUNDS) + white, pick)
        ids[named] = short[pick[named]]
        ids[draw < UNCONDITIONAL] = empty
        x0 = latents[pick]
        noise = torch.randn_like(x0)
        # stratified over the batch: lower gradient variance than independent draws, same distribution
        strata = torch.randperm(args.batch, device=device) + torch.rand(args.batch, device=device)
        timesteps = (strata / args.batch * 1000).long()
        a = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = a.sqrt() * x0 + (1 - a).sqrt() * noise
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            output = forward(noisy, timesteps, ids)
        error = (output.float() - (a.sqrt() * noise - (1 - a).sqrt() * x0)).square().mean((1, 2, 3))
        loss = (weights[timesteps] * error).mean()
        follow(usual, timesteps * NOISE_LEVELS // 1000, error.detach())
        follow(hardness, pick // len(BACKGROUNDS), error.detach() / usual[timesteps * NOISE_LEVELS // 1000])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                shadow[key].lerp_(value, 1 - decay) if value.is_floating_point() else shadow[key].copy_(value)
        losses.append(error.mean().item())
        if step % 100 == 0:
            rate = (step - first + 1) * args.batch / (time.time() - started)
            print(f"step {step:6d}  mse {np.mean(losses[-500:]):.4f}  {rate:.1f} img/s", flush=True)
        if step % 250 == 0 or step == args.steps:
            args.run.mkdir(parents=True, exist_ok=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "shadow": shadow, "step": step}
            torch.save(state | {"hardness": hardness, "usual": usual}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            write(tokenizer, vae, shadow, args.out)
            for name in ("vocab.json", "merges.txt"):  # transformers 5 writes tokenizer.json only; others read these
                shutil.copy(args.run / "tokenizer" / name, args.out / "tokenizer" / name)


def write(tokenizer: CLIPTokenizer, vae: AutoencoderKL, weights: dict[str, torch.Tensor], out: Path) -> None:
    """The diffusers folder, fp16 safetensors."""
    model = Denoiser(tokenizer)
    model.load_state_dict(weights)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=DDIMScheduler(**SCHEDULER_CONFIG),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16).save_pretrained(out)
    vae.to(torch.float32)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, default=Path("runs/emoji/vae"))
    parser.add_argument("--run", type=Path, default=Path("runs/emoji/unet"), help="checkpoints; resumes from here")
    parser.add_argument("--init", type=Path, help="checkpoint, or model folder, to take the first weights from")
    parser.add_argument("--out", type=Path, default=Path("examples/emoji/model"))
    parser.add_argument("--steps", type=int, default=5400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--decay", type=float, default=0.25, help="share of the steps over which the rate falls to zero"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args())
