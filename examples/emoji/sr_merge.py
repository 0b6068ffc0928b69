"""The SR folder with the subject's fine-tune merged: `python examples/emoji/sr_merge.py out/subject_sr`.

W + alpha / rank · B A of each convolution, in fp32, without torch: `make demo` exports the result as a stage of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).resolve().parent
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def merge(folder: Path, adapter: Path, out: Path) -> None:
    """Write the SR folder `folder` with the LoRA file `adapter` merged to `out`, fp16."""
    with safe_open(adapter, "np") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
        lora = {key: opened.get_tensor(key).astype(np.float32) for key in opened.keys()}  # noqa: SIM118, no mapping
    weights, scale = load_file(folder / WEIGHTS), settings["lora_alpha"] / settings["r"]
    for key, down in lora.items():
        if key.endswith(".lora_A.weight"):
            up, name = lora[key.replace("lora_A", "lora_B")], key.replace("lora_A.", "")
            change = np.tensordot(up[:, :, 0, 0], down, axes=1)
            weights[name] = (weights[name].astype(np.float32) + scale * change).astype(np.float16)
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns(Path(WEIGHTS).name), dirs_exist_ok=True)
    save_file(weights, out / WEIGHTS, {"format": "pt"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sr", type=Path, default=HERE / "sr", help="folder of the SR network")
    adapter = HERE / "adapters/subject_sr/pytorch_lora_weights.safetensors"
    parser.add_argument("--adapter", type=Path, default=adapter)
    args = parser.parse_args()
    merge(args.sr, args.adapter, args.out)
