"""Ahead-of-time compilation of every shipped program, and what must hold of its machine code. Needs no GPU.

    python -m stepforge.kernels.aot --check            all programs against golden.json (some minutes)
    python -m stepforge.kernels.aot --check --sample 8 eight of them, always the same
    python -m stepforge.kernels.aot --write            golden.json again, after a change that was meant

A program passes if it spills nothing, fits the registers and shared memory of its architecture, multiplies with that
architecture's matrix instruction as often as its tile says and never in tf32, loads its tiles asynchronously 16 bytes at
a time, uses no atomic operation on global memory and has no hidden parameter. Its figures must equal the golden ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from stepforge.kernels.aot.programs import Program, programs
from stepforge.kernels.aot.ptx import assemble, bare, parameters
from stepforge.kernels.aot.sass import disassemble, entry_parameters
from stepforge.kernels.dispatch.tiles import SHARED_LIMIT, WIDE_ARCHES
from stepforge.kernels.launch import interpreted

GOLDEN = Path(__file__).with_name("golden.json")
Report = dict[str, Any]


def build(program: Program) -> Any:
    """Triton's compiled kernel: asm["ttir"], asm["ptx"], asm["cubin"], metadata."""
    import triton  # type: ignore[import-untyped]
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
    from triton.compiler import ASTSource  # type: ignore[import-untyped]

    body = program.body
    attributes = {(body.arg_names.index(arg),): [["tt.divisibility", 16]] for arg in program.aligned()}
    source = ASTSource(body, program.signature(), program.constants, attributes)
    options = {"num_warps": program.warps, "num_stages": program.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", program.arch, 32), options=options)


def report(program: Program) -> Report:
    """The figures that golden.json keeps, and those that `faults` alone looks at."""
    kernel = build(program)
    code = disassemble(kernel.asm["cubin"])
    found = code["instructions"]
    count, hidden = entry_parameters(kernel.asm["ptx"])
    declared = sum(kind != "constexpr" for kind in program.signature().values())
    return {
        "registers": code["registers"],
        "shared": kernel.metadata.shared,
        "mma": {name: count for name, count in sorted(found.items()) if name.startswith(MATRIX)},
        "async16": sum(count for name, count in found.items() if name.startswith("LDGSTS") and name.endswith(".128")),
        "stack": code["stack"],
        "spills": sum(count for name, count in found.items() if name.startswith(("STL", "LDL"))),
        "atomics": sorted(name for name in found if name.split(".")[0] in ("ATOM", "ATOMG", "RED", "REDG")),
        "tma": sorted(name for name in found if name.startswith(("UTMA", "UBLKCP"))),
        "hidden": hidden,
        "undeclared": count - declared - 2,
        "scratch": [kernel.metadata.global_scratch_size, kernel.metadata.profile_scratch_size],
        "threads": f".reqntid {32 * program.warps}" in kernel.asm["ptx"],
        "bare": without_scratch(program, kernel.asm["ptx"]) if program.is_plugin else "",
    }


def without_scratch(program: Program, ptx: str) -> str:
    """Why the program cannot be launched with its declared arguments alone; empty if it can."""
    types = [{"*": "u64"}.get(kind[0], "u32") for kind in program.signature().values() if kind != "constexpr"]
    try:
        short = bare(ptx)
        assemble(short, program.arch)
    except ValueError as error:
        return str(error)
    return "" if parameters(short) == types else f"parameters are {parameters(short)}, declared {types}"


MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "IMMA", "QGMMA", "DMMA")  # HFMA2.MMA is no matrix product
KEPT = ("registers", "shared", "mma", "async16")


def instruction(program: Program) -> str:
    """The start of the matrix instruction's name. Warp groups and tensor memory take 64 rows or more."""
    if program.arch in WIDE_ARCHES and program.dots[0][0] >= 64:
        return "HGMMA.64x" if program.arch == 90 else "UTCHMMA"
    return "HMMA.16816.F32" + (".BF16" if program.dtype == "bf16" else "")


