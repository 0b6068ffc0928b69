"""benchmarks/gpu_report.py: the parts of `make test-gpu` run at small shapes on the CPU, and what fails is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import gpu_report

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.long  # three processes with torch; test_bench.py runs the parts' code in this one
def test_every_part_of_kernels_runs_dry(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out = tmp_path / "gpu"
    assert gpu_report.main(["--dry-run", "--out", str(out), "--parts", "compile", "kernels", "network"]) == 0
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert {"machine", "driver", "commit"} <= set(report)
    assert len(report["commit"]) == 40
    assert report["parts"]["kernels"]["result"]["cases"][0]["error_of_bound"]
    assert "sd15.onnx.xz 1" in report["parts"]["network"]["result"]["tables"]
    assert capsys.readouterr().out.count("pass") >= 3


def test_limits_and_failures(tmp_path):
    """A part out of time and one that fails; both leave what they printed, and no process."""
    slow = gpu_report.Part(
        "slow", ((sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(60)"),), 3
    )
    found = gpu_report.run(slow, slow.seconds, tmp_path)
    assert (found["failed"], found["last"]) == ("out of time", "begun")
    assert found["seconds"] < 30
    wrong = gpu_report.Part("wrong", ((sys.executable, "-c", "raise SystemExit('no luck')"),), 60)
    assert gpu_report.run(wrong, 60, tmp_path)["last"] == "no luck"
    assert gpu_report.run(wrong, 60, tmp_path)["failed"] == "1"


def test_the_whole_is_six_minutes():
    """The limits of the parts may add up to more: `main` gives each what is left."""
    parts = gpu_report.parts(Path("out"), tiny=False)
    assert gpu_report.LIMIT == 360
    assert all(part.seconds < gpu_report.LIMIT for part in parts)
    assert [part.name for part in parts] == ["compile", "kernels", "network", "peers", "parity", "engines"]
    for part in parts:
        for command in part.commands:
            scripts = [word for word in command if word.endswith((".py", ".xz"))]
            assert all((ROOT / word).exists() for word in scripts)
