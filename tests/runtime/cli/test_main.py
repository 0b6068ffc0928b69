"""The command line as a whole: exit codes, one-line errors, help."""

import errno
import re
import subprocess
import sys
from types import ModuleType

import pytest

from stepforge.runtime import load
from stepforge.runtime.cli import start
from stepforge.runtime.cli.main import main

ERRORS = {
    "unknown option": (["generate", "fake", "x", "--stps", "3"], 2, "No such option: --stps"),
    "unknown command": (["genrate"], 2, "No such command 'genrate'"),
    "no prompt": (["generate", "fake"], 2, "give either PROMPT arguments, --prompts FILE or --requests FILE"),
    "bad number": (["generate", "fake", "x", "--steps", "many"], 2, "should be a valid integer"),
    "bad sampler": (["generate", "fake", "x", "--sampler", "magic"], 2, "choose one of ddim"),
    "bad guidance": (["generate", "fake", "x", "--guidance", "much"], 2, "give a number such as 7.5"),
    "bad timesteps": (["generate", "fake", "x", "--timesteps", "a,b"], 2, "is not a list of numbers"),
    "no bundle": (["generate", "nowhere", "x"], 1, "is not a bundle"),
    "bad backend": (["generate", "nowhere", "x", "--backend", "magic"], 1, "backend 'magic' is unknown"),
    "several images in one file": (["generate", "fake", "x", "y", "-o", "z.png"], 2, "give a folder"),
    "columns without a sheet": (["generate", "fake", "x", "--columns", "3"], 2, "--columns needs --sheet"),
    "an adapter twice": (
        ["generate", "fake", "x", "--adapter", "a.safetensors", "--adapter", "b/a.safetensors"],
        2,
        "a is given twice",
    ),
    "a preset and its parts": (["plan", "fake", "--plan", "p", "-g", "3"], 2, "leave --guidance out"),
    "long input": (["generate", "fake", "x", "--control", "z" * 100_000], 2, "give NAME=IMAGE"),
    "control characters": (["generate", "fake", "x", "--timesteps", "\x1b[2J\n"], 2, r"--timesteps \x1b[2J is not"),
    "no model": (["export", "nowhere", "-o", "b"], 1, "does not exist"),
    "no such integers": (["export", "m", "-o", "b", "--quantize", "int4"], 2, "--quantize is int4; allowed is int8"),
    "integers of halves": (
        ["export", "m", "-o", "b", "--quantize", "int8", "--precision", "fp16"],
        2,
        "makes integers of fp32 weights",
    ),
    "a rank without slots": (["export", "m", "-o", "b", "--lora-rank", "8"], 2, "--lora-rank needs --lora-slots"),
    "bad reuse": (["plan", "fake", "--reuse", "deepcache"], 2, "give deepcache(INTERVAL)"),
    "reuse without a variant": (["generate", "fake", "x", "--reuse", "tgate(0.5)"], 2, "export it with --reuse tgate"),
    "bad control": (["generate", "fake", "x", "--control", "a"], 2, "give NAME=IMAGE or NAME=IMAGE:SCALE"),
    "bad window": (["generate", "fake", "x", "--control-window", "half"], 2, "give two fractions of the steps"),
    "no ControlNets": (["generate", "fake", "x", "--control", "a=b.png"], 2, "exported without any"),
    "bad size": (["generate", "fake", "x", "--width", "65"], 2, "needs a multiple of 8"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(case, refuse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, code, message = ERRORS[case]
    assert message in refuse(code, *arguments)


ACCIDENTS = {
    "full disk": (
        OSError(errno.ENOSPC, "No space left on device", "a/b"),
        1,
        "stepforge: a/b: No space left on device\n",
    ),
    "no rights": (PermissionError(errno.EACCES, "Permission denied"), 1, "stepforge: Permission denied\n"),
    "memory": (MemoryError(), 1, "stepforge: out of memory; ask for smaller or fewer images"),
    "interrupted": (KeyboardInterrupt(), 130, "stepforge: interrupted\n"),
    "a missing package": (ModuleNotFoundError("no", name="diffusers"), 1, "needs the package diffusers; pip install"),
}


@pytest.mark.parametrize("case", ACCIDENTS)
def test_accidents_show_no_traceback(case, refuse, tmp_path, monkeypatch):
    error, code, message = ACCIDENTS[case]

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(load, "load", fail)
    assert message in refuse(code, "generate", "fake", "x", "-o", tmp_path / "a.png")


def test_a_defect_of_ours_is_not_hidden(monkeypatch, tmp_path):
    monkeypatch.setattr(load, "load", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["generate", "fake", "x", "-o", str(tmp_path / "a.png")])


RUNTIME = ("generate", "upscale", "batch", "serve", "bench", "plan", "info", "doctor", "tune", "triton")
OFFLINE = (
    "lora",
    "export",
    "verify",
    "build",
    "quantize",
)  # those that join; lora is a group, and comes last of the others


def test_help_fits_80_columns_and_cuts_nothing(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("--help") == 0
    text = capsys.readouterr().out
    listed = re.findall(r"^  ([a-z]+)  +\S", text[text.index("Commands:") :], re.MULTILINE)
    assert listed[: len(RUNTIME)] == list(RUNTIME)
    assert set(listed[len(RUNTIME) :]) == set(OFFLINE)
    for command in (*RUNTIME, "lora"):
        assert run(command, "--help") == 0
        text += capsys.readouterr().out
    assert "..." not in re.sub(r"\S*,\.\.\.|\.\.\. \[default|[\]}]\.\.\.", "", text)
    assert all(len(line) <= 80 for line in text.splitlines())


def test_the_installed_command_runs():
    output = subprocess.check_output([sys.executable, "-m", "stepforge.runtime", "--version"], text=True)
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", output)


def test_ctrl_c_while_the_commands_are_imported(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "stepforge.runtime.cli.main", _Interrupting("main"))
    with pytest.raises(SystemExit) as caught:
        start()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "stepforge: interrupted\n"


class _Interrupting(ModuleType):
    def __getattr__(self, name):
        raise KeyboardInterrupt