def expected_products(program: Program) -> int:
    """How many matrix instructions a warp (sm_90: warp group, sm_100: block) issues for one pass of the body."""
    total = 0
    for m, n, k in program.dots:
        if instruction(program) == "HGMMA.64x":
            total += max(1, m // 64 // (program.warps // 4)) * (k // 16)
        elif instruction(program) == "UTCHMMA":
            total += max(1, m // 128) * (k // 16)
        else:
            total += (m // 16) * (n // 8) * (k // 16) // program.warps
    return total


def faults(program: Program, got: Report) -> list[str]:
    """What is wrong with a program, whatever the golden file says."""
    found = []
    if got["stack"] or got["spills"]:
        found.append(f"spills: {got['stack']} bytes of stack, {got['spills']} local loads and stores")
    if got["registers"] * 32 * program.warps > 65536:
        found.append(f"{got['registers']} registers for {32 * program.warps} threads do not fit 65536")
    if got["shared"] > SHARED_LIMIT[program.arch]:
        found.append(f"{got['shared']} bytes of shared memory; sm_{program.arch} has {SHARED_LIMIT[program.arch]}")
    if program.dots:
        products = sum(count for name, count in got["mma"].items() if name.startswith(instruction(program)))
        needed = expected_products(program)
        others = [name for name in got["mma"] if not name.startswith(instruction(program))]
        # the compiler peels loops of tcgen05 products, so that only a lower limit is known there
        if products < needed or (products > needed and "UTCHMMA" not in instruction(program)) or others:
            found.append(f"{needed} {instruction(program)} expected, found {got['mma']}")
    elif got["mma"]:
        found.append(f"no matrix product expected, found {got['mma']}")
    if any("TF32" in name for name in got["mma"]):
        found.append(f"tf32 products: {got['mma']}")
    if got["async16"] < program.async_loads:
        found.append(f"{got['async16']} asynchronous 16-byte loads, {program.async_loads} needed")
    for what in ("atomics", "tma"):
        if got[what]:
            found.append(f"{what}: {got[what]}")
    if got["undeclared"] or any(got["hidden"]) or any(got["scratch"]) or not got["threads"]:
        found.append(
            f"parameters {got['undeclared']} {got['hidden']}, scratch {got['scratch']}, threads {got['threads']}"
        )
    if got["bare"]:
        found.append(got["bare"])
    return found


def sample(count: int) -> list[Program]:
    """The first `count` programs by the hash of their names: spread over kernels and architectures, always the same."""
    return sorted(programs(), key=lambda program: hashlib.sha256(program.name.encode()).digest())[:count]


def report_by_name(name: str) -> Report:
    """For a worker: bodies do not travel between processes."""
    return report(next(program for program in programs() if program.name == name))


def reports(chosen: Iterable[Program], jobs: int) -> dict[str, Report]:
    names = [program.name for program in chosen]
    if jobs == 1:
        return {name: report_by_name(name) for name in names}
    with ProcessPoolExecutor(jobs) as pool:
        return dict(zip(names, pool.map(report_by_name, names, chunksize=4), strict=True))


def changes(got: dict[str, Report], golden: dict[str, Any]) -> list[str]:
    """Every figure that differs from the golden file, in words."""
    found = []
    for name, figures in got.items():
        kept = golden["programs"].get(name)
        if kept is None:
            found.append(f"{name}: not in golden.json")
            continue
        found += [
            f"{name}: {figure} was {kept[figure]}, is {figures[figure]}"
            for figure in KEPT
            if kept[figure] != figures[figure]
        ]
    return found


def write_golden(got: dict[str, Report], version: str) -> None:
    """One line a program."""
    lines = [f"  {json.dumps(name)}: {json.dumps({k: got[name][k] for k in KEPT})}" for name in sorted(got)]
    text = f'{{\n"triton": {json.dumps(version)},\n"programs": {{\n' + ",\n".join(lines) + "\n}\n}\n"
    GOLDEN.write_text(text, "utf-8")


def main() -> int:
    import triton

    parser = argparse.ArgumentParser(prog="python -m stepforge.kernels.aot", description=__doc__.split("\n")[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="compare with golden.json")
    action.add_argument("--write", action="store_true", help="write golden.json")
    parser.add_argument("--sample", type=int, default=0, help="so many programs only")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    args = parser.parse_args()
    if interpreted():
        parser.error("TRITON_INTERPRET is set; the interpreter compiles nothing")
    chosen = sample(args.sample) if args.sample else list(programs())
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        got = reports(chosen, args.jobs)
    problems = [f"{program.name}: {fault}" for program in chosen for fault in faults(program, got[program.name])]
    if args.write and args.sample:
        parser.error("--write takes all programs")
    if args.write:
        write_golden(got, triton.__version__)
    else:
        golden = json.loads(GOLDEN.read_text("utf-8"))
        if golden["triton"] != triton.__version__:
            problems.append(
                f"golden.json is of triton {golden['triton']}, this is {triton.__version__}: --write it again"
            )
        problems += changes(got, golden)
    print("\n".join(problems) or f"{len(got)} programs pass")
    return 1 if problems else 0
