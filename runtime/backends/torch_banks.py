"""LoRA banks as tensors: the engine's own memory on the CPU; on CUDA a copy, of which only changed slots are copied again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from stepforge.kernels.tiles import padded_rank
from stepforge.runtime.backends import Arrays, Banks
from stepforge.runtime.backends.torch_lora import View

Tensor = Any  # torch.Tensor
Shared = dict[tuple[int, str], tuple[Any, Tensor]]  # (array, view) -> the array, which keeps its id, and its copy


def as_tensor(array: Any) -> Tensor:
    """Shares the array's memory; uint16 stands for bfloat16."""
    return (
        torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        if array.dtype == np.uint16
        else torch.from_numpy(array)
    )


class DeviceBanks:
    """The banks that a program reads, by input: whole ones, and the views that its fused layers take."""

    def __init__(
        self,
        arrays: Arrays,
        views: Iterable[View],
        whole: Iterable[str],
        *,
        device: Any,
        dtype: Any,
        shared: Shared,
        copied: bool,
    ) -> None:
        self._sources: dict[str, tuple[Tensor, View | None]] = {n: (as_tensor(arrays[n]), None) for n in whole}
        self._sources |= {view.name: (as_tensor(arrays[view.bank]), view) for view in views}
        self._versions = arrays.versions if isinstance(arrays, Banks) else None
        self._seen: Any = None
        self.tensors: dict[str, Tensor] = {}
        self._copied = copied
        for name, (source, view) in self._sources.items():
            seen = view.of(source) if view is not None else source
            if not self._copied:
                self.tensors[name] = seen
                continue
            array = arrays[name if view is None else view.bank]
            key = id(array), name
            if key not in shared:
                shared[key] = array, padded(seen, view).to(device=device, dtype=dtype)
            self.tensors[name] = shared[key][1]

    def refresh(self) -> None:
        """Copy the slots that were filled since the last call; all of them if the banks do not say."""
        if not self._copied or not self._sources:
            return
        slots = next(iter(self.tensors.values())).shape[0]
        changed = list(range(slots))
        if self._versions is not None:
            now = np.array(self._versions)
            changed = np.flatnonzero(now != self._seen).tolist() if self._seen is not None else changed
            self._seen = now
        for slot in changed:
            for name, (source, view) in self._sources.items():
                one = source[slot : slot + 1]
                self.tensors[name][slot : slot + 1].copy_(padded(view.of(one) if view is not None else one, view))


def padded(values: Tensor, view: View | None) -> Tensor:
    """Contiguous, with ranks of zeros up to what the kernels take."""
    if view is None:
        return values.contiguous()
    rank = view.last - view.first
    missing = padded_rank(rank) - rank
    if not missing:
        return values.contiguous()
    behind = values.ndim - 1 - (1 if "down" in view.kind else 2)  # axes after the ranks
    return F.pad(values, (*(0, 0) * behind, 0, missing))
