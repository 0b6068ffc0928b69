"""A bundle survives its users: presets and verdicts are written whole or not at all, and nobody loses another's."""

import errno
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from stepforge.runtime.bundle import MANIFEST, Bundle, Preset, read, update, write_manifest
from stepforge.runtime.errors import BundleError


@pytest.fixture
def bundle(hand_written_bundle: Path) -> Bundle:
    return read(hand_written_bundle)


def add(bundle: Bundle, name: str, size: int = 0) -> Bundle:
    preset = Preset(reuse="", found={"x": "x" * size})
    return update(bundle, lambda now: replace(now, presets={**now.presets, name: preset}))


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_what_others_store_meanwhile_stays(bundle):
    """A verification reads the bundle, takes minutes, and stores its verdict; presets are stored meanwhile."""
    add(bundle, "first")
    add(bundle, "second")
    stored = update(bundle, lambda now: replace(now, verdict={"passed": True, "summary": ""}))
    assert set(stored.presets) == {"first", "second"}
    assert read(bundle.path) == stored


def test_processes_and_threads_lose_no_entry(bundle):
    code = (
        "import sys; sys.path.insert(0, sys.argv[3]); from test_store import add; from stepforge.runtime.bundle import read\n"
        "bundle = read(sys.argv[1])\n"
        "for i in range(20): add(bundle, f'{sys.argv[2]}-{i}')"
    )
    command = [sys.executable, "-c", code, str(bundle.path)]
    children = [subprocess.Popen([*command, who, str(Path(__file__).parent)]) for who in "ab"]
    threads = [threading.Thread(target=lambda w=who: [add(bundle, f"{w}-{i}") for i in range(20)]) for who in "cd"]
    for thread in threads:
        thread.start()
    while any(child.poll() is None for child in children):
        read(bundle.path)  # readers are served, and see whole manifests
    for thread in threads:
        thread.join()
    assert [child.returncode for child in children] == [0, 0]
    assert set(read(bundle.path).presets) == {f"{who}-{i}" for who in "abcd" for i in range(20)}


def test_a_kill_at_any_moment_leaves_a_bundle_that_loads(bundle):
    """30 processes that write without end are killed 0 to 12 ms after their start or, every other one, after their first
    write; each finds the bundle as the last one left it."""
    code = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[2])
from test_store import add
from stepforge.runtime.bundle import read
for i in range(30):
    bundle = read(sys.argv[1])
    written, told = os.pipe()
    child = os.fork()
    if not child:
        try:
            for k in range(10000):
                add(bundle, f'p{k % 5}', 200_000)
                os.write(told, b'.')
        finally:
            os._exit(1)
    if i % 2:
        os.read(written, 1)
    time.sleep(random.Random(i).uniform(0, 0.012))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    read(sys.argv[1])
"""
    before = names(bundle.path)
    subprocess.run([sys.executable, "-c", code, str(bundle.path), str(Path(__file__).parent)], check=True)
    add(bundle, "last")
    assert set(read(bundle.path).presets) > {"last"}
    assert names(bundle.path) == before  # what the killed ones left is gone


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file grows beyond the limit: writing gets its error from the kernel, in the middle of the manifest."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [0, 100, 20_000])
def test_a_full_disk_changes_nothing(bundle, limit):
    before, text = names(bundle.path), (bundle.path / MANIFEST).read_bytes()
    with full_disk(limit), pytest.raises(BundleError, match=r"bundle.json cannot be written: File too large"):
        add(bundle, "big", 30_000)
    assert names(bundle.path) == before
    assert (bundle.path / MANIFEST).read_bytes() == text
    assert set(add(bundle, "small").presets) == {"small"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_at_the_end_of_writing_changes_nothing(bundle, monkeypatch, call):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before, text = names(bundle.path), (bundle.path / MANIFEST).read_bytes()
    monkeypatch.setattr(os if call == "fsync" else Path, call, fail)
    with pytest.raises(BundleError, match="cannot be written: No space left on device"):
        add(bundle, "one")
    monkeypatch.undo()
    assert names(bundle.path) == before
    assert (bundle.path / MANIFEST).read_bytes() == text


def test_nothing_is_stored_in_another_bundle(bundle, tmp_path):
    """An export put another model in the bundle's place after it was read."""
    write_manifest(replace(bundle, source={"kind": "another"}))
    with pytest.raises(BundleError, match="has changed since it was read; nothing is stored"):
        add(bundle, "late")
    bundle.path.rename(tmp_path / "gone")
    with pytest.raises(BundleError, match="cannot be opened: No such file"):
        add(bundle, "later")
