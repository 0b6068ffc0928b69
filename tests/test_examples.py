"""The small scripts in examples/ run on the test model."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FILES = {
    "batch.py": ["out/batch/0-1.png", "out/batch/1-2.png", "out/batch/2-3.png"],
    "previews.py": [f"out/previews/{name}.png" for name in ("05", "10", "15", "20", "final")],
}


@pytest.mark.parametrize("script", FILES)
def test_example(script, tmp_path):
    subprocess.run([sys.executable, EXAMPLES / script], check=True, cwd=tmp_path, capture_output=True)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")) == FILES[script]


def test_every_script_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(FILES)
