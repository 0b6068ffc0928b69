"""The compile cache is not trusted: what is damaged is made anew, and without a usable folder there is no cache."""

import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino
import pytest

from stepforge.runtime.backends import open_backend
from stepforge.runtime.backends.compile_cache import CompileCache, root
from stepforge.runtime.bundle import VAE_DECODER, Bundle, read

LATENTS = {"latents": np.random.RandomState(0).standard_normal((1, 4, 8, 8)).astype(np.float32)}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEPFORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def draw(tiny_sd1_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[np.ndarray, bool]]:
    """Open the decoder and run it: its pixels, and whether OpenVINO took it from the cache."""
    bundle: Bundle = read(tiny_sd1_bundle)
    compiled = []
    compile_model = openvino.Core.compile_model

    def noted(self, *args, **options):
        compiled.append(compile_model(self, *args, **options))
        return compiled[-1]

    monkeypatch.setattr(openvino.Core, "compile_model", noted)

    def run() -> tuple[np.ndarray, bool]:
        graph = open_backend("openvino", bundle, precision="fp32", threads=1).open(VAE_DECODER)
        return np.array(graph(LATENTS)["pixels"]), compiled[-1].get_property("LOADED_FROM_CACHE")

    return run


def test_a_flipped_bit_is_noticed_and_the_network_compiled_anew(cache, draw, caplog):
    expected, loaded = draw()
    assert not loaded
    pixels, loaded = draw()
    assert loaded
    assert np.array_equal(pixels, expected)
    chance = random.Random(0)
    for _ in range(6):
        (blob,) = cache.glob("*/*.blob")
        data = bytearray(blob.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        blob.write_bytes(data)
        caplog.clear()
        pixels, loaded = draw()
        assert not loaded
        assert np.array_equal(pixels, expected)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "is damaged; compiling anew" in caplog.text
        assert draw()[1]
    (blob,) = cache.glob("*/*.blob")
    blob.write_bytes(blob.read_bytes()[:1000])  # cut short
    assert not draw()[1]
    assert [file.suffix for file in cache.glob("*/*")] == [".blob"]  # no folder of a compilation is left


@pytest.mark.long  # five processes; the files of one process are looked at above
def test_processes_share_the_cache(cache, tiny_sd1_bundle):
    """Four processes that all start with an empty cache, two of which are killed."""
    code = (
        "import sys; from stepforge.runtime.backends import open_backend; from stepforge.runtime.bundle import *\n"
        "backend = open_backend('openvino', read(sys.argv[1]), precision='fp32', threads=1)\n"
        "print('ready', flush=True)\n"
        "backend.open(VAE_DECODER)"
    )
    command = [sys.executable, "-c", code, str(tiny_sd1_bundle)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    for child, seconds in zip(started[:2], (0.01, 0.05), strict=True):
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(seconds)
        child.kill()
    for child in started[2:]:
        assert child.communicate()[1] == b""
        assert child.returncode == 0
    for child in started[:2]:
        child.communicate()
    whole = subprocess.run(command, capture_output=True, text=True, check=True)
    assert whole.stderr == ""  # no warning: every file of the cache is whole


def unwritable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.delenv("STEPFORGE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if kind == "a file in the way":
        monkeypatch.setenv("STEPFORGE_CACHE", str(file / "cache"))
    elif kind == "not to be made":
        monkeypatch.setenv("STEPFORGE_CACHE", "/proc/stepforge")
    elif kind == "home that is a file":
        monkeypatch.setenv("HOME", str(file))
    else:
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home")))


@pytest.mark.parametrize("kind", ["a file in the way", "not to be made", "home that is a file", "no home"])
def test_without_a_folder_there_is_a_warning_and_no_cache(draw, tmp_path, monkeypatch, caplog, kind):
    unwritable(tmp_path, monkeypatch, kind)
    draw()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("no compile cache: ")
    assert "set STEPFORGE_CACHE to a folder, or to nothing" in caplog.text


def test_a_cache_that_cannot_be_written_any_more(cache, draw, monkeypatch, caplog):
    """A full disk, or a folder that was removed, after the engine was opened: the network is opened all the same."""
    kept = CompileCache("library")
    cache.joinpath("library").rmdir()
    with kept.folder("key") as folder:
        assert folder is None
    assert "cannot be written (No such file or directory)" in caplog.text
    caplog.clear()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
    draw()
    assert "cannot be written (No space left on device)" in caplog.text
    monkeypatch.undo()


def test_the_variable_names_the_folder_or_turns_the_cache_off(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("STEPFORGE_CACHE", str(tmp_path / "named"))
    assert root() == tmp_path / "named"
    monkeypatch.setenv("STEPFORGE_CACHE", "")
    assert root() is None
    with CompileCache("library").folder("key") as folder:
        assert folder is None
    monkeypatch.delenv("STEPFORGE_CACHE")
    assert root() == tmp_path / "xdg/stepforge"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, by the specification
    assert root() == Path.home() / ".cache/stepforge"
    assert not caplog.records


def test_the_cache_is_bounded_by_bytes_and_what_was_used_last_stays(cache):
    kept = CompileCache("library", most_bytes=2500)

    def use(key: str) -> bool:
        with kept.folder(key) as folder:
            assert folder is not None
            found = list(folder.iterdir())
            if not found:
                (folder / "name.blob").write_bytes(key.encode() * 1000)
        for file in cache.glob("*/*.blob"):  # times far enough apart for any file system
            os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 10))
        return bool(found)

    assert [use(key) for key in ("a", "b", "a", "c")] == [False, False, True, False]
    assert [use(key) for key in ("a", "c", "b")] == [True, True, False]  # b went when c came
    old = cache / "library/private-x"
    old.mkdir()
    os.utime(old, (0, 0))
    use("d")
    assert not old.exists()
    assert sum(file.stat().st_size for file in cache.glob("*/*.blob")) <= 2500


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "stepforge")
