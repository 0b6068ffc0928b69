"""Hostile inputs by the thousand: every generator's cases go through their door in child processes, and are counted.

    python tests/fuzz/soak.py [GENERATOR ...] [--seed N] [--cases N] [--quick] [--json FILE [--resume]]

A generator is a module `gen_<name>.py` beside this file:

    ERRORS = (BundleError,)    classes that may refuse a case
    QUICK, SOAK = 200, 8000    cases in `make test` and in `make test-soak`
    SECONDS = 10.0             optional: a case that takes longer is a hang
    QUIET = False              optional: lines on standard error are allowed

    def start(folder): ...         once a process; what it returns is `base`. The folder is the process's own, and empty
    def case(rng, base): ...       one input, of any type whose repr says what it is; rng is a random.Random of the case's own
    def check(case, base): ...     open the door. Returning accepts; AssertionError says that it was read, but wrongly

What becomes of a case: `accepted`; `refused`, by one of ERRORS in one printable line that is not empty; or a failure:

    crash      the process ended (a signal, or exit)
    hang       longer than SECONDS
    traceback  an exception that is none of ERRORS
    untidy     refused, but the text is empty, has several lines, control characters or 2000 characters
    misread    AssertionError of `check`
    escape     a file of `folder/../outside` was opened, or something was written there or in the working directory
    noise      something on standard error (engines' own logging, warnings) although QUIET

Case i of a seed is the same in every run, whatever ran before: `soak.py GENERATOR --seed 0 --only i` repeats it here, with its
traceback. Exit code 1 if there was any failure. SIGTERM ends a run and keeps its counts; `--resume` goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import random
import re
import resource
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FOLDERS = re.compile(r'(?<=")/[^"\n]*/')
GOOD = ("accepted", "refused")
BAD = ("crash", "hang", "traceback", "untidy", "misread", "escape", "noise")
SHOWN = 5  # failures of a kind that are kept with their text
START = 600.0  # seconds that a generator may take to start, libraries' imports included
MEMORY = 12 << 30  # bytes of address space of a child: a case that asks for more gets MemoryError
IN_OPEN, IN_CREATE, IN_DELETE, IN_MOVED_TO, IN_NONBLOCK = 0x20, 0x100, 0x200, 0x80, 0x800


def names() -> list[str]:
    return sorted(path.stem.removeprefix("gen_") for path in HERE.glob("gen_*.py"))


def load(name: str) -> Any:
    sys.path.insert(0, str(HERE))
    return importlib.import_module(f"gen_{name}")


def rng_of(name: str, seed: int, index: int) -> random.Random:
    return random.Random(f"{name} {seed} {index}")


class Watch:
    """Tells whether a folder's files were opened, whoever did: inotify sees the engines' C++ too."""

    def __init__(self, *folders: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._file = libc.inotify_init1(IN_NONBLOCK)
        for folder in folders:
            mask = IN_OPEN | IN_CREATE | IN_DELETE | IN_MOVED_TO
            if libc.inotify_add_watch(self._file, os.fsencode(folder), mask) < 0:
                raise OSError(ctypes.get_errno(), "inotify")

    def seen(self) -> list[str]:
        """Names of what was opened or made since the last call."""
        found = []
        try:
            data = os.read(self._file, 1 << 16)
        except BlockingIOError:
            return []
        while data:
            _, mask, _, length = struct.unpack("iIII", data[:16])
            name = data[16 : 16 + length].rstrip(b"\0").decode(errors="replace")
            if name:  # none: the folder itself was listed
                found.append(f"{'opened' if mask & IN_OPEN else 'changed'} {name}")
            data = data[16 + length :]
        return found


def printable_line(text: str) -> bool:
    return bool(text.strip()) and len(text) < 2000 and all(c.isprintable() for c in text)


def judge(module: Any, case: Any, base: Any) -> tuple[str, str]:
    """Outcome of a case, and its text."""
    try:
        module.check(case, base)
    except module.ERRORS as error:
        text = str(error)
        return ("refused" if printable_line(text) else "untidy"), text[:3000]
    except AssertionError as error:
        return "misread", "".join(traceback.format_exception(error)[-3:])
    except BaseException as error:
        return "traceback", "".join(traceback.format_exception(error)[-4:])
    return "accepted", ""


def worker(name: str, seed: int, first: int, last: int) -> None:
    """Child process: one JSON line before each case and one after it, on the real standard output."""
    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("always")
    scratch = Path.cwd()
    for folder in ("inside", "outside", "cwd"):
        (scratch / folder).mkdir()
    for secret in ("secret", "secret.bin", "secret.txt", "secret.json", "secret.safetensors", "model.onnx.data"):
        (scratch / "outside" / secret).write_bytes(b"\0" * 65536)
    os.chdir(scratch / "cwd")
    module = load(name)
    base = module.start(scratch / "inside")
    os.dup2(os.open(scratch / "noise", os.O_RDWR | os.O_CREAT), 2)
    faulthandler.enable((scratch / "faults").open("w"))
    watch = Watch(scratch / "outside", scratch / "cwd")
    for index in range(first, last):
        case = module.case(rng_of(name, seed, index), base)
        told.write(json.dumps({"begun": index, "case": repr(case)[:1500]}) + "\n")
        before = os.lseek(2, 0, os.SEEK_END)
        watch.seen()
        outcome, text = judge(module, case, base)
        if escaped := watch.seen():
            outcome, text = "escape", f"{escaped[:5]} {text}"
        sys.stderr.flush()
        after = os.lseek(2, 0, os.SEEK_END)
        if outcome in GOOD and after > before and getattr(module, "QUIET", True):
            outcome, text = "noise", os.pread(2, min(after - before, 2000), before).decode(errors="replace")
        told.write(json.dumps({"ended": index, "outcome": outcome, "text": text}) + "\n")
    told.flush()
    os._exit(0)  # engines may take their time to end


class Child:
    """A process that runs cases from `first` on."""

    def __init__(self, name: str, seed: int, first: int, count: int, scratch: Path) -> None:
        command = [sys.executable, __file__, "--worker", name, str(seed), str(first), str(count)]
        with (scratch / "errors").open("wb") as errors:
            self._process = subprocess.Popen(
                command, cwd=scratch, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
            )
        assert self._process.stdout is not None
        self._output = self._process.stdout.fileno()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._output, selectors.EVENT_READ)
        self._lines: list[bytes] = []
        self._rest = b""

    def line(self, limit: float) -> dict[str, Any] | None:
        """What it tells next; None when it has ended. Raises TimeoutError."""
        while not self._lines:
            if not self._selector.select(limit):
                raise TimeoutError
            if not (data := os.read(self._output, 1 << 16)):
                return None
            *self._lines, self._rest = (self._rest + data).split(b"\n")
        told: dict[str, Any] = json.loads(self._lines.pop(0))
        return told

    def end(self) -> int:
        """Its exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        self._process.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()
        return self._process.wait()


