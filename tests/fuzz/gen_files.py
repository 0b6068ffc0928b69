"""Files of prompts and of requests: odd line ends, byte order marks, encodings, JSON of strange values.

What is read is compared with a plain reading: UTF-8, lines that end with line feeds, one prompt each.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from mutate import NAMES, flipped, json_text, mutated

from stepforge.runtime.cli.inputs import file_and_strength, parse_adapters, parse_controls, read_lines, read_requests
from stepforge.runtime.errors import RequestError

ERRORS = (RequestError,)
QUICK, SOAK = 250, 1500

ENDS = [
    "\n",
    "\n",
    "\r\n",
    "\r",
    "\u2028",
    "\u2029",
    "\x85",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x1d",
    "\x1e",
    "\n\n",
    "\ufeff",
    "\0",
]
PROMPTS = ["a cat", "a (dog:1.2)", "", " ", "é 😀", "\u3000", "x" * 30_000, "\x1b[2J", "#", "BREAK", "\ufeffb"]
LINE = {
    "prompt": "x", "negative": "y", "steps": 4, "seed": 7, "images": 2, "guidance": "7.5", "adapters": {"a": 0.5},
    "sigmas": [14.6, 7.2], "width": 64, "controls": [{"name": "a", "image": "i.png", "scale": 0.5}], "guider": "cfg",
}  # fmt: skip
ARGUMENTS = ["a", "=", ":", "/", "file.st", "0.5", "1e400", "nan", "-1", "..", " ", "x=y.st", "c:d.st"]


def start(folder: Path) -> Path:
    for name in ("file.st", "x=y.st", "c:d.st"):
        (folder / name).touch()
    return folder


def case(rng: random.Random, base: Path) -> tuple[str, bytes | str]:
    kind = rng.choice(("prompts", "prompts", "requests", "requests", "arguments"))
    if kind == "prompts":
        text = "".join(rng.choice((*PROMPTS, *NAMES)) + rng.choice(ENDS) for _ in range(rng.choice((1, 3, 10))))
        data = (rng.choice(("", "", "\ufeff")) + text).encode(
            rng.choice(("utf-8",) * 8 + ("utf-16", "cp037")), "replace"
        )
        return kind, flipped(data, rng) if rng.random() < 0.1 else data
    if kind == "requests":
        lines = [
            json_text(mutated(LINE, rng), rng) if rng.random() < 0.7 else json.dumps(LINE).encode()
            for _ in range(rng.choice((1, 1, 3)))
        ]
        return kind, rng.choice((b"\n", b"\r\n")).join(lines)
    return kind, "".join(rng.choice((*ARGUMENTS, rng.choice(NAMES))) for _ in range(rng.choice((1, 2, 3, 5, 8))))


def check(case: tuple[str, bytes | str], base: Path) -> None:
    kind, data = case
    if isinstance(data, str):
        return _argument(data, base)
    file = base / "in.txt"
    file.write_bytes(data)
    lines = [line.strip(" \t\r") for line in re.split(r"\r?\n", data.decode("utf-8-sig", "replace"))]
    if kind == "prompts":
        assert [text for _, text in read_lines(file)] == [line for line in lines if line.strip()]
        requests = read_requests(None, file, None, {})
        assert [request.prompt for request in requests] == [line for line in lines if line.strip()]
        return
    requests = read_requests(None, None, file, {"steps": 3})
    wanted = [json.loads(line) for line in lines if line.strip()]
    assert [request.prompt for request in requests] == [one["prompt"] for one in wanted]
    assert [request.steps for request in requests] == [
        one.get("steps", one.get("num_inference_steps", 3)) for one in wanted
    ]


def _argument(text: str, base: Path) -> None:
    """A file that exists is that file, however it is called."""
    for name in ("file.st", "x=y.st", "c:d.st"):
        assert parse_adapters([f"{base}/{name}"]) == {Path(name).stem: (base / name, 1.0)}
        assert parse_adapters([f"n={base}/{name}:0.5"]) == {"n": (base / name, 0.5)}
        assert file_and_strength(f"{base}/{name}:-2") == (base / name, -2.0)
    ((name, (_, strength)),) = parse_adapters([text]).items()
    assert abs(strength) <= 100
    assert "/" not in name
    (control,) = parse_controls([text], "none", "0..1", False)
    assert text.startswith(f"{control['name']}=")
