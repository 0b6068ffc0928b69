"""Watch an image come: `python examples/previews.py [BUNDLE]` saves a small picture of every fifth step.

What the network expects at the end, in latents, is cheap to look at: three channels as colours show shapes and composition.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import stepforge

folder = Path("out/previews")
folder.mkdir(parents=True, exist_ok=True)


def preview(progress: stepforge.Progress) -> None:
    if progress.step % 5 == 0:
        colours = progress.denoised()[:3].transpose(1, 2, 0)  # [h, w, 3]
        low, high = np.percentile(colours, (1, 99))
        pixels = np.clip((colours - low) / max(high - low, 1e-6) * 255, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{progress.step:02d}.png")


with stepforge.load(sys.argv[1] if len(sys.argv) > 1 else "fake") as engine:
    result = engine.generate("cat face on a blue background", steps=20, seed=1, on_step=preview)
print(*result.save(folder / "final.png", overwrite=True))
