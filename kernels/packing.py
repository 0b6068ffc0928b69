"""Adapters as the kernels take them: padded, stacked, with strengths that can change without packing again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepforge.kernels.dispatch.tiles import padded_rank
from stepforge.kernels.launch import require


@dataclass(frozen=True, slots=True)
class Pair:
    """One low-rank pair: strength · up @ down is added to a weight. down [r, K] (convolution: [r, C, k, k]), up [N, r]."""

    down: Tensor
    up: Tensor
    strength: float = 1.0


@dataclass(frozen=True, slots=True)
class Packed:
    """All adapters of one layer. Fields as in `reference.lowrank_linear`, or `lowrank_conv` for a convolution."""

    a: Tensor
    b: Tensor
    scale: Tensor
    ranks: Tensor
    spans: tuple[tuple[tuple[tuple[int, int], ...], ...], ...]  # blocks of 16 ranks of each adapter, slice, pair

    def set_strengths(self, adapter: int, strengths: Sequence[float]) -> None:
        """Change the strengths of an adapter's pairs, in all slices; copies a few floats to the device."""
        for part, spans in enumerate(self.spans[adapter]):
            require(len(strengths) == len(spans), f"adapter {adapter} has {len(spans)} pairs, not {len(strengths)}")
            for strength, (start, end) in zip(strengths, spans, strict=True):
                self.scale[adapter, part, start:end] = strength


def pack(adapters: Sequence[Sequence[Sequence[Pair]]]) -> Packed:
    """adapters[l][p]: the pairs that adapter l adds to slice p of a layer, concatenated along the rank.

    Each pair starts on a multiple of 16 ranks, so that it keeps a strength of its own. Slices without an adapter have
    no pairs. Raises ValueError where shapes disagree, or where there is no pair at all.
    """
    slices = {len(adapter) for adapter in adapters}
    require(len(slices) == 1, f"adapters must agree on the number of slices, got {sorted(slices)}")
    pairs = [pair for adapter in adapters for part in adapter for pair in part]
    require(bool(pairs), "there is no adapter to pack")
    down, up = pairs[0].down, pairs[0].up
    for pair in pairs:
        require(
            pair.down.shape[1:] == down.shape[1:], f"down {tuple(pair.down.shape)} does not fit {tuple(down.shape)}"
        )
        require(pair.up.shape[0] == up.shape[0], f"up {tuple(pair.up.shape)} does not fit {tuple(up.shape)}")
        require(pair.up.shape[1] == pair.down.shape[0], f"up {tuple(pair.up.shape)}, down {tuple(pair.down.shape)}")
    spans = tuple(tuple(spans_of(part) for part in adapter) for adapter in adapters)
    ends = [max((part[-1][1] for part in adapter if part), default=0) for adapter in spans]
    total = padded_rank(16 * max(ends))
    parts = slices.pop()
    conv = down.ndim == 4
    depth = (down.shape[2], down.shape[3], down.shape[1]) if conv else tuple(down.shape[1:])
    a = down.new_zeros(len(adapters), parts, total, *depth)
    b = up.new_zeros(len(adapters), parts, up.shape[0], total)
    scale = torch.zeros(len(adapters), parts, total // 16, dtype=torch.float32, device=down.device)
    for at, adapter in enumerate(adapters):
        for part, found in enumerate(adapter):
            for pair, (start, end) in zip(found, spans[at][part], strict=True):
                rank = pair.down.shape[0]
                a[at, part, 16 * start : 16 * start + rank] = pair.down.permute(0, 2, 3, 1) if conv else pair.down
                b[at, part, :, 16 * start : 16 * start + rank] = pair.up
                scale[at, part, start:end] = pair.strength
    require(not conv or parts == 1, "convolutions are not packed in slices")
    ranks = torch.tensor([16 * end for end in ends], dtype=torch.int32, device=down.device)
    return Packed(a[:, 0] if conv else a, b.flatten(1, 2), scale, ranks, spans)


def spans_of(pairs: Sequence[Pair]) -> tuple[tuple[int, int], ...]:
    spans, start = [], 0
    for pair in pairs:
        end = start + (pair.down.shape[0] + 15) // 16
        spans.append((start, end))
        start = end
    return tuple(spans)


def block_table(adapters: Sequence[int], rows: int, block_m: int, *, length: int | None = None) -> Tensor:
    """The row blocks of a batch in which image i has `rows` rows and adapter adapters[i] (−1: none): int32 [T, 3].

    Blocks do not cross images; where block_m does not divide `rows` the last of an image is shorter. length: pad with
    empty blocks, so that one captured graph serves any batch.
    """
    blocks = [
        (image * rows + first, min(block_m, rows - first), adapter)
        for image, adapter in enumerate(adapters)
        for first in range(0, rows, block_m)
    ]
    require(length is None or length >= len(blocks), f"{len(blocks)} row blocks do not fit into {length}")
    blocks += [(len(adapters) * rows, 0, -1)] * ((length or len(blocks)) - len(blocks))
    return torch.tensor(blocks, dtype=torch.int32).reshape(-1, 3)
