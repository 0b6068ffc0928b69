"""Names in messages, Git LFS pointers, atomic writing."""

import errno
import os

import pytest

from stepforge.runtime.files import is_lfs_pointer, printable, written

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"

TEXTS = {
    "plain": ("out/cat.png", "out/cat.png"),
    "lines": ("a\n b\t", "a b"),
    "a terminal's own commands": ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
    "a byte that is no text": ("caf\udce9", r"caf\udce9"),
    "right to left override": ("\u202egnp.exe", r"\u202egnp.exe"),
}


@pytest.mark.parametrize(("text", "shown"), TEXTS.values(), ids=TEXTS)
def test_printable(text, shown):
    assert printable(text) == shown


def test_long_texts_lose_their_middle():
    shown = printable("folder/" * 100 + "cat.png")
    assert len(shown) == 200
    assert shown.startswith("folder/")
    assert shown.endswith("folder/cat.png")


def test_git_lfs_pointers(tmp_path):
    (tmp_path / "pointer").write_bytes(POINTER)
    (tmp_path / "short").write_bytes(b"version")
    assert is_lfs_pointer(tmp_path / "pointer")
    assert is_lfs_pointer(POINTER)
    for other in (tmp_path / "short", tmp_path / "missing", tmp_path, "\0", b""):
        assert not is_lfs_pointer(other)


@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), SystemExit(143)], ids=repr)
def test_whatever_leaves_the_block_leaves_no_file(tmp_path, stop):
    def half_way():
        with written(tmp_path / "a") as file:
            file.write(b"half")
            raise stop

    with pytest.raises(type(stop)):
        half_way()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_a_name_that_is_taken_meanwhile_is_kept(tmp_path, monkeypatch, links):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    def write():
        with written(tmp_path / "a") as file:
            file.write(b"ours")
            (tmp_path / "a").write_bytes(b"theirs")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(FileExistsError):
        write()
    assert (tmp_path / "a").read_bytes() == b"theirs"
    assert len(list(tmp_path.iterdir())) == 1
