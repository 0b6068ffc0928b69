"""MLPerf's LoadGen over the fake bundle, one process a scenario: what is counted, logged and answered."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import stepforge

pytest.importorskip("mlperf_loadgen", reason="mlcommons-loadgen is not installed; `make test-interop` installs it")

SCRIPT = Path(__file__).parents[2] / "benchmarks/mlperf.py"
SHORT = ("--steps", "2", "--min-duration", "0.5", "--min-queries", "12", "--qps", "20", "--latency", "60")


@pytest.fixture
def mlperf(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\na fox\n")

    def mlperf(*arguments, prompts=tmp_path / "prompts.txt"):
        line = [sys.executable, SCRIPT, "fake", "--prompts", prompts, "--out", tmp_path / "logs"]
        line += ["--json", tmp_path / "found.json", *arguments]
        code = subprocess.run([*map(str, line)], timeout=300).returncode
        return code, json.loads((tmp_path / "found.json").read_text())

    return mlperf


def test_scenarios(mlperf, tmp_path):
    code, found = mlperf(*SHORT)
    assert code == 0
    assert [row["scenario"] for row in found["scenarios"]] == ["SingleStream", "Offline", "Server"]
    for row in found["scenarios"]:
        assert row["result"] in ("VALID", "INVALID")
        assert row["result"] == "VALID" or row["reasons"]
        assert row["images"] >= 12
        assert row["failures"] == 0
        assert row["min_query_count"] in (12, 1)  # Offline is one query of many samples
        assert (tmp_path / "logs" / row["scenario"] / "mlperf_log_detail.txt").exists()
    single, offline, server = found["scenarios"]
    assert single["latency_p90_ns"] > 0
    assert offline["samples_per_second"] > 0
    assert server["latency_p99_ns"] > 0


def test_accuracy_logs_every_image(mlperf, tmp_path):
    code, found = mlperf("--scenario", "Offline", "--accuracy", *SHORT)
    assert (code, found["images"], found["failures"]) == (0, 3, 0)
    logged = json.loads((tmp_path / "logs/Offline/mlperf_log_accuracy.json").read_text())
    with stepforge.load("fake") as engine:
        for entry in logged:
            prompt = ("a cat", "a dog", "a fox")[entry["qsl_idx"]]
            (image,) = engine.generate(prompt, steps=2, guidance=8.0, seed=0).images
            assert bytes.fromhex(entry["data"]) == np.asarray(image).tobytes()
    assert sorted(entry["qsl_idx"] for entry in logged) == [0, 1, 2]


def test_failures_are_counted(mlperf, tmp_path):
    """A query that cannot be drawn is answered with nothing, and the run ends."""
    (tmp_path / "long.txt").write_text("a cat\n" + "x" * 20_001 + "\n")
    code, found = mlperf("--scenario", "Offline", "--accuracy", *SHORT, prompts=tmp_path / "long.txt")
    assert (code, found["images"], found["failures"]) == (1, 1, 1)
    assert "20001 characters" in found["first_failures"][0]


def test_settings_of_sdxl(tmp_path):
    """LoadGen's own mlperf.conf knows the model; the reference's negative prompt comes with its name."""
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import mlperf\n"
        "o = mlperf.parsed(['x', '--scenario', 'Server', '--model', 'stable-diffusion-xl']); s = mlperf.settings_of(o)\n"
        "print(s.server_target_latency_ns, s.min_duration_ms, s.performance_sample_count_override, o.negative)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(
        maxsplit=3
    )
    assert found[:3] == ["20000000000", "600000", "5000"]
    assert found[3].startswith("normal quality, low quality")
