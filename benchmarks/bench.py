"""The suite: `python benchmarks/bench.py quick` (`make bench-quick`, some 15 minutes on 2 cores) or `full` (`make bench`).

Each case is a process of its own, so that its peak of memory is its own, and its record is kept under --work by commit: a run
that was cut off, or that --minutes ended (exit code 3), goes on where it was. When every case has its record, the report is
written to benchmarks/results/suite/: PROFILE.md, PROFILE.json, PROFILE.png, and a line of history.jsonl. First comes parity: if
it fails, there is nothing else. Images are compared with diffusers', and who draws another image has no ratio.

    python benchmarks/bench.py quick --minutes 7     a part of it; the same again until the exit code is 0
    python benchmarks/bench.py quick --items lora    those items alone; no report
    python benchmarks/bench.py compare quick         the last two runs of one kind of machine, by ratio; exit code 1 if one fell

Peers run in the same run, where they are installed: `pip install -r benchmarks/suite/peers.txt`, for `full` also sdcpp.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from harness import machine
from suite import history, report
from suite.cases import ROOT, Case, Record, Store, commit
from suite.items import ITEMS, Context, item
from suite.runners import RUNNERS, missing

RUNS = {"quick": 3, "full": 5}  # counted runs of a case
LIMIT = 1500  # seconds of a case
UNFINISHED = 3


def precisions() -> list[str]:
    """What this processor computes: OpenVINO takes bf16 where there are instructions for it."""
    import openvino

    capable = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ["fp32", "bf16"] if "BF16" in capable else ["fp32"]


def all_cases(args: argparse.Namespace) -> list[Case]:
    offered = precisions()
    cases = [case for name in args.items or ITEMS for case in item(name).cases(args.profile == "quick", offered)]
    return [case for case in cases if not args.models or case.model in args.models]


def run_case(case: Case, args: argparse.Namespace, store: Store) -> Record:
    """Measure a case in a process of its own. One that fails is a record that says so: the others go on."""
    lacking = missing(case.runner) if case.runner in RUNNERS else ""
    if lacking:
        return Record(case, refused=lacking)
    with tempfile.NamedTemporaryFile(suffix=".json") as answer:
        command = [
            sys.executable, __file__, args.profile, "--work", str(args.work), "--case", json.dumps(asdict(case)), "--image",
            str(store.image(case)), "--answer", answer.name, "--runs", str(args.runs),
        ]  # fmt: skip
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        # imports compile every module anew where this is set: it is the peers with most modules that lose
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, errors="replace", timeout=LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            return Record(case, refused=f"not done in {LIMIT} s")
        if done.returncode:
            store.image(case).with_suffix(".log").write_text(done.stdout + done.stderr, "utf-8")
            lines = [line for line in done.stderr.splitlines() if line.strip() and done.returncode > 0]
            return Record(case, refused=(lines or [f"exit code {done.returncode}"])[-1][:200])
        return Record(**{**json.loads(Path(answer.name).read_text("utf-8")), "case": case})


def child(args: argparse.Namespace) -> None:
    case = Case(**json.loads(args.case))
    context = Context(args.work, args.image, args.profile == "quick", args.runs)
    record = item(case.item).measure(case, context)
    record.peak = record.peak or 1024 * max(
        resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    args.answer.write_text(json.dumps(asdict(record)), "utf-8")


def suite(args: argparse.Namespace) -> int:
    own = commit()
    store = Store(args.work / "records" / f"{args.profile}-{own}")
    cases = all_cases(args)
    until = time.monotonic() + 60 * args.minutes
    records = []
    for index, case in enumerate(cases):
        record = store.find(case)
        if record is None:
            if time.monotonic() > until:
                print(f"{index} of {len(cases)} cases are measured; run the same again", file=sys.stderr)
                return UNFINISHED
            started = time.monotonic()
            record = run_case(case, args, store)
            record.machine, record.commit, record.command = machine(), own, " ".join(["python", *sys.argv])
            record.notes["wall"] = round(time.monotonic() - started, 1)
            store.keep(record)
            told = record.refused or " ".join(f"{value:.4g}" for value in record.seconds)
            print(f"[{index + 1}/{len(cases)}] {case.key}: {told}  ({record.notes['wall']:.0f} s)", file=sys.stderr)
        if case.item == "parity" and record.refused:
            print(f"parity failed, so no speed is measured: {record.refused}", file=sys.stderr)
            return 1
        records.append(record)
    if args.items or args.models:
        print(report.markdown(args.profile, records, store))
        return 0
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    report.write(args.profile, records, store, out)
    history.append(out / "history.jsonl", args.profile, report.rows(records, store))
    print(out / f"{args.profile}.md")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=(*RUNS, "compare"))
    parser.add_argument("profile", nargs="?", choices=tuple(RUNS), help="of compare")
    parser.add_argument("--items", nargs="*", choices=ITEMS)
    parser.add_argument("--models", nargs="*", help="cases of these models alone")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no further case after as many")
    parser.add_argument("--work", type=Path, default=ROOT / "out/bench", help="models, bundles and records, kept")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/suite")
    parser.add_argument("--runs", type=int, help="counted runs of a case")
    parser.add_argument(
        "--tolerance", type=float, default=0.15, help="share that a ratio may fall before compare fails"
    )
    for name in ("--case", "--image", "--answer"):
        parser.add_argument(name, type=str if name == "--case" else Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.command == "compare":
        return history.compare(args.out / "history.jsonl", args.profile or "quick", args.tolerance)
    args.profile = args.command
    args.runs = args.runs or RUNS[args.profile]
    args.work = args.work.resolve()
    if args.case:
        child(args)
        return 0
    return suite(args)


if __name__ == "__main__":
    sys.exit(main())
