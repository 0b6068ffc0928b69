"""Every program that is shipped: a Triton body, an architecture, a type and a tile, with the most that it may do switched on.

A program without a bias, a residual or a table is the same code with less in it, so the resources of these bound it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stepforge.kernels import bank, conv, gated, lowrank, norms, sums, update, wide
from stepforge.kernels.dispatch.tiles import (
    ARCHES,
    BANK_RANKS,
    EXPAND_RANKS,
    ONEPASS_RANKS,
    Tile,
    bank_tile,
    block_rows,
    expand_tile,
    onepass_tile,
    shrink_tile,
)

DTYPES = ("fp16", "bf16")
FP32 = ("scale", "strength", "s", "parts", "guidance", "table", "scale_in", "state", "z")
INT32 = ("ranks", "adapter", "table", "step", "places", "sources")
RUNTIME_FLOATS = ("eps",)
ANY_NUMBER = (
    "M",
    "blocks",
    "slices",
    "nt",
    "rows",
    "splits",
    "span",
    "steps",
    "lanes",
    "groups",
    "pixels",
    "height",
    "width",
    "tokens",
)  # not multiples of 16
CONV_NUMBERS = ("out_height", "out_width", "stride", "pad")


@dataclass(frozen=True, slots=True)
class Program:
    """One compiled kernel. dots: (M, N, K) of each matrix product in its body, as often as the body holds it."""

    name: str
    body: Any
    arch: int
    dtype: str
    warps: int
    stages: int
    constants: dict[str, Any]
    dots: tuple[tuple[int, int, int], ...] = ()
    async_loads: int = 0  # asynchronous 16-byte loads a thread must have, at least
    is_plugin: bool = False  # launched by TensorRT, which passes the declared arguments and nothing else
    ragged: tuple[str, ...] = ()  # numbers that are no multiples of 16, beside those that never need be

    def signature(self) -> dict[str, str]:
        """The type of each argument, in Triton's notation."""
        types = {}
        for arg in self.body.arg_names:
            if arg in self.constants:
                types[arg] = "constexpr"
            elif arg in RUNTIME_FLOATS:
                types[arg] = "fp32"
            elif is_pointer(self.body.__name__, arg):
                guide = self.body.__name__ == "guide_update_kernel"
                integer = arg in INT32 and not (guide and arg == "table")
                single = arg in FP32
                types[arg] = "*i32" if integer else "*fp32" if single else f"*{self.dtype}"
            else:
                types[arg] = "i32"
        return types

    def aligned(self) -> list[str]:
        """Arguments that the launcher passes as multiples of 16: addresses, and what rows are made of."""
        numbers = ANY_NUMBER + (CONV_NUMBERS if self.body.__name__ == "conv_shrink_kernel" else ())
        return [
            arg
            for arg, kind in self.signature().items()
            if kind.startswith("*") or (kind == "i32" and arg not in numbers and arg not in self.ragged)
        ]


POINTERS = {
    "x", "w", "a", "b", "scale", "ranks", "table", "bias", "residual", "out", "s", "parts", "weight", "shift",
    "h", "prediction", "guidance", "scale_in", "step", "state", "z", "sample", "places",
    "sources", "other", "extra", "total", "pre", "bank", "adapter", "strength",
}  # fmt: skip


def is_pointer(body: str, arg: str) -> bool:
    return arg in POINTERS


def gemm(tile: Tile) -> dict[str, int]:
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m}


def loads(tile: Tile) -> int:
    """16-byte loads a thread needs to fill all but the last stage with tiles of x and w."""
    return (tile.block_m + tile.block_n) * tile.block_k * 2 // 16 // (32 * tile.warps) * (tile.stages - 1)


def programs() -> Iterator[Program]:
    for arch in ARCHES:
        for dtype in DTYPES:
            yield from linear_programs(arch, dtype)
            yield from shrink_programs(arch, dtype)
            yield from (bank_program(arch, dtype, ranks) for ranks in BANK_RANKS)
            yield from other_programs(arch, dtype)


def linear_programs(arch: int, dtype: str) -> Iterator[Program]:
    most = {"GROUPED": True, "HAS_BIAS": True, "HAS_RESIDUAL": True, "UPCAST": False}
    for block in block_rows(arch):
        for rank in ONEPASS_RANKS:
            tile = onepass_tile(arch, rank, block)
            base = (tile.block_m, tile.block_n, tile.block_k)
            up = (tile.block_m, tile.block_n, rank)
            yield Program(
                f"onepass r{rank} m{block} {dtype} sm_{arch}", lowrank.onepass_kernel, arch, dtype, tile.warps, tile.stages,
                {"R": rank, "LOWRANK": True, **gemm(tile), **most},
                dots=(base, (tile.block_m, rank, tile.block_k), up, base, up), async_loads=2 * loads(tile),
            )  # fmt: skip
        for rank in EXPAND_RANKS:
            tile = expand_tile(arch, block)
            base = (tile.block_m, tile.block_n, tile.block_k)
            up = (tile.block_m, tile.block_n, 16)
            yield Program(
                f"expand r{rank} m{block} {dtype} sm_{arch}", lowrank.expand_kernel, arch, dtype, tile.warps, tile.stages,
                {"R": rank, "SPLIT": 2, "BASE": True, **gemm(tile), **most}, dots=(base, up), async_loads=loads(tile),
            )  # fmt: skip
            shape = {**gemm(tile), **{name: most[name] for name in ("GROUPED", "HAS_BIAS", "UPCAST")}}
            half = tile.block_n // 2
            yield Program(
                f"expand_geglu r{rank} m{block} {dtype} sm_{arch}", gated.expand_geglu_kernel, arch, dtype, tile.warps,
                tile.stages, {"R": rank, "SPLIT": 2, **shape},
                dots=2 * ((block, half, up[2]), (block, half, tile.block_k)), async_loads=loads(tile),
            )  # fmt: skip
            if block == block_rows(arch)[-1]:
                yield Program(
                    f"add_expanded r{rank} m{block} {dtype} sm_{arch}", lowrank.expand_kernel, arch, dtype, tile.warps,
                    tile.stages, {"R": rank, "SPLIT": 1, "BASE": False, **gemm(tile), **most, "HAS_BIAS": False}, dots=(up,),
                )  # fmt: skip


