"""What the demo's two experts change, by noise level: `python benchmarks/emoji_experts.py`.

Loss: mean squared error of the predicted v (not weighted), over the latents of the pictures held out from training, one for
each emoji, with their captions, in ten bands of 100 timesteps; each picture has one timestep of each band and one noise, the
same for every network. `base` is the demo UNet, `experts` the network that the ensemble runs there (train_experts.py: `high`
from timestep 500 up, `low` below), `single` the control, which went on with all timesteps and saw as many pictures as
both experts together. `better`: of how many pictures the error is below the base's.

Recognition is measured by emoji_quality.py: of a bundle with the experts, with `--experts base`, and of one exported with
the control merged, `--lora`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from emoji_quality import ROOT
from harness import machine

sys.path.append(str(ROOT / "examples" / "emoji"))
from diffusers import DDIMScheduler, UNet2DConditionModel
from train_experts import SPLIT, conditions
from train_sr_subject import WEIGHTS
from train_style import fresh_unet

HERE = ROOT / "examples/emoji"
BAND = 100


def adapted(model: Path, adapter: Path) -> UNet2DConditionModel:
    unet = fresh_unet(model)
    unet.load_lora_adapter(adapter, weight_name=WEIGHTS, prefix=None)
    unet.fuse_lora()
    return unet


@torch.no_grad()
def errors(unet: UNet2DConditionModel, kept: dict[str, torch.Tensor], alphas: torch.Tensor, band: int) -> np.ndarray:
    """Of each picture, [n]."""
    generator = torch.Generator().manual_seed(band)
    x0 = kept["latents"]
    timesteps = band * BAND + torch.randint(BAND, (len(x0),), generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    a = alphas[timesteps].view(-1, 1, 1, 1)
    noisy, wanted = a.sqrt() * x0 + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x0
    chunks = zip(noisy.split(32), timesteps.split(32), kept["text"].split(32), strict=True)
    predicted = torch.cat([unet(x, t, text).sample for x, t, text in chunks])
    return (predicted - wanted).square().mean((1, 2, 3)).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--experts", type=Path, default=HERE / "experts")
    parser.add_argument("--single", type=Path, help="folder of the control's adapter")
    parser.add_argument("--run", type=Path, default=Path("runs/emoji/experts"), help="keeps the latents")
    parser.add_argument("--stride", type=int, default=1, help="every how many of the 257 pictures")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()

    kept = conditions(args.model, args.run / "held_out.pt", held_out=True)
    kept = {name: kept[name][:: args.stride] for name in ("latents", "text")}
    alphas = DDIMScheduler.from_pretrained(args.model / "scheduler").alphas_cumprod
    networks = {"base": fresh_unet(args.model)}
    networks |= {name: adapted(args.model, args.experts / name) for name in ("high", "low")}
    if args.single:
        networks["single"] = adapted(args.model, args.single)
    rows = []
    for band in range(1000 // BAND):
        chosen = {"base": "base", "experts": "high" if band * BAND >= SPLIT else "low", "single": "single"}
        found = {
            name: errors(networks[network], kept, alphas, band)
            for name, network in chosen.items()
            if network in networks
        }
        row: dict = {"timesteps": f"{band * BAND}..{(band + 1) * BAND - 1}"}
        row |= {name: round(float(error.mean()), 5) for name, error in found.items()}
        row["better"] = {name: int((found[name] < found["base"]).sum()) for name in found if name != "base"}
        rows.append(row)
        print(json.dumps(row), flush=True)
    report = {"pictures": len(kept["latents"]), "bands": rows, "machine": machine()}
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