class Stopped(Exception):
    """SIGTERM: counts are kept, and the run ends."""


def stop(*_: object) -> None:
    raise Stopped


def soak(name: str, seed: int, index: int, count: int) -> dict[str, Any]:
    """Run cases index..count−1 of a generator; counts of what became of them, and the first failures."""
    counts: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    started, limit = time.monotonic(), getattr(load(name), "SECONDS", 10.0)
    while index < count:
        with tempfile.TemporaryDirectory(prefix="stepforge-fuzz-") as scratch:
            child, case, outcome = Child(name, seed, index, count, Path(scratch)), None, "crash"
            try:
                while (told := child.line(START if case is None else limit)) is not None:
                    if "begun" in told:
                        case = told["case"]
                        continue
                    _count(counts, failures, told["outcome"], index, case, told["text"].replace(scratch, ""))
                    index, case = index + 1, None
            except TimeoutError:
                outcome = "hang"
            except Stopped:
                child.end()
                break
            code = child.end()
            if index == count:
                break
            if case is None:
                errors = (Path(scratch) / "errors").read_text(errors="replace")
                raise RuntimeError(
                    f"generator {name} failed by itself before case {index}: {outcome}\n{errors[-3000:]}"
                )
            faults = (Path(scratch) / "faults").read_text(errors="replace")
            _count(counts, failures, outcome, index, case, f"exit code {code} {faults[:1500]}")
            index += 1
    return {
        "cases": sum(counts.values()),
        **{kind: counts[kind] for kind in (*GOOD, *BAD)},
        "seconds": round(time.monotonic() - started, 1),
        "failures": failures,
    }