def shrink_programs(arch: int, dtype: str) -> Iterator[Program]:
    for rank in EXPAND_RANKS:
        tile = shrink_tile(64, rank)
        shape = {"BLOCK_M": tile.block_m, "SUB": 64 // tile.block_m, "GROUPED": True, "UPCAST": False}
        yield Program(
            f"shrink r{rank} {dtype} sm_{arch}", lowrank.shrink_kernel, arch, dtype, tile.warps, tile.stages,
            {"R": rank, "SPLIT": 2, "BLOCK_K": tile.block_k, **shape}, dots=((tile.block_m, rank, tile.block_k),),
            async_loads=tile.block_m * tile.block_k * 2 // 16 // (32 * tile.warps) * (tile.stages - 1),
        )  # fmt: skip
        yield Program(
            f"conv_shrink r{rank} {dtype} sm_{arch}", conv.conv_shrink_kernel, arch, dtype, tile.warps, tile.stages,
            {"R": rank, "SIDE": 3, "BLOCK_K": 64, **shape}, dots=((tile.block_m, rank, 64),),
            async_loads=tile.block_m * 64 * 2 // 16 // (32 * tile.warps) * (tile.stages - 1),
        )  # fmt: skip


def bank_program(arch: int, dtype: str, ranks: int, depth: int = 16) -> Program:
    """The shrink that TensorRT runs as a plugin, for banks [L, depth, ranks]."""
    tile = bank_tile(ranks)
    return Program(
        f"bank_shrink r{tile.block_n} {dtype} sm_{arch}", bank.bank_shrink_kernel, arch, dtype, tile.warps, tile.stages,
        {"BLOCK_M": tile.block_m, "BLOCK_R": tile.block_n, "BLOCK_K": tile.block_k, "UPCAST": False},
        dots=((tile.block_m, tile.block_n, tile.block_k),),
        async_loads=tile.block_m * tile.block_k * 2 // 16 // (32 * tile.warps) * (tile.stages - 1),
        is_plugin=True, ragged=tuple(name for name, size in (("K", depth), ("R", ranks)) if size % 16),
    )  # fmt: skip


def other_programs(arch: int, dtype: str) -> Iterator[Program]:
    loop = {
        "NUM_X": 3,
        "NUM_P": 5,
        "WAYS": 2,
        "BLOCK": 1024,
        "UPCAST": False,
    }  # rings of runtime/backends/torch/loop.py
    norm = {
        "WIDTH": 120,
        "BLOCK_C": 128,
        "GROUPS": 16,
        "LANES": 10,
        "BLOCK_P": 32,
        "TWO": True,
        "RESIDUAL": True,
        "SHIFT": True,
    }
    one = {"BLOCK_P": 256, "BLOCK_C": 64, "LANES": 40, "TWO": True, "RESIDUAL": True, "SHIFT": True}
    bodies: dict[str, tuple[Any, dict[str, Any], int]] = {
        "stats": (norms.stats_kernel, {**norm, "SUM": True, "EXTRA": True}, 8 if arch == 100 else 4),
        "apply": (norms.apply_kernel, {**norm, "SPLITS": 16, "WRITTEN": False, "EXTRA": False, "SILU": True}, 4),
        "apply written": (norms.apply_kernel, {**norm, "SPLITS": 16, "WRITTEN": True, "EXTRA": True, "SILU": True}, 4),
        "whole": (norms.whole_kernel, {**one, "SUM": True, "EXTRA": True, "SILU": True}, 8),
        "layer_norm": (wide.layer_norm_kernel, {"BLOCK_M": 1, "BLOCK_C": 2048, "PRE": True}, 4),
        "image_sum": (
            sums.image_sum_kernel,
            {"SCALE": 2, "BLOCK_P": 32, "BLOCK_C": 64, "RESIDUAL": True, "SHIFT": True},
            4,
        ),
        "geglu": (gated.geglu_kernel, {"BLOCK_M": 8, "BLOCK_N": 256}, 4),
        "guide_update": (update.guide_update_kernel, {"EXACT": False, **loop}, 4),
        "guide_update exact": (update.guide_update_kernel, {"EXACT": True, **loop}, 4),
    }
    for name, (body, constants, warps) in bodies.items():
        yield Program(f"{name} {dtype} sm_{arch}", body, arch, dtype, warps, 3, constants)
