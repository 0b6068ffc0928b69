"""A quick slice of every fuzz generator; `make test-soak` runs the rest. The protocol of generators is in soak.py."""

import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # the quick lane has three minutes

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", sorted(path.stem.removeprefix("gen_") for path in HERE.glob("gen_*.py")))
def test_no_case_gets_through(name):
    done = subprocess.run(
        [sys.executable, HERE / "soak.py", name, "--quick"], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


def test_guided_inputs_become_cases_that_are_accepted_too(tmp_path, monkeypatch):
    """Without atheris: a corpus that no door accepts would leave everything behind the doors untried."""
    monkeypatch.syspath_prepend(HERE)
    guided = importlib.import_module("guided")
    for door, (case_of, input_of) in guided.DOORS.items():
        (tmp_path / door).mkdir()
        module = guided.load(door)
        base = module.start(tmp_path / door)
        cases = [module.case(random.Random(index), base) for index in range(guided.SEEDS)]
        inputs = [data for data in map(input_of, cases) if data is not None and len(data) <= guided.LONGEST]
        inputs = inputs or [b"", b"\x03a cat"]  # texts: the field, then the prompt
        outcomes = {guided.judge(module, case_of(data), base)[0] for data in inputs}
        assert "accepted" in outcomes, door
        assert not outcomes & set(guided.BAD), door


PROBE = """
import os, time
from soak import rng_of
ERRORS = (KeyError,)
KINDS = "accepted refused crash hang traceback untidy misread escape noise".split()
QUICK = SOAK = len(KINDS)
SECONDS = 2.0

def start(folder):
    return folder

def case(rng, base):
    first = rng.random()
    return next(kind for index, kind in enumerate(KINDS) if rng_of("probe", 0, index).random() == first)

def check(kind, base):
    match kind:
        case "refused": raise KeyError("one line")
        case "crash": os.abort()
        case "hang": time.sleep(60)
        case "traceback": raise ValueError
        case "untidy": raise KeyError
        case "misread": assert not kind
        case "escape": (base.parent / "outside" / "secret").read_bytes()
        case "noise": os.write(2, b"[W:onnxruntime]")
"""


def test_the_soak_sees_every_kind_of_failure(tmp_path):
    """A generator whose cases do what they are named for is counted so."""
    (tmp_path / "soak.py").write_bytes((HERE / "soak.py").read_bytes())
    (tmp_path / "gen_probe.py").write_text(PROBE)
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1] / "benchmarks")}
    command = [sys.executable, tmp_path / "soak.py", "probe", "--json", tmp_path / "counts.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stderr
    total = json.loads((tmp_path / "counts.json").read_text())["total"]
    assert total == {kind: 9 if kind == "cases" else 1 for kind in total}, done.stdout
