"""What the texts on the command line mean: requests, adapters, ControlNets, stages, numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepforge.runtime.bundle import NAME
from stepforge.runtime.errors import RequestError
from stepforge.runtime.files import is_lfs_pointer, printable, strict_json
from stepforge.runtime.lora.layers import MAX_STRENGTH

if TYPE_CHECKING:
    from stepforge.runtime.request import Request

LARGEST_FILE = 256 << 20  # bytes; a million prompts have about 100 MB
SEPARATORS = frozenset(filter(None, (os.sep, os.altsep)))


def read_requests(
    prompts: list[str] | None, prompt_file: Path | None, request_file: Path | None, options: dict[str, Any]
) -> list[Request]:
    """One request for each prompt or each line of a request file."""
    from stepforge.runtime.request import Request, canonical
    from stepforge.runtime.serve.manifest import request_of, with_pictures

    if [bool(prompts), prompt_file is not None, request_file is not None].count(True) != 1:
        raise RequestError("give either PROMPT arguments, --prompts FILE or --requests FILE")
    if prompt_file is not None and prompt_file.suffix == ".jsonl":
        raise RequestError(f"{printable(prompt_file)} has a request a line, not a prompt; give it with --requests")
    if request_file is None:
        texts = list(prompts or ()) if prompt_file is None else [line for _, line in read_lines(prompt_file)]
        return [Request(prompt=text, **options) for text in texts]
    requests = []
    for number, line in read_lines(request_file):
        try:
            values = strict_json(line.encode())
            if not isinstance(values, dict):
                raise ValueError("an object with the fields of a request is needed")
            fields = with_pictures(canonical(values), request_file.parent)
            requests.append(request_of(fields, options))
        except ValueError as error:
            raise RequestError(f"{printable(request_file)}, line {number}: {error}") from error
    return requests


def read_lines(file: Path) -> list[tuple[int, str]]:
    """The lines of a file that are not empty, with their numbers: lines end with \\n or \\r\\n and with nothing else, since
    prompts may hold what Unicode calls a line separator. A byte order mark is no part of the text. Raises RequestError."""
    try:
        with file.open("rb") as stream:
            data = stream.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise RequestError(f"{printable(file)} is larger than {LARGEST_FILE >> 20} MiB; give it in parts")
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"cannot read {printable(file)}: it is not UTF-8 text") from error
    except OSError as error:
        raise RequestError(f"cannot read {printable(file)}: {error.strerror}") from error
    if is_lfs_pointer(data):
        raise RequestError(f"{printable(file)} is a Git LFS pointer, not the file; run `git lfs pull`")
    lines = [line.strip(" \t\r") for line in text.split("\n")]
    if not (found := [(number, line) for number, line in enumerate(lines, 1) if line.strip()]):
        raise RequestError(f"{printable(file)} has no prompts")
    return found


def parse_init(
    image: Path | None, mask: Path | None, strength: float | None, overlay: bool = False
) -> dict[str, Any] | None:
    """The init image of the options, as fields of `Init`. Raises RequestError for what needs one."""
    given = {"mask": mask, "strength": strength, "overlay": overlay or None}
    stated = {name: value for name, value in given.items() if value is not None}
    if image is None:
        if stated:
            raise RequestError(f"--{next(iter(stated))} needs --init")
        return None
    return {"image": image, **stated}


def parse_adapters(texts: Sequence[str]) -> dict[str, tuple[Path, float]]:
    """[NAME=]FILE[:STRENGTH] -> file and strength by name; the file's own name if none is given.

    A text that names a file is one, with "=" in it or not. Raises RequestError.
    """
    adapters: dict[str, tuple[Path, float]] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        named = equals and name and rest and not set(name) & SEPARATORS and not _exists(_split(text)[0])
        file, strength = file_and_strength(rest if named else text)
        name = name if named else file.stem
        if name in adapters:
            raise RequestError(f"the adapter {printable(name)} is given twice; name one of the two, as in NAME=FILE")
        adapters[name] = (file, strength)
    return adapters


def _split(text: str) -> tuple[str, str]:
    """A path and what stands behind its last colon; all of it where that is a file, or is followed by no number."""
    path, colon, number = text.rpartition(":")
    if not colon or _exists(text):
        return text, ""
    try:
        float(number)
    except ValueError:
        return text, ""
    return path, number


def _exists(path: str) -> bool:
    return bool(path) and os.path.exists(path)  # False for what can be no path


def parse_numbers(name: str, text: str | None, kind: type) -> Any:
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise RequestError(f"--{name} {printable(text)} is not a list of numbers such as 999,850,700") from None


def parse_controls(texts: Sequence[str], preprocessor: str, window: str, guess_mode: bool) -> list[dict[str, Any]]:
    """NAME=IMAGE[:SCALE] -> fields of Control, which checks them. window: START..END in fractions of the steps.

    Raises RequestError, also for what says how ControlNets run where none is given.
    """
    start, dots, end = window.partition("..")
    try:
        times = {"start": float(start), "end": float(end)} if dots else None
    except ValueError:
        times = None
    if times is None:
        raise RequestError(
            f"--control-window {printable(window)} is not understood; give two fractions of the steps such as 0..0.6"
        )
    if not texts:
        said = {
            "--preprocessor": preprocessor != "none",
            "--control-window": window != "0..1",
            "--guess-mode": guess_mode,
        }
        if stated := [option for option, is_stated in said.items() if is_stated]:
            raise RequestError(f"{stated[0]} needs --control NAME=IMAGE")
    controls = []
    for text in texts:
        name, equals, rest = text.partition("=")
        if not equals or not rest or not NAME.fullmatch(name):
            raise RequestError(f"--control {printable(text)} is not understood; give NAME=IMAGE or NAME=IMAGE:SCALE")
        image, scale = file_and_strength(rest)
        given = {"name": name, "image": image, "scale": scale, "preprocessor": preprocessor, "guess_mode": guess_mode}
        controls.append({**given, **times})
    return controls


def parse_stages(
    names: Sequence[str], steps: int | None, noise_level: int | None, guidance: str | None
) -> list[dict[str, Any]]:
    """Fields of Upscale, which checks them, of each stage; what is None stays the stage's own. Raises RequestError."""
    options = {"steps": steps, "noise_level": noise_level, "guidance": guidance}
    stated = {name: value for name, value in options.items() if value is not None}
    if stated and not names:
        flags = {"steps": "--sr-steps", "noise_level": "--noise-level", "guidance": "--sr-guidance"}
        raise RequestError(f"{flags[next(iter(stated))]} needs --sr NAME")
    return [{"name": name, **stated} for name in names]


def file_and_strength(text: str) -> tuple[Path, float]:
    """FILE or FILE:STRENGTH, as on the command line; a colon in the name of a file that exists, or before what is no
    number, belongs to the name. Raises RequestError."""
    path, number = _split(text)
    strength = float(number or 1.0)
    if not abs(strength) <= MAX_STRENGTH:
        raise RequestError(
            f"the strength of {printable(path)} is {printable(number)}; "
            f"it lies between -{MAX_STRENGTH:g} and {MAX_STRENGTH:g}"
        )
    return Path(path), strength


def parse_micro(texts: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE -> fields of `Micro`; its values are checked there. Raises RequestError."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or key in found:
            raise RequestError(f"--micro {printable(text)} is not understood; give KEY=VALUE once, such as crop=0,64")
        try:
            numbers = [float(part) for part in value.split(",")]
        except ValueError:
            raise RequestError(
                f"--micro {printable(text)} is not understood; the value is one or two numbers"
            ) from None
        whole = [int(number) if number.is_integer() else number for number in numbers]
        found[key] = whole if len(whole) > 1 else whole[0]
    return found
