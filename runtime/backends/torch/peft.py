"""LoRA layers that round where PEFT rounds: after A, after B, and after the strength on the outer product.

On the CPU they make PEFT's own calls, on all rows, for each slot in use; every row takes its own slot's result. Products of
other shapes sum in another order there, depending on the processor: so do those of an adapter whose rank is below the
bank's, which stands among zeros. On CUDA, where no call can depend on the slots, the rows' products are batched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, adapter: Tensor, strength: Tensor, *,
           rank: int) -> Tensor:  # fmt: skip
    """x Wᵀ + bias + ((x·A[slot])·B[slot])·strength; x [rows, tokens, in] or [rows, in], a [slots, R, in], b [slots, out, R]."""
    y = F.linear(x, w, bias)
    if knows_slots(x.device):
        term = _by_slot(lambda down, up: F.linear(F.linear(x, down), up), a, b, adapter)
    else:
        down, up = (bank.index_select(0, adapter).transpose(1, 2) for bank in (a[:, :rank], b[..., :rank]))
        term = (x.reshape(len(x), -1, x.shape[-1]) @ down @ up).reshape(y.shape)
    return y + _scaled(term, strength)


def conv(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, adapter: Tensor, strength: Tensor, *, rank: int,
         stride: int, pad: int) -> Tensor:  # fmt: skip
    """conv(x, W) + bias + (conv(x, A[slot])·B[slot])·strength; x [rows, C, h, w], a [slots, R, k, k, C], b [slots, out, R]."""
    y = F.conv2d(x, w, bias, stride, pad)
    a, b = a.permute(0, 1, 4, 2, 3), b[..., None, None]
    if knows_slots(x.device):
        term = _by_slot(lambda down, up: F.conv2d(F.conv2d(x, down, None, stride, pad), up), a, b, adapter)
    else:  # all rows with the A of each, one convolution of rows·R channels, and then each row's own
        down, up = a[:, :rank].index_select(0, adapter), b[:, :, :rank].index_select(0, adapter)
        low = F.conv2d(x, down.flatten(0, 1), None, stride, pad).unflatten(1, (len(x), rank))
        low = low.diagonal(dim1=0, dim2=1).movedim(-1, 0)
        term = (up.flatten(2) @ low.flatten(2)).reshape(y.shape)
    return y + _scaled(term, strength)


def knows_slots(device: Any) -> bool:
    """Whether slots can be read without waiting for the device."""
    return bool(device.type == "cpu")


def _by_slot(term: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, adapter: Tensor) -> Tensor:
    slots = adapter.tolist()
    # strides as PEFT's weights have, also those of axes of size 1: they decide which path a product takes
    copy = functools.partial(torch.clone, memory_format=torch.contiguous_format)
    found = {slot: term(copy(a[slot]), copy(b[slot])) for slot in sorted(set(slots))}
    return torch.stack([found[slot][row] for row, slot in enumerate(slots)])


def _scaled(term: Tensor, strength: Tensor) -> Tensor:
    """PEFT multiplies by a Python number: in fp32, whatever the term's type, to which it then rounds."""
    factors = strength.float().reshape(-1, *[1] * (term.ndim - 1))
    return (term.float() * factors).to(term.dtype)
