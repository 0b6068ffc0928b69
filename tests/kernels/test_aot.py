"""Ahead-of-time compilation for six architectures: the gate and the golden figures, on a sample; all by a command.

All programs take minutes: `make aot`, which CI runs too.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from stepforge.kernels.aot import main as aot
from stepforge.kernels.aot import programs as shipped
from stepforge.kernels.dispatch import tiles

GOLDEN = json.loads(aot.GOLDEN.read_text("utf-8"))
PROGRAMS = {program.name: program for program in shipped.programs()}
COMPILER = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], env=COMPILER, capture_output=True, text=True)


def test_golden_file_names_what_is_shipped():
    assert set(GOLDEN["programs"]) == set(PROGRAMS)
    assert {program.arch for program in PROGRAMS.values()} == set(tiles.ARCHES)


def test_what_changes_from_call_to_call_is_data():
    """Strengths, adapters, ranks, row counts and tiles per program neither recompile nor repack anything."""
    for program in PROGRAMS.values():
        types = program.signature()
        for name in ("scale", "ranks", "table", "nt", "M", "blocks", "step", "eps"):
            assert types.get(name, "data") != "constexpr", program.name


def test_golden_figures_pass_the_gate():
    """What the figures alone can show: registers, shared memory, matrix instructions, asynchronous loads."""
    clean = {"stack": 0, "spills": 0, "atomics": [], "tma": [], "hidden": [False, False], "undeclared": 0}
    clean |= {"scratch": [0, 0], "threads": True, "bare": ""}
    for name, figures in GOLDEN["programs"].items():
        assert not aot.faults(PROGRAMS[name], figures | clean), name


@pytest.mark.slow
def test_sample():
    found = run("-m", "stepforge.kernels.aot", "--check", "--sample", "2", "--jobs", "1")
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    assert "2 programs pass" in found.stdout


FAULTS = {
    "stack": (8, "spills"),
    "registers": (600, "do not fit"),
    "shared": (200_000, "shared memory"),
    "mma": ({"HMMA.1688.F32.TF32": 168}, "tf32"),
    "async16": (0, "asynchronous"),
    "atomics": (["RED.E.ADD.F32"], "atomics"),
    "hidden": ([True, False], "parameters"),
}


@pytest.mark.parametrize("figure", FAULTS)
def test_gate_can_fail(figure):
    name = "onepass r16 m64 fp16 sm_89"
    good = {**GOLDEN["programs"][name], "stack": 0, "spills": 0, "atomics": [], "tma": [], "hidden": [False, False]}
    good |= {"undeclared": 0, "scratch": [0, 0], "threads": True, "bare": ""}
    assert not aot.faults(PROGRAMS[name], good)
    value, message = FAULTS[figure]
    assert any(message in fault for fault in aot.faults(PROGRAMS[name], {**good, figure: value}))


def test_a_change_is_explained():
    name = "onepass r16 m64 fp16 sm_89"
    got = {name: {**GOLDEN["programs"][name], "registers": 3}}
    assert aot.changes(got, GOLDEN) == [f"{name}: registers was {GOLDEN['programs'][name]['registers']}, is 3"]
    assert aot.changes({"new": got[name]}, GOLDEN) == ["new: not in golden.json"]


def test_addresses_beyond_2_to_31_elements():
    """No machine here could hold such tensors: the proof is in the code. Every row stride meets its row in 64 bits."""
    names = [f"{body} r16 m64 fp16 sm_80" for body in ("onepass", "expand", "expand_geglu")] + ["geglu fp16 sm_80"]
    code = (
        "from stepforge.kernels.aot import main as aot, programs as shipped\n"
        "for program in shipped.programs():\n"
        f"    if program.name in {names}:\n"
        "        print(aot.build(program).asm['ttir'])\n"
    )
    found = run("-c", code)
    assert found.returncode == 0, found.stderr[-2000:]
    modules = found.stdout.split("tt.func public @")[1:]
    assert len(modules) == len(names)
    for module in modules:
        wide = set(re.findall(r"(%\w+) = arith\.extsi (%\w+) : i32 to i64", module))
        strides = set(re.findall(r"(%stride\w*): i32", module))
        assert strides
        for stride in strides:
            grown = {new for new, old in wide if old == stride}
            assert grown, f"{stride} is never widened"
            products = re.findall(r"arith\.muli (%\w+), (%\w+) : i64", module)
            assert any(set(pair) & grown for pair in products), f"{stride} is not multiplied in 64 bits"
            # what is left in 32 bits is the row inside a block, below 128 · stride
            for pair in re.findall(r"arith\.muli (%\w+), (%\w+) : i32", module):
                assert stride not in pair
        assert "tt.atomic" not in module
