"""What every launcher shares: whether the bodies run in Triton's interpreter, and the checks of shapes and types."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set when triton was first imported: its own library of device functions tells. Triton
    is imported by the bodies alone, so that the operators work on a CPU without it."""
    import triton  # type: ignore[import-untyped]
    import triton.language as tl

    return not isinstance(tl.sigmoid, triton.JITFunction)


def upcast(dtype: Any) -> bool:
    """bf16 in the interpreter (triton 3.7 and 3.9): products of raw bit patterns, conversions that truncate. The bodies then
    compute on fp32 values of bf16 numbers, and the launcher converts the result."""
    return interpreted() and dtype == torch.bfloat16


def empty_out(like: Tensor, shape: Iterable[int]) -> Tensor:
    """An output in `like`'s type, or fp32 where the interpreter cannot write that type."""
    return torch.empty(tuple(shape), device=like.device, dtype=torch.float32 if upcast(like.dtype) else like.dtype)


def options(tile: Any) -> dict[str, Any]:
    # triton 3.10 turns fusion of multiply and add off by default: say it
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_floats(**tensors: Tensor) -> None:
    """All of one supported type; those that are None are skipped."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    kinds = {tensor.dtype for tensor in given.values()}
    if len(kinds) != 1 or not kinds <= set(FLOATS):
        types = ", ".join(f"{name} {tensor.dtype}" for name, tensor in given.items())
        raise ValueError(f"kernels take one of {', '.join(map(str, FLOATS))} for all of their tensors, got {types}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    require(tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}; it must be {shape}")


def check_packed(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        require(tensor is None or tensor.is_contiguous(), f"{name} must be contiguous")


def check_halves(w: Tensor, a: Tensor) -> None:
    """What GEGLU asks of its up-projection besides: two halves of w, and one A for both."""
    require(w.shape[0] % 2 == 0, f"w has {w.shape[0]} rows; values and gates need an even number")
    require(a.shape[1] == 1, f"a has {a.shape[1]} slices; values and gates share one")


def check_rows(name: str, tensor: Tensor) -> None:
    """A matrix whose rows may lie apart but whose elements may not."""
    require(tensor.ndim == 2 and (tensor.shape[1] <= 1 or tensor.stride(1) == 1), f"rows of {name} must be contiguous")


def check_linear(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor,
    table: Tensor | None, bias: Tensor | None, residual: Tensor | None,
) -> int:  # fmt: skip
    """Refuse what no path computes; returns R."""
    require(x.ndim == 2, f"x has shape {tuple(x.shape)}; flatten it to [M, K]")
    require(a.ndim == 4 and b.ndim == 3, "a must be [L, P, R, K] and b [L, N, R]")
    rows, depth = x.shape
    adapters, slices, rank, _ = a.shape
    width = w.shape[0]
    check_floats(x=x, w=w, a=a, b=b, bias=bias, residual=residual)
    check_rows("x", x)
    check_shape("w", w, (width, depth))
    check_shape("a", a, (adapters, slices, rank, depth))
    check_shape("b", b, (adapters, width, rank))
    check_bank(scale, ranks, table, adapters, slices, rank)
    require(width % slices == 0, f"{width} columns do not divide into {slices} slices")
    if bias is not None:
        check_shape("bias", bias, (width,))
    if residual is not None:
        check_rows("residual", residual)
        check_shape("residual", residual, (rows, width))
    check_packed(w=w, a=a, b=b, bias=bias)
    return int(rank)


def check_bank(scale: Tensor, ranks: Tensor, table: Any, adapters: int, slices: int, rank: int) -> None:
    require(rank >= 16 and rank & (rank - 1) == 0, f"R is {rank}; pack adapters to a power of two from 16")
    check_shape("scale", scale, (adapters, slices, rank // 16))
    check_shape("ranks", ranks, (adapters,))
    require(scale.dtype == torch.float32 and ranks.dtype == torch.int32, "scale must be float32 and ranks int32")
    check_packed(scale=scale, ranks=ranks, table=table)
    if table is not None:
        require(table.dtype == torch.int32 and table.shape[1:] == (3,), "table must be int32 [T, 3]")
