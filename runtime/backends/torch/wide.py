"""Buffers of wide layers: W with spare columns for B, and the A that make their S; laid when the adapters of a batch change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepforge.runtime.backends import Arrays
from stepforge.runtime.backends.torch.passes.widen import WideLayer

BUCKETS = (16, 32, 64, 128, 256)  # columns of a slice: one recording each


def bucket(columns: int) -> int | None:
    """The fewest columns that hold so many; None: too many."""
    return next((size for size in BUCKETS if columns <= size), None)


def columns_of(adapter: NDArray[np.int64], rank: int) -> tuple[tuple[int, ...], NDArray[np.float32] | None]:
    """Slots in use, in order, and 0/1 [rows, L]: the columns of each row's slot. None if they do not fit."""
    slots = tuple(int(slot) for slot in np.unique(adapter) if slot)
    width = bucket(rank * len(slots))
    if width is None:
        return slots, None
    mask = np.zeros((len(adapter), width), np.float32)
    for row, slot in enumerate(adapter):
        if slot:
            at = slots.index(int(slot)) * rank
            mask[row, at : at + rank] = 1
    return slots, mask


def prepared(networks: Sequence[Any], inputs: Arrays) -> tuple[int, Arrays]:
    """Which network a call runs, its adapters in place, and its inputs with the columns of each row's slot."""
    if "adapter" not in inputs or not inputs["adapter"].any():
        networks[0].refresh()
        return 0, inputs
    wide = networks[1].wide
    slots, mask = columns_of(inputs["adapter"], wide.rank) if wide is not None else ((), None)
    at = 2 if wide is not None and mask is None else 1
    networks[at].refresh()
    if mask is None:
        return at, inputs
    networks[at].lay(slots)
    return at, {**inputs, "adapter_columns": wide.columns(mask)}


class WideWeight:
    """W with `most` spare columns a slice, or the spare output channels of a convolution; laid: whose adapters stand there."""

    def __init__(self, weight: Tensor, layer: WideLayer, most: int) -> None:
        if layer.conv:
            tensor = weight.new_zeros(len(weight) + most, *weight.shape[1:])
            self.tensor = tensor.contiguous(memory_format=torch.channels_last)
            self.tensor[: len(weight)] = weight
        else:
            rows, depth = weight.shape
            self.tensor = weight.new_zeros(rows, depth + len(layer.widths) * most)
            self.tensor[:, :depth] = weight
        self.laid: Any = None


