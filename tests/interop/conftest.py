"""What tests against other people's servers share. `make test-interop` has the environments; elsewhere these tests skip."""

import os
import shutil
import signal
import subprocess
import tempfile
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
