"""The output of an export: complete or absent, replaces nothing unasked, and leaves no trace of what was stopped."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from stepforge.export import publish
from stepforge.export.build import export_bundle
from stepforge.export.publish import check_out, staged
from stepforge.runtime.bundle import locked
from stepforge.runtime.cli.main import main
from stepforge.runtime.errors import BundleError, CheckpointError


@pytest.fixture(params=["renameat2", "without it"])
def renames(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of publishing: that of Linux, and that of file systems which lack its flags."""

    def lacking(source: Path, target: Path, flags: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    if request.param == "without it":
        monkeypatch.setattr(publish, "_rename", lacking)


def put(out: Path, text: str, *, overwrite: bool = False) -> None:
    with staged(out, overwrite=overwrite) as folder:
        (folder / "bundle.json").write_text(text)


def entries(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_output_is_complete_or_absent(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with staged(tmp_path / "new" / "out") as folder:
            (folder / "half").write_text("")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        fail()
    assert entries(tmp_path) == ["new"]


def test_precision_is_checked_first(tiny_sd1: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="precision 'fp8' is unknown; choose one of fp32, fp16"):
        export_bundle(tiny_sd1, tmp_path / "out", precision="fp8")


@pytest.mark.usefixtures("renames")
def test_output_replaces_only_bundles(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(BundleError, match="exists; choose another place or pass --overwrite"):
        check_out(out, overwrite=False)
    with pytest.raises(BundleError, match="is not a bundle"):
        check_out(out, overwrite=True)
    (out / "bundle.json").write_text("{}")
    put(out, "new", overwrite=True)
    assert entries(tmp_path) == ["out", "out/bundle.json"]
    assert (out / "bundle.json").read_text() == "new"
    (tmp_path / "link").symlink_to("out")
    with pytest.raises(BundleError, match="is not a bundle"):
        put(tmp_path / "link", "new", overwrite=True)


@pytest.mark.usefixtures("renames")
@pytest.mark.parametrize("kind", ["file", "empty folder", "bundle", "link"])
def test_what_appears_during_an_export_is_left_alone(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It appears between the last check and the rename."""
    out, checked = tmp_path / "out", publish.check_out

    def then_appears(path: Path, overwrite: bool) -> None:
        checked(path, overwrite)
        if kind == "file":
            out.write_text("mine")
        elif kind == "link":
            out.symlink_to("nowhere")
        else:
            out.mkdir()
        if kind == "bundle":
            (out / "bundle.json").write_text("mine")

    monkeypatch.setattr(publish, "check_out", then_appears)
    monkeypatch.setattr(publish, "_exists", lambda path: False)
    with pytest.raises(BundleError, match="appeared during the export and is left alone"):
        put(out, "new")
    assert entries(tmp_path) == (["out", "out/bundle.json"] if kind == "bundle" else ["out"])
    if kind == "bundle":
        assert (out / "bundle.json").read_text() == "mine"


@pytest.mark.usefixtures("renames")
def test_what_takes_a_bundles_place_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the last check of --overwrite and the exchange."""
    out, checked = tmp_path / "out", publish.check_out
    put(out, "old")

    def then_changes(path: Path, overwrite: bool) -> None:
        checked(path, overwrite)
        (out / "bundle.json").rename(out / "mine")

    monkeypatch.setattr(publish, "check_out", then_changes)
    with pytest.raises(BundleError, match="was replaced by something that is not a bundle"):
        put(out, "new", overwrite=True)
    assert entries(tmp_path) == ["out", "out/mine"]
    assert (out / "mine").read_text() == "old"


def test_no_moment_without_a_bundle(tmp_path: Path) -> None:
    """A reader that never pauses always finds one, while it is replaced 200 times."""
    out, missing, done = tmp_path / "out", [], threading.Event()
    put(out, "0")

    def read() -> None:
        while not done.is_set():
            try:
                (out / "bundle.json").stat()
            except OSError as error:
                missing.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(200):
            put(out, str(number), overwrite=True)
    finally:
        done.set()
        reader.join()
    assert missing == []
    assert entries(tmp_path) == ["out", "out/bundle.json"]


@pytest.mark.usefixtures("renames")
def test_a_bundle_is_not_replaced_while_somebody_stores_in_it(tmp_path: Path) -> None:
    """A preset or verdict that is being stored goes into the old bundle, not into the new one."""
    out = tmp_path / "out"
    put(out, "old")
    with locked(out):
        publisher = threading.Thread(target=put, args=(out, "new"), kwargs={"overwrite": True})
        publisher.start()
        publisher.join(0.3)
        assert publisher.is_alive()
        assert (out / "bundle.json").read_text() == "old"
    publisher.join()
    assert (out / "bundle.json").read_text() == "new"


def test_a_failed_exchange_leaves_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "out", "old")

    def refused(source: Path, target: Path, flags: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(publish, "_rename", refused)
    with pytest.raises(BundleError, match="out cannot be written: Input/output error"):
        put(tmp_path / "out", "new", overwrite=True)
    assert entries(tmp_path) == ["out", "out/bundle.json"]
    assert (tmp_path / "out" / "bundle.json").read_text() == "old"


def refused(model: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line says on its one line."""
    with pytest.raises(SystemExit) as exit:
        main(["export", str(model), "-o", str(out)])
    assert exit.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    return line


@pytest.mark.parametrize(
    ("out", "text"),
    [
        ("/proc/out", "cannot be written: No such file or directory"),
        ("/dev/full/out", "cannot be written: Not a directory"),
        ("long" * 99, "cannot be written: File name too long"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    out: str, text: str, tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(tiny_sd1, tmp_path / out, capsys).endswith(text)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_traces")
def test_a_full_disk_leaves_nothing(tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In its place a limit that Linux sets on the size of files: 32 KiB, less than a text encoder's weights."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, limits[1]))
    try:
        line = refused(tiny_sd1, tmp_path / "out", capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert line.endswith("out cannot be written: File too large")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.long  # a process of its own with torch; tests of the command line's and of batches' signals stay
def test_a_kill_leaves_nothing(tiny_sd1: Path, tmp_path: Path) -> None:
    """Sent while a component is being traced, and the one before lies in the folder. Other signals are one way with this one:
    tests/runtime/cli/test_signals.py."""
    number = signal.SIGTERM
    code = "from stepforge.runtime.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, "export", tiny_sd1, "-o", tmp_path / "out"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # nohup and shells' background jobs ignore some
    )
    assert process.stderr is not None
    while "denoiser" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.5)
    assert [path.name[:5] for path in tmp_path.iterdir()] == [".out."]
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    assert process.returncode == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_of_two_exports_to_one_place_the_first_to_finish_stays(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tracing is left out."""

    def run(export: Any, name: str) -> None:
        (export.folder / "bundle.json").write_text("second")
        put(tmp_path / "out", "first")

    monkeypatch.setattr("stepforge.export.build._Export.run", run)
    with pytest.raises(BundleError, match="out exists; choose another place or pass --overwrite"):
        export_bundle(tiny_sd1, tmp_path / "out")
    assert entries(tmp_path) == ["out", "out/bundle.json"]
    assert (tmp_path / "out" / "bundle.json").read_text() == "first"
