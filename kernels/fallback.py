"""The path without Triton: cuBLAS' product and `addmm` onto it. Takes every layer, and reads nothing back to the host."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def adapter_of_row(table: Tensor, rows: int) -> Tensor:
    """int32 [rows]: the adapter of each row by a table of row blocks, −1 for rows in none; no synchronisation."""
    table = table[torch.argsort(table[:, 0] * 2 + (table[:, 1] == 0))]  # empty blocks after the one that starts there
    row = torch.arange(rows, device=table.device, dtype=torch.int32)
    block = torch.searchsorted(table[:, 0].contiguous(), row, right=True) - 1
    found = table[block.clamp(min=0)]
    inside = (block >= 0) & (row < found[:, 0] + found[:, 1])
    return torch.where(inside, found[:, 2], -1)


def addmm(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, *,
    table: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Shapes as in `reference.lowrank_linear`. S and y are rounded to x's type between the products."""
    y = F.linear(x, w, bias)
    slices, rank = a.shape[1:3]
    width = w.shape[0] // slices
    owner = adapter_of_row(table, x.shape[0]) if table is not None else None
    lanes = torch.arange(rank, device=x.device)
    for adapter in range(len(a)) if owner is not None else (0,):
        live = lanes < ranks[adapter]
        for part in range(slices):
            down = torch.where(live[:, None], a[adapter, part], 0)
            up = torch.where(live, b[adapter, part * width : (part + 1) * width], 0)
            s = F.linear(x, down).float() * scale[adapter, part].repeat_interleave(16)
            if owner is not None:
                s = torch.where((owner == adapter)[:, None], s, 0)
            y[:, part * width : (part + 1) * width].addmm_(s.to(x.dtype), up.T)
    return y if residual is None else y + residual
