"""DreamBooth (arXiv 2208.12242) on the demo model: five pictures of the creature of `subject.py` become "sks alien".

LoRA of rank 4 on the UNet's transformers and on the text encoder. Each batch is half pictures of the subject, captioned
"sks alien on a ... background", half pictures of the class: 100 latents which the frozen model samples for
"alien on a ... background". The second half is the prior-preservation loss, added with weight lambda (`--prior`, 1).
The class alone does not hold what is not of it. So as many rows again as the batch are other emoji, without text one time in
ten, and what is wanted of them is the frozen model's own prediction (learning without forgetting, arXiv 1606.09282), with
weight `--keep`. These are two thirds of the emoji: `adapter_quality.py` counts the third that is not among them by itself.

Written as kohya's sd-scripts write a LoRA: one safetensors file, `lora_unet_...` and `lora_te_...`, alpha beside each pair.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import BACKGROUNDS, emoji, gallery, pictures
from diffusers import AutoencoderKL, StableDiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from styles import HELD_OUT
from subject import CLASS, NAME, TRAINING, training_pictures
from train_style import LINEARS, Diffusion, encode, fresh_text_encoder, fresh_unet, tokenize
from train_unet import UNCONDITIONAL
from train_vae import to_tensor

RANK, ALPHA = 4, 2
UNET_TARGETS = [*LINEARS, "proj_in", "proj_out"]
LOSSES = ("subject", "class", "kept")
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def refine(model: Path, latents: torch.Tensor, pictures: np.ndarray) -> torch.Tensor:
    """The latents moved, by 80 gradient steps, to where the decoder draws `pictures` best.

    The encoder never saw such a picture and loses the iris.
    """
    vae = AutoencoderKL.from_pretrained(model / "vae").float().eval().requires_grad_(False)
    target, start = to_tensor(pictures), latents / vae.config.scaling_factor
    latent = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([latent], lr=0.06)
    for step in range(80):
        optimizer.param_groups[0]["lr"] = 0.06 * (1 - step / 80)
        drawn = vae.decode(latent).sample
        loss = F.mse_loss(drawn, target) + F.l1_loss(drawn, target) + 2e-3 * (latent - start).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return latent.detach() * vae.config.scaling_factor


@torch.no_grad()
def sample_class(model: Path, count: int) -> tuple[torch.Tensor, list[str]]:
    """Scaled latents of the frozen model's own pictures of the class, and their captions."""
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    captions = [f"{CLASS} on a {colour} background" for colour in BACKGROUNDS] * (count // len(BACKGROUNDS))
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(captions))]
    options = dict(num_inference_steps=20, guidance_scale=3.0, height=64, width=64, output_type="latent")
    latents = [
        pipe(captions[i : i + 20], generator=generators[i : i + 20], **options).images
        for i in range(0, len(captions), 20)
    ]
    return torch.cat(latents), captions


def others(model: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled latents of the pictures that training saw, of emoji neither the class nor held out, and their captions' ids."""
    rows = [
        (index, picture.caption)
        for index, picture in enumerate(pictures())
        if not picture.held_out and picture.emoji not in HELD_OUT and emoji()[picture.emoji].name != CLASS
    ]
    shown, captions = zip(*rows, strict=True)
    return encode(model, gallery()[list(shown)]), tokenize(model, list(captions))


def kohya(model: PeftModel, prefix: str) -> dict[str, torch.Tensor]:
    """The adapter in kohya's names: the module's path, dots made underscores."""
    state = {}
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            name = prefix + path.replace(".", "_")
            state[f"{name}.lora_down.weight"] = layer.lora_A["default"].weight
            state[f"{name}.lora_up.weight"] = layer.lora_B["default"].weight
            state[f"{name}.alpha"] = torch.tensor(float(ALPHA))
    return {key: value.detach().half().contiguous() for key, value in state.items()}


def save(unet: PeftModel, encoder: PeftModel, out: Path) -> None:
    # kohya's names have the `text_model` that CLIPTextModel had before transformers 5
    nested = hasattr(encoder.get_base_model(), "text_model")
    state = kohya(unet, "lora_unet_") | kohya(encoder, "lora_te_" if nested else "lora_te_text_model_")
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(RANK),
        "ss_network_alpha": str(float(ALPHA)),
        "ss_base_model_version": "sd_v2_v",
        "ss_v2": "True",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, out, metadata)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    subject = refine(args.model, encode(args.model, training_pictures()), training_pictures()).to(args.device)
    subject_ids = tokenize(args.model, [f"{NAME} on a {background} background" for background, _ in TRAINING])
    prior, captions = sample_class(args.model, 100)
    subject_ids, prior, prior_ids = (x.to(args.device) for x in (subject_ids, prior, tokenize(args.model, captions)))
    other, other_ids = (x.to(args.device) for x in others(args.model))
    empty = tokenize(args.model, [""])[0].to(args.device)

    frozen, frozen_encoder = fresh_unet(args.model).to(args.device), fresh_text_encoder(args.model).to(args.device)
    unet = fresh_unet(args.model).to(args.device)
    unet = get_peft_model(unet, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=UNET_TARGETS))
    encoder = fresh_text_encoder(args.model).to(args.device)
    encoder = get_peft_model(encoder, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TEXT_TARGETS))
    weights = [p for p in (*unet.parameters(), *encoder.parameters()) if p.requires_grad]
    print(f"{sum(p.numel() for p in weights):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    diffusion = Diffusion(args.model, bf16=args.bf16, device=args.device)
    forward = torch.compile(unet) if args.compile else unet
    started, losses, half = time.time(), [], args.batch // 2

    @torch.no_grad()
    def teach(ids: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return frozen(noisy[-len(ids) :], timesteps[-len(ids) :], frozen_encoder(ids)[0]).sample

    for step in range(1, args.steps + 1):
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, step / 20, 2 * (1 - (step - 1) / args.steps))
        ours, theirs = torch.randint(len(subject), (half,)), torch.randint(len(prior), (half,))
        kept = torch.randint(len(other), (2 * half if args.keep else 0,))
        kept_ids = torch.where(torch.rand(len(kept), 1, device=args.device) < UNCONDITIONAL, empty, other_ids[kept])
        text = encoder(torch.cat([subject_ids[ours], prior_ids[theirs], kept_ids]))[0]
        x0 = torch.cat([subject[ours], prior[theirs], other[kept]])
        error = diffusion(forward, x0, text, partial(teach, kept_ids) if args.keep else None)
        own, held, rest = error.split([half, half, len(kept)])
        loss = own.mean() + args.prior * held.mean() + args.keep * rest.sum() / max(1, len(kept))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append([own.mean().item(), held.mean().item(), rest.sum().item() / max(1, len(kept))])
        if step % 50 == 0:
            told = "  ".join(f"{n} {v:.4f}" for n, v in zip(LOSSES, np.mean(losses[-50:], axis=0), strict=True))
            print(f"step {step:5d}  {told}  {step * len(x0) / (time.time() - started):.1f} img/s", flush=True)
        if step % 100 == 0 or step == args.steps:
            save(unet, encoder, args.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent
    parser.add_argument("--model", type=Path, default=here / "model")
    parser.add_argument("--out", type=Path, default=here / "adapters" / "subject.safetensors")
    parser.add_argument(
        "--prior", type=float, default=1.0, help="weight of the prior-preservation loss; 0 is the ablation"
    )
    parser.add_argument(
        "--keep", type=float, default=4.0, help="weight of the frozen model's predictions; 0 goes without"
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8, help="half subject, half class")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=True, help="slower on processors that have no bf16"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args())
