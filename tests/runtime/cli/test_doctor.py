"""`stepforge doctor`: what this machine can run."""

import json

import pytest

from stepforge.runtime.bundle import MANIFEST
from stepforge.runtime.cli.doctor import examine


def test_doctor(run, capsys, tiny_sd1_bundle, tmp_path):
    assert run("doctor", tiny_sd1_bundle) == 0
    assert "loads all 4 networks" in capsys.readouterr().out
    assert run("doctor", tmp_path) == 1
    assert "FAIL bundle" in capsys.readouterr().out


def test_doctor_names_the_compile_cache(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder, text in {
        tmp_path / "new": "are kept there",
        tmp_path / "file/a": "cannot be written",
        "": "none",
    }.items():
        monkeypatch.setenv("STEPFORGE_CACHE", str(folder))
        (found,) = [finding for finding in examine() if finding.subject == "compile cache"]
        assert found.ok
        assert text in found.text
        assert str(folder) in found.text


@pytest.mark.parametrize("command", ["doctor", "info", "plan"])
def test_a_strange_manifest_is_one_line(run, capsys, hand_written_bundle, command):
    manifest = hand_written_bundle / MANIFEST
    plain = json.loads(manifest.read_text())
    for place, value in (
        ("components", {}), ("model", []), ("model", None), ("files", {"a": 1}), ("scheduler", {"sampler": []}),
        ("versions", [1]), ("presets", {"a": []}), ("controls", {"x": {"global_pool": 3}}), ("verdict", []),
        ("source", "x"), ("format", [4]),
    ):  # fmt: skip
        manifest.write_text(json.dumps({**plain, place: value}))
        assert run(command, hand_written_bundle) == 1
        told = capsys.readouterr()
        lines = [line for line in (told.out + told.err).splitlines() if "bundle" in line and not line.startswith("ok ")]
        assert len(lines) == 1, place
        assert "Traceback" not in told.out + told.err
