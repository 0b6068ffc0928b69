"""What a compiled program is made of, read from its machine code by the tools that ship with Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton  # type: ignore[import-untyped]

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)", re.MULTILINE)
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


def run(*command: object) -> str:
    """What a tool prints; its warnings (an old ELF format, at every call) are kept out of sight."""
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


def disassemble(cubin: bytes) -> dict[str, Any]:
    """{"registers", "stack": bytes of spilled registers, "instructions": how often each occurs}."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = USAGE.search(run(tool, "-res-usage", file.name))
        text = run(tool, "-sass", file.name)
    if usage is None:
        raise RuntimeError("cuobjdump did not report the registers")
    return {
        "registers": int(usage[1]),
        "stack": int(usage[2]),
        "instructions": Counter(INSTRUCTION.findall(text)),
    }


def entry_parameters(ptx: str) -> tuple[int, list[bool]]:
    """How many parameters the entry point has, and of the last two whether the code reads them."""
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)", ptx, re.DOTALL)
    if entry is None:
        raise RuntimeError("the PTX has no entry point")
    names = re.findall(r"(\w+_param_\d+)", entry[2])
    body = ptx[entry.end() :]
    return len(names), [re.search(rf"\b{name}\b", body) is not None for name in names[-2:]]