class WideBanks:
    """banks: the views of all slots on the device, by name: a [slots, R, K] and b [slots, N, R] of each layer or slice.

    shared: wide weights by the name of the weight; the variants of a network have them in common.
    """

    def __init__(
        self,
        layers: Iterable[WideLayer],
        constants: dict[str, Tensor],
        banks: dict[str, Tensor],
        shared: dict[str, WideWeight],
    ) -> None:
        self.layers, self._banks = list(layers), banks
        self._weights: dict[str, WideWeight] = {}
        self._laid: Any = None  # whose A stand in `_downs`
        self._columns: NDArray[np.float32] | None = None  # mask of the last call, if nothing has been laid since
        most = bucket(self.rank * self._slots) or BUCKETS[-1]
        for layer in self.layers:
            if layer.weight not in shared:
                shared[layer.weight] = WideWeight(constants[layer.weight], layer, most)
            self._weights[layer.wide] = shared[layer.weight]
        self._downs: dict[str, Tensor] = {}  # by stack: [n, slices · most, K]
        self._place: dict[str, tuple[str, int]] = {}
        for stack in dict.fromkeys(layer.stack for layer in self.layers):
            members = [layer for layer in self.layers if layer.stack == stack]
            weight = constants[members[0].weight]
            rows = len(members[0].widths) * most
            depth = len(weight) if members[0].conv else weight.shape[1]
            self._downs[stack] = weight.new_zeros(len(members), rows, depth)
            self._place |= {layer.down: (stack, at) for at, layer in enumerate(members)}

    @property
    def rank(self) -> int:
        """Columns of a slot in one slice."""
        layer = self.layers[0]
        return int(self._banks[layer.b[0]].shape[2])

    @property
    def exceeded(self) -> bool:
        """Whether a batch can have more adapters than the columns hold."""
        return bucket(self.rank * self._slots) is None

    @property
    def _slots(self) -> int:
        """Slots that adapters fill."""
        return int(self._banks[self.layers[0].b[0]].shape[0]) - 1

    def weight(self, layer: WideLayer) -> Tensor:
        """The constant of a layer, in the buffer's memory."""
        if layer.conv:
            return self._weights[layer.wide].tensor[: layer.widths[0]]
        return self._weights[layer.wide].tensor[:, : self._downs[layer.stack].shape[2]]

    def tensors(self, width: int) -> dict[str, Tensor]:
        found = {}
        for layer in self.layers:
            if layer.conv:
                found[layer.wide] = self._weights[layer.wide].tensor[: layer.widths[0] + width]
                found[layer.stack] = self._downs[layer.stack][:, :width]
                continue
            columns = self._downs[layer.stack].shape[2] + len(layer.widths) * width
            found[layer.wide] = self._weights[layer.wide].tensor[:, :columns]
            found[layer.stack] = self._downs[layer.stack][:, : len(layer.widths) * width]
        return found

    @property
    def names(self) -> list[str]:
        """Inputs of the program whose memory these buffers are."""
        return [name for layer in self.layers for name in (layer.wide, layer.stack)]

    def columns(self, mask: NDArray[np.float32]) -> NDArray[np.float32]:
        """The same array as in the last call, as long as rows have the same columns and these hold the same adapters."""
        if self._columns is None or not np.array_equal(self._columns, mask):
            self._columns = mask
        return self._columns

    def lay(self, slots: tuple[int, ...], version: Any) -> None:
        """Put the adapters of these slots into the columns, where others stand there. version None: nobody can tell."""
        width = bucket(self.rank * len(slots))
        assert width is not None
        wanted = slots, version
        for layer in self.layers:
            weight = self._weights[layer.wide]
            if version is None or self._laid != wanted or weight.laid != wanted:
                self._lay(layer, slots, width)
                weight.laid = wanted
                self._columns = None
        self._laid = wanted

    def _lay(self, layer: WideLayer, slots: tuple[int, ...], width: int) -> None:
        stack, place = self._place[layer.down]
        wide, down = self._weights[layer.wide].tensor, self._downs[stack][place]
        slices, depth = len(layer.widths), down.shape[1]
        if layer.conv:
            a, b = self._banks[layer.a[0]], self._banks[layer.b[0]]
            index = torch.tensor(slots, device=down.device)
            used, first = len(slots) * b.shape[2], layer.widths[0]
            down[:width].zero_()
            wide[first : first + width].zero_()
            wide[first : first + used] = a.index_select(0, index).flatten(0, 1).permute(0, 3, 1, 2)
            down[:used] = b.index_select(0, index).transpose(1, 2).reshape(used, depth)
            return
        down[: slices * width].zero_()
        wide[:, depth : depth + slices * width].zero_()
        index = torch.tensor(slots, device=down.device)
        start = 0
        for part, rows in enumerate(layer.widths):
            own = part if len(layer.a) > 1 else 0
            a, b = self._banks[layer.a[own]], self._banks[layer.b[own]]
            a = a.flatten(2)  # 1×1 convolutions have [slots, R, 1, 1, K]
            rank = b.shape[2]
            each = a.shape[1] // (1 if len(layer.a) > 1 else slices)
            at = 0 if len(layer.a) > 1 else part * each
            from_row = 0 if len(layer.a) > 1 else start
            used = len(slots) * rank
            picked = a.index_select(0, index)[:, at : at + rank]
            down[part * width : part * width + used] = picked.reshape(used, depth)
            up = b.index_select(0, index)[:, from_row : from_row + rows]
            columns = slice(depth + part * width, depth + part * width + used)
            wide[start : start + rows, columns] = up.permute(1, 0, 2).reshape(rows, used)
            start += rows
