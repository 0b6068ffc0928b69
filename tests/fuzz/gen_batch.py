"""Manifests of a batch with strange lines, cells and names, through the command on the fake model.

A batch ends with 0, 1 or 2; what it says are whole lines without control characters; each job is done or in failures.jsonl with
its line; a second run draws nothing again; and no picture beyond the manifest's folder is opened.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

from mutate import NAMES, STRANGE, flipped, json_text, mutated, nudged
from PIL import Image

from stepforge.runtime.cli.main import main
from stepforge.runtime.serve.manifest import PICTURES

QUICK, SOAK = 60, 1500
SECONDS = 60.0  # a job may ask for a thousand steps
URLS = (
    "http://127.0.0.1:9/a.png",
    "file:///etc/hostname",
    "data:image/png;base64,AAAA",
    "//127.0.0.1/a",
    "ftp://a/b.png",
)
JOBS: tuple[dict[str, Any], ...] = (
    {"prompt": "a cat", "seed": 1, "id": "a-b", "guidance": 3.0, "negative": "dog", "images": 2},
    {"prompt": "b", "sampler": "dpmpp_2m", "schedule": "karras", "guidance": "linear(1..5)", "guider": "rescale(0.7)"},
    {"prompt": "c", "timesteps": [900, 500, 1], "adapters": {"x": 0.5}, "sampler": "euler"},
    {"prompt": "d", "init": {"image": "in.png", "strength": 0.5, "mask": "in.png", "overlay": True}},
    {"prompt": "e", "upscale": [{"name": "nearest"}, {"name": "x4", "steps": 1, "noise_level": 3}]},
    {"prompt": "", "upscale": {"name": "nearest", "image": "in.png"}},
    {"prompt": "f", "controls": [{"name": "a", "image": "in.png", "scale": 0.5, "start": 0.0, "end": 1.0}]},
    {"prompt": "g", "experts": "base@0..1", "micro": {"crop": [0, 8]}, "reuse": "tgate(0.5)", "eta": 0.5},
)
SMALL = {"steps": 1, "width": 32, "height": 32}


class Refused(Exception):
    """A batch that ended with 1 or 2; its text is the last line on standard error."""


ERRORS = (Refused,)


def start(folder: Path) -> Path:
    for picture in (folder / "in.png", folder / "manifests/in.png"):
        picture.parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), "teal").save(picture)
    (folder / "manifests/link.png").symlink_to(folder / "in.png")
    return folder


def job(rng: random.Random) -> dict[str, Any]:
    fields = {**SMALL, **rng.choice(JOBS)}
    match rng.randrange(7):
        case 0:
            fields = nudged(fields, rng)
        case 1:
            fields = mutated(fields, rng, (*STRANGE, *URLS, "link.png", "../in.png", "../../outside/secret.bin"))
        case 2:
            name = rng.choice(list(PICTURES))
            fields[name] = {
                "name": "a",
                "image": rng.choice((*NAMES, *URLS, "link.png", "../../outside/secret", "in.png")),
            }
            fields[name] |= {"mask": rng.choice((*NAMES, *URLS))} if name == "init" else {}
    return fields if isinstance(fields, dict) else {"prompt": fields}


def case(rng: random.Random, base: Path) -> tuple[str, bytes, list[str]]:
    jobs = [job(rng) for _ in range(rng.choice((1, 2, 3)))]
    options = rng.choice(
        ([], ["--max-failures", "0"], ["--layout", "webdataset", "--shard-size", "2"], ["--format", "webp"])
    )
    if rng.random() < 0.2:
        options = [*options, "--limit-memory", rng.choice(("1", "100K", "60000", "1M", "8M", "999999G", ""))]
    if rng.random() < 0.7:
        return ".jsonl", b"\n".join(json_text(one, rng) for one in jobs), options
    names = list(dict.fromkeys(name for one in jobs for name in one if isinstance(name, str)))
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(names)
    for one in jobs:
        rows.writerow([_cell(one.get(name)) for name in names])
    data = text.getvalue().encode(errors="surrogatepass")
    return ".csv", flipped(data, rng) if rng.random() < 0.4 else data, options


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value)


def check(case: tuple[str, bytes, list[str]], base: Path) -> None:
    ending, data, options = case
    manifest, out = base / f"manifests/jobs{ending}", base / "out"
    manifest.write_bytes(data)
    shutil.rmtree(out, ignore_errors=True)
    command = ["batch", "fake", str(manifest), "-o", str(out), "--json", *options]
    code, report, lines = run(command)
    if report is None:
        raise Refused(lines[-1])
    journal = [json.loads(line) for line in (out / ".stepforge/journal.jsonl").read_text().splitlines()[1:]]
    failures = [line for line in journal if "error" in line]
    told = out / "failures.jsonl"
    listed = [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
    assert [line["line"] for line in listed] == sorted(line["line"] for line in failures), (
        "failures that are not listed"
    )
    assert report["failed"] == len(failures)
    if not report["left"]:
        assert report["done"] + report["failed"] == report["jobs"]
        assert run(command)[1]["done"] == 0, "drawn again"
    else:
        assert "--max-failures" in options
        assert failures
    shutil.rmtree(out)
    if code:
        raise Refused(lines[-1])


def run(command: list[str]) -> tuple[int, Any, list[str]]:
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            main(command)
        except SystemExit as ended:
            code = int(ended.code or 0)
    lines = errors.getvalue().removesuffix("\n").split("\n")
    assert all(line.isprintable() for line in lines), lines
    assert all(line.startswith("stepforge: ") for line in lines if line), lines
    assert code in (0, 1, 2), code
    return code, json.loads(output.getvalue()) if output.getvalue() else None, lines
