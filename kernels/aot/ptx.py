"""PTX for launchers that pass the declared arguments and nothing else, and its assembly by the tool that ships with Triton.

Triton appends two parameters to every kernel, pointers to scratch memory that its own launcher fills. A program of ours reads
neither (`main.faults`), but a launch reads as many arguments as the entry point declares: without them the driver would take
what lies behind the caller's list.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton  # type: ignore[import-untyped]

ENTRY = re.compile(r"(\.visible\s+\.entry\s+(\w+)\s*\()(.*?)(\))", re.DOTALL)
TYPE = re.compile(r"\.param\s+\.(\w+)\b.*?(\w+_param_\d+)\s*$", re.DOTALL)


def bare(ptx: str) -> str:
    """The program without Triton's own parameters. Raises ValueError where the code reads one."""
    entry = ENTRY.search(ptx)
    if entry is None:
        raise ValueError("the PTX has no entry point")
    parameters = entry[3].split(",")
    for hidden in parameters[-2:]:
        found = TYPE.search(hidden.strip())
        if found is None or found[1] != "u64" or ptx.count(f"[{found[2]}") or ptx.count(f"{found[2]}") != 1:
            raise ValueError(f"{entry[2]} reads memory of Triton's launcher: {hidden.strip()}")
    return ptx[: entry.start(3)] + ",".join(parameters[:-2]) + "\n" + ptx[entry.end(3) :]


def parameters(ptx: str) -> list[str]:
    """Types of the entry point's parameters in their order: "u64" for pointers, "u32" for integers."""
    entry = ENTRY.search(ptx)
    if entry is None:
        raise ValueError("the PTX has no entry point")
    found = [TYPE.search(one.strip()) for one in entry[3].split(",")]
    return [one[1] for one in found if one is not None]


def assemble(ptx: str, arch: int) -> bytes:
    """Machine code for sm_`arch`. Raises ValueError with what ptxas says."""
    nvidia = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = nvidia / ("ptxas-blackwell" if arch >= 100 and (nvidia / "ptxas-blackwell").is_file() else "ptxas")
    target = re.search(r"\.target\s+sm_(\d+a?)", ptx)
    with tempfile.TemporaryDirectory() as folder:
        source, code = Path(folder, "program.ptx"), Path(folder, "program.cubin")
        source.write_text(ptx, "utf-8")
        name = f"sm_{arch}a" if target is not None and target[1].endswith("a") else f"sm_{arch}"
        done = subprocess.run([tool, f"--gpu-name={name}", source, "-o", code], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"ptxas: {done.stderr.strip() or done.stdout.strip()}")
        return code.read_bytes()
