"""Disks that are full, read-only or too slow to say so at once: a batch ends in one line, and a later run goes on."""

import errno
import os
import resource
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from stepforge.runtime.serve.draw import Files

PROMPTS = [{"prompt": f"cat {i}", "seed": i} for i in range(12)]


FAULTS = {  # calls that meet a full disk, by the number of the call that does
    "write": (os, "write", errno.ENOSPC),
    "fsync": (os, "fsync", errno.EIO),
    "replace": (Path, "replace", errno.EROFS),
}


@pytest.mark.parametrize("layout", ["files", "webdataset"])
@pytest.mark.parametrize("fault", FAULTS)
def test_full_disks_end_a_run_in_one_line(fault, layout, batch, jobs, tmp_path, monkeypatch, files):
    """The journal is cut short, a file cannot be closed or renamed: what was finished stays, and a later run goes on."""
    options = ("--layout", layout, "--shard-size", 5)
    manifest = jobs(*PROMPTS)
    batch(manifest, *options, out="whole")
    owner, name, number = FAULTS[fault]
    original, calls = getattr(owner, name), []

    def failing(*arguments, **keywords):
        calls.append(1)
        if len(calls) > 4:
            if name == "write":
                original(arguments[0], bytes(arguments[1])[:7])  # a torn line
            raise OSError(number, os.strerror(number), "somewhere")
        return original(*arguments, **keywords)

    monkeypatch.setattr("stepforge.runtime.serve.batch.TOGETHER", 1)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        code, report, errors = batch(manifest, *options)
    assert (code, report, errors) == (1, None, [f"stepforge: somewhere: {os.strerror(number)}"])
    code, report, _ = batch(manifest, *options)
    assert code == 0
    assert report["resumed"] + report["done"] == len(PROMPTS)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_folders_that_cannot_be_written(batch, jobs, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "out")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert batch(jobs(PROMPTS[0])) == (1, None, ["stepforge: out: Read-only file system"])


def test_disk_full_in_the_middle_of_a_job_ends_it_in_one_line_and_room_lets_it_go_on(batch, jobs, tmp_path, files):
    """A file system that is really full, of 96 KiB: names, journal and images stay whole, and with room the rest follows."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", disk]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a file system")
    manifest = jobs(*({"prompt": f"cat {i}", "seed": i} for i in range(60)))
    try:
        code, report, errors = batch(manifest, out="disk/out")
        assert (code, report, len(errors)) == (1, None, 1)
        assert errors[0].endswith(": No space left on device")
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        done = len(list((disk / "out").glob("*.png")))
        code, report, errors = batch(manifest, out="disk/out")
        assert (code, report["done"] + report["resumed"], errors) == (0, 60, [])
        assert 0 < report["resumed"] <= done
        batch(manifest, out="whole")
        assert files(disk / "out") == files(tmp_path / "whole")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("layout", ["files", "webdataset"])
def test_files_that_may_not_grow_end_a_job_in_one_line(layout, batch, jobs, tmp_path, files):
    """RLIMIT_FSIZE: a write is cut short in the middle, of the journal or of a shard, and then refused with EFBIG."""
    manifest = jobs(*PROMPTS)
    options = ("--layout", layout, "--shard-size", 5)
    batch(manifest, *options, out="whole")
    size = {"files": 6000, "webdataset": 9000}[layout]
    command = [sys.executable, "-m", "stepforge.runtime", "batch", "fake", manifest, "-o", tmp_path / "out", *options]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "stepforge: File too large\n"
    code, report, _ = batch(manifest, *options)
    assert (code, report["done"] + report["resumed"]) == (0, len(PROMPTS))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("place", ["", ".stepforge/partial"])
def test_folders_that_become_read_only_in_the_middle_of_a_job(place, batch, jobs, tmp_path, monkeypatch, files):
    """As a user whom modes bind: root lends its rights to nobody."""
    manifest = jobs(*PROMPTS)
    batch(manifest, "--max-rows", 2, out="whole")
    root, lock, written = os.geteuid() == 0, threading.Lock(), []
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        out.chmod(0o777)
        folder = out / "out" / place
        original = Files.write

        def write(*arguments):
            with lock:
                written.append(arguments[1])
                if len(written) == 10:  # beyond the room of 8: some are finished
                    folder.chmod(0o555)
            return original(*arguments)

        for path in (tmp_path, *tmp_path.parents):
            if path.stat().st_uid == os.geteuid() and path.is_relative_to(tempfile.gettempdir()):
                path.chmod(path.stat().st_mode | 0o055)
        if root:
            os.seteuid(65534)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(Files, "write", write)
                code, report, errors = batch(manifest, "--max-rows", 2, out=out / "out")
            assert (code, report, len(errors)) == (1, None, 1)
            assert errors[0].endswith(": Permission denied")
            folder.chmod(0o755)
            code, report, _ = batch(manifest, "--max-rows", 2, out=out / "out")
        finally:
            if root:
                os.seteuid(0)
        assert (code, report["done"] + report["resumed"]) == (0, len(PROMPTS))
        assert report["resumed"]
        assert files(out / "out") == files(tmp_path / "whole")
