"""The demo model: real weights through export, proof, and a generation in a process that has never seen torch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stepforge.export.build import BankOptions, export_bundle
from stepforge.export.graph.rewire import Variants
from stepforge.export.parity.verify import verify

MODEL = Path(__file__).resolve().parents[1] / "examples/emoji/model"
ADAPTERS = MODEL.parent / "adapters"
CONTROL = MODEL.parent / "control"


@pytest.mark.slow
@pytest.mark.long
def test_demo_model_from_weights_to_images_with_adapters(tmp_path):
    bundle = tmp_path / "emoji.bundle"
    controls = {"silhouette": CONTROL / "silhouette"}
    export_bundle(MODEL, bundle, name="emoji", bank=BankOptions(6, 16), controls=controls, reuse=Variants(0, True))
    prompts = ["cat face on a blue background"]
    verdict = verify(bundle, MODEL, controls=controls, precisions=["fp32"], prompts=prompts, steps=20, guidance=3.0)
    assert verdict["passed"], [check for check in verdict["checks"] if not check["passed"]]
    assert any(check["name"] == "with ControlNet silhouette" for check in verdict["checks"])
    code = (
        "import sys; from stepforge.runtime.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    adapters = [f"poster={ADAPTERS / 'poster'}", f"thermal={ADAPTERS / 'thermal'}", ADAPTERS / "subject.safetensors"]
    options = [text for adapter in adapters for text in ("--adapter", adapter)]
    requests, out = ADAPTERS.parent / "adapters.jsonl", tmp_path / "out"
    arguments = [
        "generate",
        bundle,
        "--requests",
        requests,
        "-g",
        3,
        *options,
        "-o",
        out,
        "--precision",
        "fp32",
        "--json",
    ]
    output = subprocess.check_output([sys.executable, "-c", code, *map(str, arguments)], text=True)
    rows = json.loads(output)
    assert len(rows) == 15
    assert rows[0]["model"] == "emoji"
    assert rows[0]["stats"]["rows"] == {"text_encoder": 2, "unet": 40, "vae_decoder": 1}
    assert len({Image.open(row["files"][0]).tobytes() for row in rows}) == 15

    lines = MODEL.parent / "control.jsonl"
    arguments = ["generate", bundle, "--requests", lines, "-g", 3, "-o", tmp_path / "shapes", "--precision", "fp32"]
    output = subprocess.check_output([sys.executable, "-c", code, *map(str, arguments), "--json"], text=True)
    rows = json.loads(output)
    assert all(row["stats"]["rows"]["control/silhouette"] == 40 for row in rows)
    overlaps = [
        overlap(Image.open(row["files"][0]), Image.open(lines.parent / json.loads(line)["controls"][0]["image"]))
        for row, line in zip(rows, lines.read_text().splitlines(), strict=True)
    ]
    # benchmarks/results/control_quality.json has the figures; without the ControlNet they are below 0.6
    assert np.mean(overlaps) >= 0.75, overlaps


def overlap(image: Image.Image, silhouette: Image.Image) -> float:
    """Intersection over union of the ink, what is far from the colour of the border, and the silhouette."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ink = np.abs(pixels - np.median(border, axis=0)).max(axis=2) > 40
    shape = np.asarray(silhouette.convert("L")) > 127
    return float((ink & shape).sum() / (ink | shape).sum())


def test_committed_weights_are_small():
    """26 MB for the model, 0.5 MB for an adapter, 40 MB for everything that the examples hold."""
    sizes = [path.stat().st_size for path in MODEL.rglob("*") if path.is_file()]
    assert sum(sizes) <= 26e6
    assert all(path.stat().st_size <= 512 * 1024 for path in ADAPTERS.rglob("*.safetensors"))
    assert sum(p.stat().st_size for p in MODEL.parent.rglob("*") if p.is_file()) <= 40e6
