"""Which path runs a layer: a checked-in table, `table.json`, of the choices that the cost formula makes.

The table holds the layers of SD1.5 and SDXL at each rank and architecture. A layer of another number of rows takes the
nearest row count of the same weights; other weights take the formula. Nothing is timed at run time, so exported graphs
and two machines of one kind agree. `python -m stepforge.kernels.dispatch` writes the table again.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

from stepforge.kernels.dispatch.cost import GPU_OF_ARCH, Choice, base, choose, wide
from stepforge.kernels.dispatch.layers import GATED, SD15, SDXL, Layer
from stepforge.kernels.dispatch.tiles import ARCHES, padded_rank

TABLE = Path(__file__).with_name("table.json")
RANKS = (16, 32, 64, 128)
WIDTHS = (16, 64, 128)  # columns behind x that the pilot measured


def key(layer: Layer, rank: int, grouped: bool) -> str:
    """What the table is looked up by, but for the number of rows."""
    kind = "conv" if layer.taps > 1 else "geglu" if layer.gated else "linear"
    return f"{kind} k{layer.k} n{layer.n} p{layer.slices} r{padded_rank(rank)}{' grouped' if grouped else ''}"


def build_table() -> dict[str, dict[str, dict[str, list[object]]]]:
    """{architecture: {key: {rows: [path, block_m, nt, parts]}}}"""
    table: dict[str, dict[str, dict[str, list[object]]]] = {}
    for arch in ARCHES:
        entries = table.setdefault(f"sm_{arch}", {})
        for layer in (*SD15, *SDXL, *GATED):
            for rank in RANKS:
                for grouped in (False, True):
                    choice = choose(GPU_OF_ARCH[arch], layer, rank, grouped=grouped)
                    entry = entries.setdefault(key(layer, rank, grouped), {})
                    entry[str(layer.m)] = [choice.path, choice.block_m, choice.nt, choice.parts]
    return table


@functools.cache
def read_table() -> dict[str, dict[str, dict[str, list[object]]]]:
    table: dict[str, dict[str, dict[str, list[object]]]] = json.loads(TABLE.read_text("utf-8"))
    return table


def nearest_arch(arch: int) -> int:
    """The newest supported architecture that is not newer; ValueError below sm_80, which has no bf16."""
    older = [known for known in ARCHES if known <= arch]
    if not older:
        raise ValueError(f"sm_{arch} is not supported; the kernels need one of sm_{', sm_'.join(map(str, ARCHES))}")
    return older[-1]


@functools.cache
def dispatch(layer: Layer, rank: int, arch: int, *, grouped: bool = False, block_m: int | None = None) -> Choice:
    """The path of a layer, with the estimates of all that could run it. block_m: that of a given table of row blocks."""
    arch = nearest_arch(arch)
    estimate = choose(GPU_OF_ARCH[arch], layer, rank, grouped=grouped, block_m=block_m)
    rows = read_table()[f"sm_{arch}"].get(key(layer, rank, grouped), {})
    if not rows or block_m not in (None, estimate.block_m):
        return estimate
    near = min(rows, key=lambda m: abs(math.log(int(m) / max(layer.m, 1))))
    path, block, nt, parts = rows[near]
    if path not in estimate.seconds or block_m not in (None, block):
        return estimate  # the nearest rows are open to a path that these are not, or to another block
    return Choice(str(path), int(str(block)), int(str(nt)), int(str(parts)), estimate.base, estimate.seconds)


def explain(layer: Layer, rank: int = 16, arch: int = 80, *, grouped: bool = False) -> str:
    """The choice for a layer and its estimate, as text."""
    choice = dispatch(layer, rank, arch, grouped=grouped)
    gpu = GPU_OF_ARCH[nearest_arch(arch)]
    detail = {
        "onepass": f"tiles of {choice.block_m} rows, one shrink for {choice.nt} tiles of columns",
        "split": f"tiles of {choice.block_m} rows, K in {choice.parts} part{'s' if choice.parts > 1 else ''}",
        "gated": f"tiles of {choice.block_m} rows, values and gates in one program, no kernel after it",
        "addmm": "cuBLAS only",
        "conv": "cuDNN's convolution, implicit-GEMM shrink, expand onto its output",
    }[choice.path]
    lines = [
        f"{layer.name or 'layer'}: y [{layer.m}, {layer.n}] = x [{layer.m}, {layer.k}] Wᵀ"
        f"{', then GEGLU' if layer.gated else ''}, rank {rank}, {gpu.name}",
        f"  {choice.path}: {detail}",
        f"  without an adapter {1e6 * choice.base:.1f} µs",
    ]
    for path, seconds in sorted(choice.seconds.items(), key=lambda item: item[1]):
        label = f"{path} + geglu" if layer.gated and path != "gated" else path
        lines.append(
            f"  {label:{16 if layer.gated else 8}} {1e6 * seconds:7.1f} µs  {100 * (seconds / choice.base - 1):+6.1f} %"
        )
    if layer.taps == 1:  # no path of these kernels: one library product for any mix of adapters
        for columns in WIDTHS:
            seconds = choice.base + wide(gpu, layer, columns) - base(gpu, layer)
            label = f"wide {columns}"
            lines.append(
                f"  {label:{16 if layer.gated else 8}} {1e6 * seconds:7.1f} µs  "
                f"{100 * (seconds / choice.base - 1):+6.1f} %  [x | S]·[W | B]ᵀ, {columns} columns for all adapters"
            )
    measured = "on this kind" if gpu.arch == 90 else "on an H100 only, their shares assumed here"
    lines.append(f"  constants: benchmarks/results/h100_kernels.json and h100_pilot.json, measured {measured}")
    return "\n".join(lines)


def write_table() -> None:
    """One line an entry, so that a change of the formula reads as a diff."""
    archs = []
    for arch, entries in build_table().items():
        lines = [f"  {json.dumps(name)}: {json.dumps(entries[name])}" for name in sorted(entries)]
        archs.append(f"{json.dumps(arch)}: {{\n" + ",\n".join(lines) + "\n}")
    TABLE.write_text("{\n" + ",\n".join(archs) + "\n}\n", "utf-8")