def added(first: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Counts of two runs over neighbouring cases."""
    failures = [*first.get("failures", ()), *more["failures"]]
    return {
        **{key: round(first[key] + value, 1) for key, value in more.items() if key != "failures"},
        "failures": failures,
    }


def _count(counts: Counter[str], failures: list[Any], outcome: str, index: int, case: Any, text: str) -> None:
    counts[outcome] += 1
    if outcome in BAD and counts[outcome] <= SHOWN:
        text = FOLDERS.sub(
            "", text.partition("Extension modules")[0].strip()
        )  # places of the machine are nobody's business
        failures.append({"outcome": outcome, "index": index, "case": case, "text": text})


def repeat(name: str, seed: int, index: int) -> None:
    """One case in this process."""
    module = load(name)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "inside"
        folder.mkdir()
        (Path(scratch) / "outside").mkdir()
        base = module.start(folder)
        case = module.case(rng_of(name, seed, index), base)
        print(repr(case)[:3000])
        module.check(case, base)
        print("accepted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generators", nargs="*", help=f"all by default: {', '.join(names())}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, help="in place of each generator's own SOAK")
    parser.add_argument("--quick", action="store_true", help="each generator's QUICK cases")
    parser.add_argument("--only", type=int, help="repeat one case")
    parser.add_argument(
        "--json", type=Path, help="write the counts there after each generator; of generators not named they stay"
    )
    parser.add_argument("--resume", action="store_true", help="go on after the cases that FILE counts")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        name, *numbers = args.worker
        return worker(name, *map(int, numbers))
    signal.signal(signal.SIGTERM, stop)
    found: dict[str, Any] = {}
    if args.json is not None and args.generators and args.json.exists():  # counts of other generators stay
        found = json.loads(args.json.read_text(encoding="utf-8"))["generators"]
    keys = ("cases", *GOOD, *BAD)
    for name in args.generators or names():
        module = load(name)
        if args.only is not None:
            return repeat(name, args.seed, args.only)
        wanted = args.cases or (module.QUICK if args.quick else module.SOAK)
        before = found.get(name) if args.resume else None
        one = soak(name, args.seed, before["cases"] if before else 0, wanted)
        stopped = one["cases"] + (before["cases"] if before else 0) < wanted
        one = added(before, one) if before else one
        counts = {kind: n for kind, n in one.items() if kind != "failures" and (n or kind in GOOD)}
        print(name, *(f"{kind} {n}" for kind, n in counts.items()), flush=True)
        for failure in one["failures"]:
            print(f"  {failure['outcome']} {failure['index']}: {failure['case']}\n    {failure['text']}")
        if not one["failures"]:
            del one["failures"]
        found[name] = one
        total = {key: sum(one[key] for one in found.values()) for key in keys}
        if args.json is not None:  # after each generator: a run that is killed keeps what it has
            known = {name: found[name] for name in sorted(found)}
            report = {"command": "make test-soak", "seed": args.seed, "total": total, "generators": known, **machine()}
            args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if stopped:
            sys.exit(f"stopped after {one['cases']} cases of {name}; --resume goes on")
    print("all", *(f"{kind} {n}" for kind, n in total.items()))
    sys.exit(any(total[kind] for kind in BAD))


def machine() -> dict[str, str]:
    sys.path.append(str(HERE.parents[1] / "benchmarks"))
    return {"machine": importlib.import_module("harness").machine()}


if __name__ == "__main__":
    main()
