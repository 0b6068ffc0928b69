"""The command line in this process: options of strange values, files with hostile names, any order of words.

A command ends with 0, or with 1 or 2 and one line on standard error; nothing that it prints holds control characters.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
from pathlib import Path

from mutate import NAMES

from stepforge.runtime.cli.main import main

QUICK, SOAK = 100, 1000
SECONDS = 30.0


class Refused(Exception):
    """A command that ended with 1 or 2; its text is what stood on standard error."""


ERRORS = (Refused,)
COMMANDS = {
    "plan": ["fake"], "generate": ["fake", "a cat"], "info": ["fake"], "lora inspect": ["{lora}"], "tune": ["fake"],
    "batch": ["fake", "{requests}"], "": [], "nothing": [], "lora": [], "info  ": ["{missing}"],
}  # fmt: skip
OPTIONS = {
    "--steps": ["1", "3", "0", "1001", "1e3"], "--sampler": ["ddim", "euler", "dpmpp_2m"], "--schedule": ["karras", "beta"],
    "--spacing": ["trailing"], "--timesteps": ["999,500,1", "1,2", ","], "--sigmas": ["14,7,0", "nan", "-1,0"],
    "--eta": ["0.5"],
    "--guidance": ["7.5", "linear(1..12)", "1,2,3", "interval(7, steps=0..1)"], "--guider": ["apg", "rescale(0.7)"],
    "--reuse": ["tgate(0.5)", "deepcache(3)"], "--plan": ["fast"], "--control": ["a=b.png", "a"], "--preprocessor": ["canny"],
    "--control-window": ["0..1", "1..0", "..", "a..b"], "--seed": ["1", "-1", str(2**64)], "--images": ["1", "0", "65"],
    "--width": ["64", "65", "0", "99999"], "--height": ["64"], "--prompt-syntax": ["plain", "a1111", "x"], "--json": [""],
    "--backend": ["fake", "nothing", "auto"], "--precision": ["fp32", "fp64"], "--threads": ["1", "0", "-1", "1000000", "1e3"],
    "--columns": ["1", "0"], "--no-metadata": [""], "--overwrite": [""], "--adapter": ["{lora}", "x={lora}:2", "{missing}"],
    "--prompts": ["{prompts}", "{missing}"], "--requests": ["{requests}", "{prompts}"], "--negative": ["bad"],
    "--limit": ["0.1"], "--limit-memory": ["1", "100M", "1.5G", "0"], "--layout": ["webdataset", "tar"],
    "--format": ["jpeg", "gif"], "--quality": ["0", "90"], "--shard-size": ["1", "0"], "--max-rows": ["2", "1"],
    "--max-failures": ["0", "-1"], "--retry-failed": [""], "--sr": ["nearest", "x2", "x9"], "--sr-steps": ["1", "0"],
    "--noise-level": ["3", "-1"], "--init": ["{lora}", "{missing}"], "--strength": ["0.5", "2"], "--overlay": [""],
    "--experts": ["base", "base@0..1", "@"], "--micro": ["crop=0,8", "crop"], "--tile-memory": ["1M", "x"],
    "--budget": ["2"], "--name": ["fast"], "--bundle": ["{missing}", "fake"], "--help": [""], "--version": [""],
}  # fmt: skip
SMALL = ["--width", "64", "--height", "64", "--steps", "1", "-o", "{out}"]
FREE = [name for name in NAMES if "/" not in name and name not in (".", "..")]  # in this folder, wherever they are used


def start(folder: Path) -> dict[str, Path]:
    os.chdir(folder)  # any word may come to stand where a file to write is named
    lora = folder / "\x1b[2J\u202ex.safetensors"
    text = json.dumps({"lora_unet_\x1b[31m\n.alpha": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    lora.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    (folder / "p.txt").write_text("a cat\n\x1b]0;x\x07 dog\n", encoding="utf-8")
    (folder / "r.jsonl").write_text(
        '{"prompt": "x", "steps": 2, "width": 64}\n{"prompt": "\\u001b[2J"}\n', encoding="utf-8"
    )
    return {"lora": lora, "prompts": folder / "p.txt", "requests": folder / "r.jsonl", "folder": folder}


def case(rng: random.Random, base: dict[str, Path]) -> list[str]:
    command = rng.choice([*COMMANDS, "plan", "generate", "generate", "batch"])
    words = [*command.split(), *COMMANDS[command]]
    if command in ("generate", "batch"):
        words += SMALL
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        option = rng.choice(list(OPTIONS))
        value = rng.choice(OPTIONS[option]) if rng.random() < 0.7 else rng.choice(FREE)
        at = rng.randrange(len(words) + 1) if rng.random() < 0.1 else len(words)
        words[at:at] = [option] if value == "" else [option, value]
    if rng.random() < 0.1:
        words.insert(rng.randrange(len(words) + 1), rng.choice(FREE))
    return words


def check(words: list[str], base: dict[str, Path]) -> None:
    out = base["folder"] / f"out{len(list(base['folder'].iterdir()))}"
    places = {**base, "out": out, "missing": base["folder"] / "no\x1b[2J\nthing"}
    arguments = [word.format(**places) if word[:1] == "{" or ("{lora" in word) else word for word in words]
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            main([word.replace("\0", "") for word in arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
    printed, told = output.getvalue(), errors.getvalue()
    lines = told.removesuffix("\n").split("\n")
    assert all(line.isprintable() for line in printed.replace("\t", " ").split("\n")), printed
    assert all(line.isprintable() for line in lines), told
    assert code in (0, 1, 2), code
    if code:
        assert lines[-1].startswith("stepforge: ")
        assert all(line.startswith("stepforge: ") for line in lines), told
        raise Refused(lines[-1])
    assert all(line.startswith("stepforge: warning: ") for line in lines if line), told
