"""LoRA banks as tensors: the engine's own memory on the CPU, and copies, of which only changed slots are copied again: on
CUDA all, on the CPU the stacks of layers that run as one.

On CUDA a slot goes through one pinned block and in the stream's order: behind the calls that read what it held, before
those that read it, and the host waits for neither. PyTorch keeps the block until its copies are done.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stepforge.kernels.dispatch.tiles import padded_rank
from stepforge.runtime.backends import Arrays, Banks
from stepforge.runtime.backends.torch.lora import Stack, View

Parts = tuple[tuple[Tensor, View | None], ...]  # banks, and the view of each that is meant; None: all of it
Shared = dict[tuple[int, str], tuple[Any, Tensor]]  # (array, view) -> the array, which keeps its id, and its copy


def as_tensor(array: Any) -> Tensor:
    """Shares the array's memory; uint16 stands for bfloat16."""
    return (
        torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        if array.dtype == np.uint16
        else torch.from_numpy(array)
    )


class DeviceBanks:
    """The banks that a program reads, by input: whole ones, and the views and stacks that its fused layers take."""

    def __init__(
        self,
        arrays: Arrays,
        views: Iterable[View | Stack],
        whole: Iterable[str],
        *,
        device: Any,
        dtype: Any,
        shared: Shared,
        copied: bool,
    ) -> None:
        views = list(views)
        sources: dict[str, Parts] = {name: ((as_tensor(arrays[name]), None),) for name in whole}
        sources |= {view.name: tuple((as_tensor(arrays[part.bank]), part) for part in view.parts) for view in views}
        banks = {view.name: view.parts[0].bank for view in views}
        self._versions = arrays.versions if isinstance(arrays, Banks) else None
        self._seen: Any = None
        self._is_cuda = device.type == "cuda"
        self._pads = copied  # the kernels want ranks of their own; on the CPU they are references
        self._copied: dict[str, Parts] = {}
        self.tensors: dict[str, Tensor] = {}
        for name, parts in sources.items():
            if not copied and len(parts) == 1:
                ((source, view),) = parts
                self.tensors[name] = view.of(source) if view is not None else source
                continue
            array = arrays[banks.get(name, name)]
            key = id(array), name
            if key not in shared:
                shared[key] = array, self._placed(parts, slice(None)).to(device=device, dtype=dtype)
            self._copied[name] = parts
            self.tensors[name] = shared[key][1]

    def refresh(self) -> None:
        """Copy the slots that were filled since the last call; all of them if the banks do not say."""
        if not self._copied:
            return
        changed = list(range(self.tensors[next(iter(self._copied))].shape[0]))
        if self._versions is not None:
            now = np.array(self._versions)
            changed = np.flatnonzero(now != self._seen).tolist() if self._seen is not None else changed
            self._seen = now
        for slot in changed:
            one = slice(slot, slot + 1)
            targets = [self.tensors[name][one] for name in self._copied]
            rooms = pinned_like(targets) if self._is_cuda else targets
            for parts, target, room in zip(self._copied.values(), targets, rooms, strict=True):
                room.copy_(self._placed(parts, one))
                if room is not target:
                    target.copy_(room, non_blocking=True)

    def version(self, slots: Iterable[int]) -> tuple[int, ...] | None:
        """What changes when one of the slots is filled again; None if the banks do not say."""
        return tuple(int(self._versions[slot]) for slot in slots) if self._versions is not None else None

    def _placed(self, parts: Parts, slots: slice) -> Tensor:
        """Some slots of a view or stack, contiguous."""
        seen = [view.of(source[slots]) if view is not None else source[slots] for source, view in parts]
        if self._pads:
            seen = [padded(values, view) for values, (_, view) in zip(seen, parts, strict=True)]
        return seen[0].contiguous() if len(seen) == 1 else torch.cat(seen, 1)


def pinned_like(targets: Sequence[Tensor]) -> list[Tensor]:
    """Host memory for tensors of one type, of one allocation: a copy from other memory would wait for the device."""
    block = torch.empty(sum(target.numel() for target in targets), dtype=targets[0].dtype, pin_memory=True)
    rooms = block.split([target.numel() for target in targets])
    return [room.view(target.shape) for room, target in zip(rooms, targets, strict=True)]


def padded(values: Tensor, view: View | None) -> Tensor:
    """With ranks of zeros up to what the kernels take."""
    rank = view.last - view.first if view is not None else 0
    missing = padded_rank(rank) - rank
    if view is None or not missing:
        return values
    behind = values.ndim - 1 - (1 if "down" in view.kind else 2)  # axes after the ranks
    return F.pad(values, (*(0, 0) * behind, 0, missing))
