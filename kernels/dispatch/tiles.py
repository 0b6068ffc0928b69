"""The shipped tiles: how each architecture divides a layer. No tile spills registers (golden.json, python -m ...aot)."""

from __future__ import annotations

from dataclasses import dataclass

ARCHES = (80, 86, 89, 90, 100, 120)
WIDE_ARCHES = (90, 100)  # accumulators in warp groups or tensor memory: 128-row tiles fit
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # bytes a block may ask for


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows, columns and depth of a program's tile, and how the compiler runs it."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8  # row blocks that share the weight columns in L2


def padded_rank(rank: int) -> int:
    """The R of a kernel: a power of two, 16 at least because tl.dot needs a depth of 16."""
    return max(16, 1 << (rank - 1).bit_length())


ONEPASS_RANKS = (16, 32, 64)  # at 128 the second accumulator is as large as the first: it spills on all but sm_100
EXPAND_RANKS = (16, 32, 64, 128)


def block_rows(arch: int) -> tuple[int, ...]:
    """Row blocks that an architecture has tiles for, largest first."""
    return (128, 64) if arch in WIDE_ARCHES else (64,)


def onepass_tile(arch: int, rank: int, block_m: int) -> Tile:
    """64-row tiles take 4 warps and under 256 registers, so that two programs share a multiprocessor. The shallower tiles of
    sm_100 and the narrower ones of sm_120 are there because their neighbours' spilled 16 to 80 bytes (triton 3.7.1)."""
    check_block(arch, block_m)
    shallow = arch == 100 and rank >= (64 if block_m == 128 else 32)
    if arch in WIDE_ARCHES:
        warps = 8 if block_m == 128 else 4
        return Tile(block_m, 128, 32, warps, stages=4) if shallow else Tile(block_m, 128, 64, warps, stages=3)
    return Tile(64, 64, 64, warps=4, stages=3) if rank >= 64 or arch == 120 else Tile(64, 128, 32, warps=4, stages=4)


def expand_tile(arch: int, block_m: int) -> Tile:
    """The tile of `expand`, whose registers do not grow with the rank."""
    return onepass_tile(arch, 16, block_m)


def check_block(arch: int, block_m: int) -> None:
    if block_m not in block_rows(arch):
        raise ValueError(f"sm_{arch} has no tile of {block_m} rows; choose one of {block_rows(arch)}")


def shrink_tile(block_m: int, rank: int) -> Tile:
    """Short tiles: a shrink has one column of programs, so its rows are what fills the multiprocessors."""
    return Tile(min(32, block_m), 0, 64 if rank == 64 else 128, warps=4, stages=3)  # 128 deep spilled 8 bytes at R = 64


BANK_RANKS = (16, 64)  # columns of a tile of `bank_shrink`; layers that share an input have their ranks side by side


def bank_tile(ranks: int) -> Tile:
    """The tile of `bank_shrink` for a bank of so many columns."""
    return (
        Tile(32, BANK_RANKS[0], 128, warps=4, stages=3) if ranks <= BANK_RANKS[0] else Tile(32, BANK_RANKS[1], 64, 4, 3)
    )


WHOLE_NORM = 16384  # elements of a padded group of a norm that one program holds in registers
