"""What every launcher shares: whether the bodies run in Triton's interpreter, and the checks of shapes and types."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

Tensor = Any
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set when triton was first imported. Triton is imported by the bodies alone, so
    that the operators work on a CPU without it."""
    import triton  # type: ignore[import-untyped]

    from stepforge.kernels import lowrank_body

    return not isinstance(lowrank_body.onepass, triton.JITFunction)


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
