"""Standard output and error may be closed or full: the work is done all the same."""

import io
import logging
import unicodedata
import warnings

import numpy as np
import pytest
from safetensors.numpy import save_file

from stepforge.runtime import load
from stepforge.runtime.cli.output import Stream, print_table

MANY = [f"prompt-{number}" for number in range(40)]
SMALL = ("-n", 1, "--width", 64, "--height", 64)


def test_a_reader_that_has_enough_costs_no_image(start, tmp_path):
    process = start("generate", "fake", *MANY, "-o", tmp_path / "out", *SMALL)
    process.stdout.readline()
    process.stdout.close()  # as `head -1` does
    assert process.stderr.read() == ""
    assert process.wait(60) == 0
    assert len(list((tmp_path / "out").iterdir())) == len(MANY)


def test_a_full_device_as_output_costs_no_image(start, tmp_path):
    with open("/dev/full", "w") as full:
        process = start("generate", "fake", "x", "y", "-o", tmp_path / "out", *SMALL, stdout=full)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 1
        assert error == "stepforge: cannot write to standard output: No space left on device\n"
        assert len(list((tmp_path / "out").iterdir())) == 2
        process = start("generate", "fake", "x", "-o", tmp_path / "out", *SMALL, stderr=full)
        assert process.wait(60) == 2
        process = start("--help", stdout=full)
        assert process.communicate(timeout=60)[1].count("\n") == 1
        assert process.returncode == 1


def test_letters_without_a_code_are_escaped():
    buffer = io.BytesIO()
    stream = Stream(io.TextIOWrapper(buffer, "ascii"))
    print("caf\u00e9 \udce9", file=stream)
    stream.flush()
    assert buffer.getvalue() == rb"caf\xe9 \udce9" + b"\n"


def test_table_cells_cannot_command_the_terminal(capsys):
    print_table([{"name": "\x1b[2J" + "x" * 1000, "value": 0.5, "numbers": [1.0, -2.5]}])
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "0.5  +1 -2.5" in text
    assert max(len(line) for line in text.splitlines()) <= 200


HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\x08\x7f\u202egnp.exe\u2028\u2066\x00\x0b\n"


def tame(text):
    """No control characters but line feeds, no marks of direction, no other line separators."""
    return not [c for c in text if (c != "\n" and unicodedata.category(c) in ("Cc", "Zl", "Zp")) or c in "\u202e\u2066"]


def test_streams_escape_what_commands_a_terminal():
    buffer = io.BytesIO()
    stream = Stream(io.TextIOWrapper(buffer, "utf-8"))
    print(f"caf\xe9 \t{HOSTILE}end", file=stream, flush=True)
    text = buffer.getvalue().decode()
    assert tame(text.replace("\t", ""))
    assert text.startswith(
        "caf\xe9 \t\\x1b[2J\\x1b]0;owned\\x07\\x9b31m\\r\\x08\\x7f\\u202egnp.exe\\u2028\\u2066\\x00\\x0b\nend"
    )


NAMES = HOSTILE.replace("\0", "").replace("\n", "")


def test_names_in_files_do_not_reach_the_terminal(run, capsys, tmp_path):
    key = f"lora_unet_{HOSTILE}"
    pair = {
        f"{key}.lora_down.weight": np.ones((2, 4), np.float32),
        f"{key}.lora_up.weight": np.ones((4, 2), np.float32),
    }
    lora = tmp_path / f"{NAMES}.safetensors"
    save_file({**pair, HOSTILE: np.ones(3, np.float32)}, lora)
    broken = tmp_path / f"x{NAMES}.safetensors"
    save_file(
        {key + ".lora_down.weight": np.full((2, 4), np.nan, np.float32), f"{key}.lora_up.weight": np.ones((4, 2))},
        broken,
    )
    prompts = tmp_path / f"{NAMES}.txt"
    prompts.write_text(f"a cat\n{NAMES}", encoding="utf-8")
    lines = tmp_path / "lines.jsonl"
    lines.write_text(
        f'{{"prompt": "x", "{NAMES.encode("unicode_escape").decode().replace(chr(92) + "x", chr(92) + "u00")}": 1}}'
    )
    small = ("-n", 1, "--width", 64, "--height", 64)
    commands = {
        ("lora", "inspect", lora): 0, ("lora", "inspect", lora, "--json"): 0, ("lora", "inspect", broken): 1,
        ("lora", "inspect", tmp_path / NAMES): 1, ("info", tmp_path / NAMES): 1, ("doctor", tmp_path / NAMES): 1,
        ("generate", "fake", "--prompts", prompts, "-o", tmp_path / NAMES, *small): 0,
        ("generate", "fake", "--requests", lines, "-o", tmp_path / "out"): 2,
        ("generate", "fake", "x", "--adapter", f"{NAMES}={lora}", "-o", tmp_path / "out"): 1,
        ("generate", "fake", "x", "--plan", NAMES, "-o", tmp_path / "out"): 2, ("plan", "fake", "-g", NAMES): 2,
        ("tune", "fake", "--prompts", prompts, "--name", NAMES): 2, (NAMES,): 2, ("plan", f"--{NAMES}"): 2,
    }  # fmt: skip
    for command, code in commands.items():
        assert run(*command) == code, command
        captured = capsys.readouterr()
        assert tame(captured.out + captured.err), command
        assert captured.err.count("\n") == (code > 0 and command[0] != "doctor"), command


@pytest.mark.parametrize("code", [0, 2])
def test_logs_and_warnings(code, run, capsys, monkeypatch, tmp_path):
    """Ours are one line, others' nothing."""

    def noisy(*_, **__):
        logging.getLogger("stepforge.x").warning("%s is odd", HOSTILE)
        logging.getLogger("stepforge.x").info("hidden")
        logging.getLogger("torch.onnx").warning("noise")
        warnings.warn("noise", stacklevel=1)
        np.float32(3e38) * np.float32(10)
        return real(*_, **__)

    real = load.load
    monkeypatch.setattr(load, "load", noisy)
    width = 64 if code == 0 else 65
    assert run("generate", "fake", "x", "-o", tmp_path / "a.png", "-n", 1, "--width", width) == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(r"stepforge: warning: \x1b[2J\x1b]0;owned\x07")
    assert len(lines) == 1 + (code > 0)
    assert all(map(tame, lines))
