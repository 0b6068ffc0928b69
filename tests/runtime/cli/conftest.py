"""The command line in this process, and as a process of its own."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from stepforge.runtime.cli.main import main


@pytest.fixture
def run():
    """Run a command; returns its exit code."""

    def run(*arguments) -> int:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        return caught.value.code

    return run


@pytest.fixture
def refuse(run, capsys):
    """Run a command that must end with this exit code and one line on standard error; returns the line."""

    def refuse(code, *arguments) -> str:
        capsys.readouterr()
        assert run(*arguments) == code
        error = capsys.readouterr().err
        assert error.startswith("stepforge: ")
        assert error.count("\n") == 1
        assert len(error) < 1100
        return error

    return refuse


@pytest.fixture
def start():
    """Start a command as a process of its own, with signals as a terminal's shell leaves them."""
    processes = []

    def start(*arguments, **options) -> subprocess.Popen:
        command = [sys.executable, "-m", "stepforge.runtime", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, **{**pipes, "preexec_fn": _default_signals, **options}))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def _default_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def foreign():
    """A folder of another owner, mode 755, and the rights of a user who may not write there. Root lends its own for that;
    others lose theirs by mode."""
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        for name in ("secret.txt", "secret.safetensors"):
            (folder / name).write_text("a cat")
            (folder / name).chmod(0)
        folder.chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        yield folder
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
