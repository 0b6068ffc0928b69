"""Nothing is computed for a file that cannot be written."""

import errno
import os

import pytest

from stepforge.runtime import load
from stepforge.runtime.cli.targets import claimed

LONG = "n" * 252 + ".png"  # 256 bytes; file systems take 255
TARGETS = {  # arguments, message; in a folder with a file `file`, a folder `folder.png` and links to a device and to nothing
    "a file as folder": (["-o", "file"], "file is not a folder; a file has its name"),
    "a file as part of a folder": (["-o", "file/sub"], "file/sub is not a folder"),
    "a file's folder is a file": (["-o", "file/a.png"], "is not a folder"),
    "a folder in /proc": (["-o", "/proc/sub"], "cannot make the folder /proc/sub"),
    "a file in /proc": (["-o", "/proc/a.png"], "cannot write into /proc"),
    "a device as folder": (["-o", "/dev/full"], "/dev/full is not a folder"),
    "a device as file": (["-o", "device.png", "--overwrite"], "device.png is not a plain file"),
    "a link to nothing": (["-o", "dangling.png"], "dangling.png is not a plain file"),
    "a folder as file": (["-o", "folder.png", "--overwrite"], "folder.png is a folder; name a file with --out"),
    "a name too long": (["-o", LONG], "File name too long"),
    "a folder's name too long": (["-o", LONG[:-4] * 2], "File name too long"),
    "another format": (["-o", "a.jpg"], "a.jpg does not end in .png; only PNG is written"),
    "a sheet in /proc": (["-o", "new", "--sheet", "/proc/s.png"], "cannot write into /proc"),
    "a folder as sheet": (["-o", "new", "--sheet", "folder.png"], "name a file with --sheet"),
    "a sheet of another format": (["-o", "new", "--sheet", "s.jpg"], "--sheet s.jpg does not end in .png"),
    "an existing sheet": (
        ["-o", "new", "--sheet", "old.png"],
        "old.png exists; choose another --sheet or give --overwr",
    ),
    "one file twice": (["-o", "a.png", "--sheet", "./a.png"], "--sheet and --out name the same file"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "old.png").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "device.png").symlink_to("/dev/full")
    (tmp_path / "dangling.png").symlink_to("nothing")
    monkeypatch.setattr(load, "load", lambda *_, **__: pytest.fail("the bundle was loaded"))
    before = sorted(tmp_path.iterdir())
    yield tmp_path
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "file").read_text() == (tmp_path / "old.png").read_text() == "mine"


@pytest.mark.parametrize("case", TARGETS)
def test_targets_are_refused_before_work(case, refuse, folder):
    arguments, message = TARGETS[case]
    assert message in refuse(2, "generate", "fake", "x", *arguments)


def test_a_full_disk_is_noticed_before_work(refuse, folder, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "cannot write into new/sub: No space left on device" in refuse(2, "generate", "fake", "x", "-o", "new/sub")


def test_a_folder_of_another_owner_is_noticed_before_work(refuse, foreign, monkeypatch):
    monkeypatch.setattr(load, "load", lambda *_, **__: pytest.fail("the bundle was loaded"))
    for out in (foreign / "a.png", foreign / "sub"):
        assert "Permission denied" in refuse(2, "generate", "fake", "x", "-o", out)


def test_plots_are_checked_too(refuse, folder, monkeypatch):
    (folder / "file").write_text("mine")
    for plot, message in {"/proc/a.png": "cannot write into /proc", "folder.png": "name a file with --plot"}.items():
        assert message in refuse(2, "tune", "nowhere", "--prompts", "file", "--plot", plot)


def test_folders_that_stay_empty_go(tmp_path):
    targets = {"--out": [tmp_path / "a/b/1.png"], "--sheet": [tmp_path / "c/s.png"]}
    with claimed(targets, overwrite=False):
        assert (tmp_path / "a/b").is_dir()
        assert (tmp_path / "c").is_dir()
        (tmp_path / "a/b/1.png").touch()
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["a", "a/b", "a/b/1.png"]
