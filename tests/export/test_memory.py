"""An export that cannot fit says so, with the figures, before it begins."""

from types import SimpleNamespace

import pytest

from stepforge.export import memory
from stepforge.export.build import export_bundle
from stepforge.runtime.errors import CheckpointError


def test_too_little_memory(tiny_sd1, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 10**6)
    with pytest.raises(
        CheckpointError, match=r"denoiser/unet needs some 0.\d GB of memory, 0.0 .*; 0.0 GB are available"
    ):
        export_bundle(tiny_sd1, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk(tiny_sd1, tmp_path, monkeypatch):
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, free=10**6))
    with pytest.raises(CheckpointError, match=r"takes more than 0.0 GB; .* has 0.0 GB free"):
        export_bundle(tiny_sd1, tmp_path / "no" / "such" / "folder")
    assert list(tmp_path.iterdir()) == []


def test_limits_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    machine = memory.available()
    assert machine is not None
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1500\n")
    (tmp_path / "memory.stat").write_text("anon 900\ninactive_file 400\nactive_file 100\n")
    assert memory.available() == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available() > 1 << 20
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    assert memory.available() is None
