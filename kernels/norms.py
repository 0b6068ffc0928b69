"""Launcher of group normalisation: both memory formats, three launches, results that repeat to the bit."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]

from stepforge.kernels import norm_body
from stepforge.kernels.launch import Tensor, check_floats, check_packed, check_shape, empty_out, require

PROGRAMS = 512  # parts to aim for: two for each multiprocessor of the largest GPU known
MERGE = 1024  # parts merged at once


def splits_of(work: int, others: int, block: int) -> int:
    """Into how many programs to divide `work` elements of which `others` sets exist; each gets one block at least."""
    return max(1, min(-(-work // block), -(-PROGRAMS // max(others, 1))))


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, *,
    scale: Tensor | None = None, shift: Tensor | None = None, silu: bool = True,
    block: int = 4096, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """Shapes as in `reference.group_norm_silu`; the result has x's memory format. block: elements a program loads."""
    require(x.ndim == 4, f"x has shape {tuple(x.shape)}; it must be [B, C, H, W]")
    batch, channels, height, width = x.shape
    require(groups > 0 and channels % groups == 0, f"{channels} channels do not divide into {groups} groups")
    require((scale is None) == (shift is None), "scale and shift come together")
    check_floats(x=x, weight=weight, bias=bias, scale=scale, shift=shift)
    check_shape("weight", weight, (channels,))
    check_shape("bias", bias, (channels,))
    if scale is not None and shift is not None:
        check_shape("scale", scale, (batch, channels))
        check_shape("shift", shift, (batch, channels))
    check_packed(weight=weight, bias=bias, scale=scale, shift=shift)
    pixels, lanes = height * width, channels // groups
    nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    require(nhwc or x.is_contiguous(), "x must be contiguous, as NCHW or channels last")
    out = torch.empty_like(x, dtype=empty_out(x, ()).dtype)
    if not x.numel():
        return out.to(x.dtype)
    stats = torch.empty(batch, groups, 2, device=x.device, dtype=torch.float32)
    fused = {"SCALE": scale is not None, "SILU": silu, "enable_fp_fusion": True}
    affine = (weight, bias, scale if scale is not None else weight, shift if shift is not None else bias)
    if nhwc:
        block_c = min(64, triton.next_power_of_2(channels))
        block_p = max(1, block // block_c)
        columns = triton.cdiv(channels, block_c)
        count = splits or splits_of(pixels, batch * columns, block_p)
        span = triton.cdiv(pixels, count)
        parts = torch.empty(batch, count, channels, 3, device=x.device, dtype=torch.float32)
        norm_body.parts_nhwc[(count, columns, batch)](
            x, parts, pixels, channels, span, BLOCK_P=block_p, BLOCK_C=block_c, enable_fp_fusion=True
        )
        norm_body.merge_parts[(groups, batch)](parts, stats, count, lanes, eps, BLOCK=MERGE, enable_fp_fusion=True)
        norm_body.apply_nhwc[(triton.cdiv(pixels, block_p), columns, batch)](
            x, stats, *affine, out, pixels, channels, groups, lanes, BLOCK_P=block_p, BLOCK_C=block_c, **fused
        )
    else:
        size = pixels * lanes
        count = splits or splits_of(size, batch * groups, block)
        span = triton.cdiv(size, count)
        parts = torch.empty(batch, count, groups, 3, device=x.device, dtype=torch.float32)
        norm_body.parts_nchw[(count, groups, batch)](x, parts, size, span, BLOCK=block, enable_fp_fusion=True)
        norm_body.merge_parts[(groups, batch)](parts, stats, count, 1, eps, BLOCK=MERGE, enable_fp_fusion=True)
        norm_body.apply_nchw[(triton.cdiv(pixels, block), channels, batch)](
            x, stats, *affine, out, pixels, channels, groups, lanes, BLOCK=block, **fused
        )
    return out.to(x.dtype)
