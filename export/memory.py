"""Whether an export fits into memory and onto the disk, asked before it starts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stepforge.runtime.bundle import ComponentId
from stepforge.runtime.errors import CheckpointError

# Peak resident memory over the bytes of the largest network in the bundle's precision: 1.25 measured for SD 1.5 in fp32,
# 1.16 for SDXL in fp16 (benchmarks/results/suite). Most of it is mapped files, which the system can let go of; so a refusal
# wants certainty: less than the weights themselves, and the libraries.
PEAK = 1.3
LIBRARIES = 500 << 20  # bytes resident after the imports; 0.5 GB measured (benchmarks/bench_export.py)
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


def check_fits(networks: Mapping[ComponentId, Any], dtype: torch.dtype, out: Path) -> None:
    """Raises CheckpointError, with the figures, where an export to `out` certainly runs out of memory or disk.

    networks: with or without their weights; the VAE, which is small, need not be among them.
    """
    sizes = {str(key): weight_bytes(network, dtype) for key, network in networks.items()}
    name, largest = max(sizes.items(), key=lambda item: item[1])
    free = available()
    if free is not None and free < largest + LIBRARIES:
        raise CheckpointError(
            f"the export of {name} needs some {gigabytes(PEAK * largest + LIBRARIES)} of memory, {gigabytes(largest)} of them "
            f"for its weights; {gigabytes(free)} are available"
        )
    here = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    written, disk = sum(sizes.values()), shutil.disk_usage(here)
    if disk.total and disk.free < written:  # /proc and its like have no size
        raise CheckpointError(
            f"the bundle takes more than {gigabytes(written)}; {here} has {gigabytes(disk.free)} free"
        )


def weight_bytes(network: Any, dtype: torch.dtype) -> int:
    return sum(int(parameter.numel()) for parameter in network.parameters()) * int(dtype.itemsize)


def available() -> int | None:
    """Bytes that this process may still take: of the machine, and of its cgroup where that has a limit. None: unknown."""
    found = []
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError):  # not Linux
        pass
    try:  # cgroup v2, as a container sees its own
        limit = int((CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        found.append(max(0, limit - used + _reclaimable((CGROUP / "memory.stat").read_text(encoding="ascii"))))
    except (OSError, ValueError):  # no cgroup v2, or the limit is "max"
        pass
    return min(found, default=None)


def _reclaimable(stat: str) -> int:
    """Bytes of cached files, which count as used until somebody wants the memory."""
    rows: Mapping[str, str] = dict(line.split(maxsplit=1) for line in stat.splitlines())
    return int(rows.get("active_file", 0)) + int(rows.get("inactive_file", 0))


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
