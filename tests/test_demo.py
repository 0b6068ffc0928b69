"""The demo model: real weights through export, proof, and a generation in a process that has never seen torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stepforge.export.build import export_bundle
from stepforge.export.parity import verify

MODEL = Path(__file__).resolve().parents[1] / "examples/emoji/model"


@pytest.mark.slow
def test_demo_model_from_weights_to_image(tmp_path):
    bundle = tmp_path / "emoji.bundle"
    export_bundle(MODEL, bundle, name="emoji")
    verdict = verify(
        bundle, MODEL, precisions=["fp32"], prompts=["cat face on a blue background"], steps=20, guidance=3.0
    )
    assert verdict["passed"], [check for check in verdict["checks"] if not check["passed"]]
    out = tmp_path / "cat.png"
    code = (
        "import sys; from stepforge.runtime.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    arguments = [
        "generate",
        bundle,
        "cat face on a blue background",
        "-g",
        "3",
        "-o",
        out,
        "--precision",
        "fp32",
        "--json",
    ]
    output = subprocess.check_output([sys.executable, "-c", code, *map(str, arguments)], text=True)
    (row,) = json.loads(output)
    assert row["model"] == "emoji"
    assert row["stats"]["rows"] == {"text_encoder": 2, "unet": 40, "vae_decoder": 1}
    assert out.stat().st_size > 1000


def test_committed_weights_are_small():
    """26 MB for the model, 40 MB for everything that the examples hold."""
    sizes = [path.stat().st_size for path in MODEL.rglob("*") if path.is_file()]
    assert sum(sizes) <= 26e6
    assert sum(p.stat().st_size for p in MODEL.parent.rglob("*") if p.is_file()) <= 40e6
