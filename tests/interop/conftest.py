"""What tests against other people's servers share. `make test-interop` has the environments; elsewhere these tests skip."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@pytest.fixture
def home() -> Iterator[Path]:
    """A home folder of the test's own, with a short path: names of sockets have 107 letters at most."""
    folder = Path(tempfile.mkdtemp(prefix="sf-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def server() -> Callable:
    """A process that ends with the block, its own group with it."""

    @contextmanager
    def server(command, log: Path, **options):
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*map(str, command)], stdout=file, stderr=file, start_new_session=True, **options
            )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    return server


@pytest.fixture
def until() -> Callable:
    """Wait for something, for so many seconds at most."""

    def until(ready, seconds=120):
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    return until


@pytest.fixture
def descendants() -> Callable:
    """Processes below one, with their command lines."""

    def descendants(pid):
        found, todo, children = {}, [pid], {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                children.setdefault(int(parent), []).append(int(entry.name))
            except OSError:
                continue
        while todo:
            for child in children.get(todo.pop(), ()):
                todo.append(child)
                try:
                    found[child] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    continue
        return found

    return descendants
