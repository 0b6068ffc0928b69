"""Batches and deployments on Ray itself, in a cluster on this machine: same files as one process, whoever dies."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stepforge.runtime.serve.store import OWN

ray = pytest.importorskip("ray", reason="ray is not installed; `make test-interop` installs it")

BIN = Path(sys.executable).parent
SMALL = {"steps": 60, "width": 64, "height": 64}
JOBS = 40
RAY = ("--ray", "local", "--threads", "1", "--workers")


@pytest.fixture
def manifest(tmp_path):
    lines = [json.dumps({"prompt": f"cat {i}", **SMALL}) for i in range(JOBS)]
    lines[7], lines[11] = "{", json.dumps({"prompt": "two", "images": 2, **SMALL})
    lines[13] = json.dumps({"prompt": "x", "adapters": {"none": 1}})
    path = tmp_path / "jobs.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def command(home, manifest, tmp_path):
    """`stepforge batch` in a home of the test's own; Ray makes a token there and keeps to it."""
    environment = {**os.environ, "HOME": str(home), "RAY_TMPDIR": str(home)}

    def command(out, *arguments, env=(), wait=True):
        line = [BIN / "stepforge", "batch", "fake", manifest, "-o", tmp_path / out, "--json", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([*map(str, line)], env={**environment, **dict(env)}, **pipes)
        if not wait:
            return process
        out, errors = process.communicate(timeout=240)
        print(errors)
        return process.returncode, json.loads(out) if out else None, errors.splitlines()

    return command


@pytest.fixture
def workers(descendants):
    """Process ids of the workers below a driver."""
    return lambda pid: [child for child, line in descendants(pid).items() if line.startswith("ray::Worker")]


@pytest.fixture
def whole(command, tmp_path):
    """The files of one process."""
    assert command("whole")[0] == 1
    return files(tmp_path / "whole")


def files(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file() and OWN not in path.parts
    }


def drawn(folder):
    return len(list(folder.glob("*.png")))


def test_same_files_as_one_process(command, whole, tmp_path):
    """Two workers, bad jobs among the others; then nothing is left to do for one process."""
    code, report, errors = command("out", *RAY, "2")
    assert (code, report["done"], report["failed"], report["left"]) == (1, JOBS - 2, 2, 0)
    assert len([line for line in errors if ", line " in line]) == 2
    assert files(tmp_path / "out") == whole
    assert command("out")[1]["done"] == 0
    shards = ("--layout", "webdataset", "--shard-size", "9")
    command("one", *shards)
    command("two", *shards, *RAY, "2")
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_killed_workers_are_replaced(command, whole, workers, until, tmp_path):
    process = command("out", *RAY, "2", wait=False)
    for number in (2, 12):
        until(lambda number=number: drawn(tmp_path / "out") >= number and workers(process.pid))
        os.kill(workers(process.pid)[0], signal.SIGKILL)
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 1
    assert json.loads(out)["done"] == JOBS - 2
    assert errors.count("a worker died and is replaced") == 2
    assert files(tmp_path / "out") == whole


def test_a_killed_driver_goes_on(command, whole, descendants, until, tmp_path):
    """SIGKILL takes its cluster along; another number of workers, then one process, go on."""
    for number, others in ((3, "2"), (15, "1")):
        process = command("out", *RAY, others, wait=False)
        until(lambda number=number: drawn(tmp_path / "out") >= number)
        below = descendants(process.pid)
        process.kill()
        process.communicate()
        until(lambda below=below: not any(Path(f"/proc/{child}").exists() for child in below), 180)
    code, report, _ = command("out")
    assert (code, report["left"]) == (1, 0)
    assert (
        report["resumed"] >= 15 - 1
    )  # the driver publishes one at a time: a picture whose journal line is missing is drawn again
    assert files(tmp_path / "out") == whole


def test_signals_keep_what_is_finished(command, whole, until, tmp_path):
    process = command("out", *RAY, "2", wait=False)
    until(lambda: drawn(tmp_path / "out") >= 3)
    process.terminate()
    out, errors = process.communicate(timeout=120)
    print(errors)
    report = json.loads(out)
    assert (process.returncode, [line for line in errors.splitlines() if line.startswith("stepforge")][-1]) == (
        143,
        "stepforge: terminated",
    )
    assert report["left"] > 0
    assert report["done"] == len({name[:8] for name in files(tmp_path / "out") if name.endswith(".png")})
    assert command("out", *RAY, "1")[1]["left"] == 0
    assert files(tmp_path / "out") == whole


def test_a_cluster_with_a_token(command, whole, server, until, home, tmp_path):
    """One that runs already: with its token, without, and with another."""
    (home / "token").write_text("0123456789abcdef" * 4)
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(home / "token")}
    head = [
        BIN / "ray",
        "start",
        "--head",
        "--block",
        "--port",
        "6391",
        "--node-ip-address",
        "127.0.0.1",
        "--num-cpus",
        "4",
    ]
    head += ["--include-dashboard", "false", "--object-store-memory", "100000000", "--disable-usage-stats"]
    address = ("--ray", "127.0.0.1:6391", "--threads", "1", "--workers", "2")
    with server(head, tmp_path / "head.log", env={**os.environ, **env, "HOME": str(home), "RAY_TMPDIR": str(home)}):
        until(lambda: b"started" in (tmp_path / "head.log").read_bytes())
        (home / "other").write_text("fedcba9876543210" * 4)
        for wrong in ({"RAY_AUTH_MODE": "disabled"}, {**env, "RAY_AUTH_TOKEN_PATH": str(home / "other")}):
            code, _, errors = command("out", *address, env=wrong)
            assert code == 2
            assert errors[-1].startswith("stepforge: no Ray cluster at 127.0.0.1:6391: ")  # behind Ray's own words
        assert not (tmp_path / "out").exists()
        assert command("out", *address, env=env)[0] == 1
    assert files(tmp_path / "out") == whole
