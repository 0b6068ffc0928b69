"""The soak's doors again, with inputs that grow by what they reach: coverage-guided, by atheris (libFuzzer).

    python tests/fuzz/guided.py [DOOR ...] [--seconds 60] [--json FILE]

The soak's generators know the formats and break them. libFuzzer knows none: it keeps an input that ran a branch which no input
before ran, and changes it further. An input becomes a case of the generator of that name, and `soak.judge` says what became
of it; corpora start with the generators' own cases. Each door is a process. Exit code 1 if there was a failure, shown with
its bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from soak import BAD, SHOWN, judge, load, machine

SEEDS = 200  # cases of the generator that a corpus starts with
LONGEST = 1 << 16  # bytes of an input
SLOW = 10  # seconds after which libFuzzer ends the process: a hang
KINDS = ("prompts", "requests")


def lora(data: bytes) -> Any:
    return sys.modules["gen_lora"].Case({"adapter_model.safetensors": data}, len(data), "guided")


def texts(data: bytes) -> Any:
    fields = sorted(sys.modules["gen_texts"].WORDS)
    return fields[data[0] % len(fields) if data else 0], data[1:].decode("utf-8", "replace")


def files(data: bytes) -> Any:
    return KINDS[data[0] % 2 if data else 0], data[1:]


# case of an input, and input of a case; None: of a kind that no input becomes
DOORS: dict[str, tuple[Callable[[bytes], Any], Callable[[Any], bytes | None]]] = {
    "files": (files, lambda case: None if case[0] not in KINDS else bytes([KINDS.index(case[0])]) + case[1]),
    "lora": (lora, lambda case: case.files.get("adapter_model.safetensors")),
    "manifest": (lambda data: data, lambda case: case),
    "texts": (texts, lambda case: None),
}


def child(door: str, seconds: float, folder: Path, report: Path) -> None:
    import atheris

    with atheris.instrument_imports(include=["stepforge"]):
        module = load(door)
    work, corpus = folder / "work", folder / "corpus"
    work.mkdir()
    corpus.mkdir()
    base = module.start(work)
    case_of, input_of = DOORS[door]
    for index in range(SEEDS):
        data = input_of(module.case(random.Random(index), base))
        if data is not None and len(data) <= LONGEST:
            (corpus / str(index)).write_bytes(data)
    counts: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    until = time.monotonic() + seconds

    def one(data: bytes) -> None:
        outcome, text = judge(module, case_of(data), base)
        counts[outcome] += 1
        if outcome in BAD and len(failures) < SHOWN:
            failures.append({"outcome": outcome, "input": repr(data), "text": text})
        if time.monotonic() > until:
            report.write_text(json.dumps({"cases": counts.total(), **counts, "failures": failures}))
            os._exit(0)  # libFuzzer ends the process by itself otherwise, and its counts are lost

    atheris.Setup([door, str(corpus), f"-max_len={LONGEST}", f"-timeout={SLOW}", "-seed=1"], one)
    atheris.Fuzz()


def run(door: str, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        report = Path(name) / "report.json"
        command = [sys.executable, __file__, door, "--seconds", str(seconds), "--child", name, "--json", str(report)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=name, check=False)
        edges = [line for line in done.stderr.splitlines() if " cov: " in line]
        found = json.loads(report.read_text()) if report.exists() else {"cases": 0}
        if done.returncode:  # a signal, libFuzzer's limits of time and memory
            found.setdefault("failures", []).append({"outcome": "crash or hang", "text": done.stderr[-2000:]})
        found["branches"] = int(edges[-1].split(" cov: ")[1].split()[0]) if edges else 0
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("doors", nargs="*", metavar="DOOR", help=f"of {', '.join(DOORS)} [default: all]")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each door")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    doors = args.doors or [*DOORS]
    if unknown := set(doors) - DOORS.keys():
        parser.error(f"no such door: {', '.join(sorted(unknown))}")
    if args.child:
        child(doors[0], args.seconds, args.child, args.json)
        return 0
    found = {door: run(door, args.seconds) for door in doors}
    text = json.dumps({"seconds": args.seconds, "doors": found, **machine()}, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return int(any(one.get("failures") for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
