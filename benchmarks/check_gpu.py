"""Whether this machine can run the kernels on a GPU: one line for each thing they need. `python benchmarks/check_gpu.py`

Exit status 2 if something is missing. Imports nothing that the environment may lack.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PINNED = (Path(__file__).resolve().parents[1] / "requirements.txt").read_text("utf-8").split()
TORCH, TRITON = (next(pin for pin in PINNED if pin.startswith(f"{name}==")) for name in ("torch", "triton"))
INSTALL = f".venv/bin/pip install --force-reinstall {TORCH} {TRITON}"


def missing() -> Iterator[str]:
    """What is wrong and what helps, one line each; nothing on a machine that is ready."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        yield "TRITON_INTERPRET=1 runs the kernels in Python: unset it"
    if importlib.util.find_spec("triton") is None:
        yield f"triton is not installed: .venv/bin/pip install {TRITON}"
    # Triton compiles a small launcher in C for each kernel's signature
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        yield "no C compiler for Triton's launchers: apt-get install gcc, or set CC"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        yield f"no {header} for Triton's launchers: apt-get install python3-dev"
    if importlib.util.find_spec("torch") is None:
        yield f"torch is not installed: {INSTALL}"
        return
    import torch

    if torch.version.cuda is None:
        yield f"torch {torch.__version__} is not built for CUDA; PyPI's wheel for Linux x86-64 is: {INSTALL}"
    elif not torch.cuda.is_available():
        yield f"torch {torch.__version__} finds no CUDA GPU; its CUDA is {torch.version.cuda}, the driver: {driver()}"
    elif torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        yield f"{torch.cuda.get_device_name()} is sm_{major}{minor}; the kernels need sm_80 (Ampere) or newer"


def driver() -> str:
    """The driver's version by nvidia-smi, or why there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "no nvidia-smi on PATH"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.strip() or done.stderr.strip() or "nvidia-smi says nothing").splitlines()[0]


def main() -> int:
    lines = list(missing())
    for line in lines:
        print(f"missing: {line}", file=sys.stderr)
    if not lines:
        import torch

        print(f"ready: {torch.cuda.get_device_name()}, driver {driver()}, torch {torch.__version__}")
    return 2 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
