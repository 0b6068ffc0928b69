"""Group normalisation with SiLU of a sum, channels last.

    v = [x + residual | other] + shift,   y = silu((v − mean) · rstd · weight + bias),   mean and rstd over a group of channels

The sum is what convolutions leave open: bias, time embedding, residual, and the second source of a concatenation. It is
written once, plus `extra`, if others read it too (that of x, where there are two sources). Two launches: `stats` makes
(mean, M2 = Σ (v − mean)²) of parts of each group, `apply` merges the parts of its groups itself; images of a few pixels
take one launch, `whole`. Differences are taken from a pixel's own value before they are squared, and parts are merged by
Chan, Golub and LeVeque (1979), so that a mean of 1000 standard deviations costs no accuracy, as E[v²] − E[v]² would. Each
part has one writer and parts merge in a fixed order, so runs repeat to the bit.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, import-untyped"
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepforge.kernels.dispatch.tiles import WHOLE_NORM
from stepforge.kernels.launch import check_floats, check_shape, empty_out, require, upcast

PROGRAMS = 512  # parts to aim for: two for each multiprocessor of the largest GPU known
MOST_PARTS = 16  # parts of a group, all of which every program of `apply` reads
COLUMNS = 256  # most columns of a tile


@triton.jit
def silu(y):
    return y / (1.0 + tl.exp(-y))


@triton.jit
def columns_of(block, C, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels of a block of whole groups, side by side so that 16 bytes load at a time, and which of them exist."""
    j = tl.arange(0, BLOCK_C)
    cs = block * WIDTH + j
    return cs, (j < WIDTH) & (cs < C)


@triton.jit
def belongs(LANES: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_C, GROUPS]: whether a column of a block is of a group."""
    return (tl.arange(0, BLOCK_C) // LANES)[:, None] == tl.arange(0, GROUPS)[None, :]


@triton.jit
def of_groups(columns, LANES: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums of columns [BLOCK_C] over each group [GROUPS]."""
    return tl.sum(tl.where(belongs(LANES, GROUPS, BLOCK_C), columns[:, None], 0.0), axis=0)


@triton.jit
def of_columns(groups, LANES: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The value of its group [GROUPS] for each column [BLOCK_C]."""
    return tl.sum(tl.where(belongs(LANES, GROUPS, BLOCK_C), groups[None, :], 0.0), axis=1)


@triton.jit
def sum_of(
    x, other, residual, shift, extra, row, image, cs, ok, split_at, stride_x, stride_other, stride_residual, stride_shift,
    TWO: tl.constexpr, RESIDUAL: tl.constexpr, SHIFT: tl.constexpr, WRITTEN: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """A tile of v in fp32; row [P, 1] counts the pixels of all images, cs [J] channels, ok [P, J]. WRITTEN: x is the written
    sum, with `extra` in it."""
    near = row.to(tl.int64)
    low = ok
    high = ok
    if TWO:
        low = ok & (cs < split_at)[None, :]
        high = ok & (cs >= split_at)[None, :]
    v = tl.load(x + near * stride_x + cs[None, :], mask=low, other=0.0).to(tl.float32)
    if TWO:
        v += tl.load(other + near * stride_other + (cs - split_at)[None, :], mask=high, other=0.0).to(tl.float32)
    if WRITTEN:
        if EXTRA:
            v -= tl.load(extra + cs[None, :], mask=low, other=0.0).to(tl.float32)
        if TWO and SHIFT:
            far = shift + image.to(tl.int64) * stride_shift + cs[None, :]
            v += tl.load(far, mask=high, other=0.0).to(tl.float32)
    else:
        if SHIFT:
            far = shift + image.to(tl.int64) * stride_shift + cs[None, :]
            v += tl.load(far, mask=ok, other=0.0).to(tl.float32)
        if RESIDUAL:
            v += tl.load(residual + near * stride_residual + cs[None, :], mask=low, other=0.0).to(tl.float32)
    return v


@triton.jit
def write_sum(v, total, extra, row, cs, ok, split_at, EXTRA: tl.constexpr):
    low = ok & (cs < split_at)[None, :]
    if EXTRA:
        v += tl.load(extra + cs[None, :], mask=low, other=0.0).to(tl.float32)
    tl.store(total + row.to(tl.int64) * split_at + cs[None, :], v.to(total.dtype.element_ty), mask=low)


@triton.jit
def normalised(v, mean, rstd, weight, bias, cs, c_ok, SILU: tl.constexpr):
    """mean, rstd [BLOCK_C]"""
    factor = rstd * tl.load(weight + cs, mask=c_ok, other=0.0).to(tl.float32)
    y = (v - mean[None, :]) * factor[None, :] + tl.load(bias + cs, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    if SILU:
        y = silu(y)
    return y


@triton.jit(do_not_specialize=["span", "pixels"])
def stats_kernel(
    x, other, residual, shift, extra, total, parts,
    pixels, split_at, C, groups, span, stride_x, stride_other, stride_residual, stride_shift,
    BLOCK_P: tl.constexpr, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, GROUPS: tl.constexpr,
    LANES: tl.constexpr, TWO: tl.constexpr, RESIDUAL: tl.constexpr,
    SHIFT: tl.constexpr, SUM: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """parts [B, splits, G, 2] = (mean, M2): a program takes `span` pixels of GROUPS groups. SUM: writes v + extra."""
    split = tl.program_id(0)
    image = tl.program_id(2)
    cs, c_ok = columns_of(tl.program_id(1), C, WIDTH, BLOCK_C)
    end = tl.minimum(pixels, split * span + span)
    # differences from the first pixel, so that a large mean costs no accuracy; nothing crosses threads inside the loop
    start = split * span + tl.zeros([1, 1], dtype=tl.int32)
    pivot = sum_of(x, other, residual, shift, extra, image * pixels + start, image, cs, c_ok[None, :] & (start < pixels),
                   split_at, stride_x, stride_other, stride_residual, stride_shift, TWO, RESIDUAL, SHIFT,
                   False, False)  # fmt: skip
    sums = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for p in range(split * span, end, BLOCK_P):
        ps = p + tl.arange(0, BLOCK_P)
        ok = (ps < end)[:, None] & c_ok[None, :]
        row = image * pixels + ps[:, None]
        v = sum_of(x, other, residual, shift, extra, row, image, cs, ok, split_at,
                   stride_x, stride_other, stride_residual, stride_shift, TWO, RESIDUAL, SHIFT, False, False)  # fmt: skip
        if SUM:
            write_sum(v, total, extra, row, cs, ok, split_at, EXTRA)
        apart = tl.where(ok, v - pivot, 0.0)
        sums += apart
        squares += apart * apart
    count = tl.maximum(end - split * span, 1).to(tl.float32)
    away = tl.sum(sums, axis=0) / count
    own = tl.sum(squares, axis=0) - count * away * away
    means = away + tl.sum(pivot, axis=0)
    mean = of_groups(tl.where(c_ok, means, 0.0), LANES, GROUPS, BLOCK_C) / LANES
    apart = tl.where(c_ok, means - of_columns(mean, LANES, GROUPS, BLOCK_C), 0.0)
    m2 = of_groups(tl.where(c_ok, own, 0.0) + count * apart * apart, LANES, GROUPS, BLOCK_C)
    g = tl.arange(0, GROUPS)
    gs = tl.program_id(1) * (WIDTH // LANES) + g
    g_ok = (g < WIDTH // LANES) & (gs < groups)
    place = parts + ((image * tl.num_programs(0) + split) * groups + gs) * 2
    tl.store(place, mean, mask=g_ok)
    tl.store(place + 1, m2, mask=g_ok)


@triton.jit(do_not_specialize=["span", "pixels", "splits", "eps"])
def apply_kernel(
    x, other, residual, shift, extra, parts, weight, bias, out,
    pixels, split_at, C, groups, span, splits, stride_x, stride_other, stride_residual, stride_shift, stride_out, eps,
    SPLITS: tl.constexpr, BLOCK_P: tl.constexpr, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, GROUPS: tl.constexpr,
    LANES: tl.constexpr, TWO: tl.constexpr,
    RESIDUAL: tl.constexpr, SHIFT: tl.constexpr, WRITTEN: tl.constexpr, EXTRA: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y, of the sources again or (WRITTEN) of the sum that `stats` wrote, which is then x."""
    image = tl.program_id(2)
    cs, c_ok = columns_of(tl.program_id(1), C, WIDTH, BLOCK_C)
    g = tl.arange(0, GROUPS)
    gs = tl.program_id(1) * (WIDTH // LANES) + g
    g_ok = (g < WIDTH // LANES) & (gs < groups)
    ss = tl.arange(0, SPLITS)
    there = (ss < splits)[:, None] & g_ok[None, :]
    place = parts + ((image * splits + ss[:, None]) * groups + gs[None, :]) * 2
    means = tl.load(place, mask=there, other=0.0)
    squares = tl.load(place + 1, mask=there, other=0.0)
    counts = tl.maximum(tl.minimum(pixels - ss * span, span), 0) * LANES
    counts = tl.where(there, counts.to(tl.float32)[:, None], 0.0)
    every = (pixels * LANES).to(tl.float32)
    # about one of the means, not about 0: their sum would round at the size of a large mean
    near = tl.load(parts + (image * splits * groups + gs) * 2, mask=g_ok, other=0.0)
    mean = near + tl.sum(counts * (means - near[None, :]), axis=0) / every
    apart = means - mean[None, :]
    m2 = tl.sum(squares + counts * apart * apart, axis=0)
    rstd = of_columns(1.0 / tl.sqrt_rn(m2 / every + eps), LANES, GROUPS, BLOCK_C)
    mean = of_columns(mean, LANES, GROUPS, BLOCK_C)
    ps = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    ok = (ps < pixels)[:, None] & c_ok[None, :]
    row = image * pixels + ps[:, None]
    v = sum_of(x, other, residual, shift, extra, row, image, cs, ok, split_at,
               stride_x, stride_other, stride_residual, stride_shift, TWO, RESIDUAL, SHIFT, WRITTEN, EXTRA)  # fmt: skip
    y = normalised(v, mean, rstd, weight, bias, cs, c_ok, SILU)
    tl.store(out + row.to(tl.int64) * stride_out + cs[None, :], y.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["pixels", "eps"])
def whole_kernel(
    x, other, residual, shift, extra, total, weight, bias, out,
    pixels, split_at, C, stride_x, stride_other, stride_residual, stride_shift, stride_out, eps,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr, TWO: tl.constexpr, RESIDUAL: tl.constexpr,
    SHIFT: tl.constexpr, SUM: tl.constexpr, EXTRA: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One group of one image, whole: BLOCK_P is at least the number of pixels."""
    image = tl.program_id(1)
    cs, c_ok = columns_of(tl.program_id(0), C, LANES, BLOCK_C)
    ps = tl.arange(0, BLOCK_P)
    ok = (ps < pixels)[:, None] & c_ok[None, :]
    row = image * pixels + ps[:, None]
    v = sum_of(x, other, residual, shift, extra, row, image, cs, ok, split_at,
               stride_x, stride_other, stride_residual, stride_shift, TWO, RESIDUAL, SHIFT, False, False)  # fmt: skip
    if SUM:
        write_sum(v, total, extra, row, cs, ok, split_at, EXTRA)
    every = (pixels * LANES).to(tl.float32)
    mean = tl.sum(tl.sum(tl.where(ok, v, 0.0), axis=0), axis=0) / every
    apart = tl.where(ok, v - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(tl.sum(apart * apart, axis=0), axis=0) / every + eps)
    same = tl.zeros([BLOCK_C], dtype=tl.float32)
    y = normalised(v, same + mean, same + rstd, weight, bias, cs, c_ok, SILU)
    tl.store(out + row.to(tl.int64) * stride_out + cs[None, :], y.to(out.dtype.element_ty), mask=ok)


def is_blackwell(x: Tensor) -> bool:
    """sm_100, where `stats` spilled 8 bytes with 4 warps (triton 3.7.1)."""
    return bool(x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 10)


@functools.cache
def groups_of_block(groups: int, lanes: int) -> tuple[int, int]:
    """Whole groups of a program's columns and the power of two that holds them: the fewest columns in all, those first whose
    blocks start at multiples of 16 bytes."""

    def rank(per: int) -> tuple[bool, bool, int, int]:
        block = triton.next_power_of_2(per * lanes)
        return per < groups and per * lanes % 8 != 0, block < min(64, groups * lanes), -(-groups // per) * block, block

    found = [per for per in range(1, groups + 1) if per * lanes <= COLUMNS] or [1]
    per = min(found, key=rank)
    return per, triton.next_power_of_2(per * lanes)


def pixel_rows(name: str, image: Tensor) -> int:
    """Elements from pixel to pixel of an image [B, C, H, W] in channels last, whose pixels may lie apart."""
    batch, channels, height, width = image.shape
    stride = image.stride(3) if width > 1 else image.stride(2) if height > 1 else image.stride(0)
    if batch * height * width <= 1:
        stride = channels
    fits = channels == 1 or image.stride(1) == 1
    fits &= width == 1 or image.stride(3) == stride
    fits &= height == 1 or image.stride(2) == width * stride
    fits &= batch == 1 or image.stride(0) == height * width * stride
    require(fits, f"{name} must be in channels last")
    return int(stride)


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *,
    silu: bool = True, other: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None,
    extra: Tensor | None = None, keep: bool = False, out: Tensor | None = None, block: int = 4096, splits: int | None = None,
    whole: int = WHOLE_NORM,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """y and, with keep, v + extra; shapes as in `reference.group_norm`. out: y's memory, whose pixels may lie apart. block:
    elements a program loads at a time."""
    require(x.ndim == 4, f"x has shape {tuple(x.shape)}; it must be [B, C, H, W]")
    batch, first, height, width = x.shape
    channels = first + (other.shape[1] if other is not None else 0)
    require(groups > 0 and channels % groups == 0, f"{channels} channels do not divide into {groups} groups")
    require(extra is None or keep, "extra is added to the sum that keep asks for")
    check_floats(x=x, weight=weight, bias=bias, other=other, residual=residual, shift=shift, extra=extra)
    check_shape("weight", weight, (channels,))
    check_shape("bias", bias, (channels,))
    if extra is not None:
        check_shape("extra", extra, (first,))
    stride_shift = 0
    if shift is not None:
        require(shift.ndim == 2 and shift.shape[0] in (1, batch), f"shift must be [1 or {batch}, {channels}]")
        check_shape("shift", shift, (shift.shape[0], channels))
        require(shift.stride(1) == 1, "rows of shift must be contiguous")
        stride_shift = shift.stride(0) if shift.shape[0] > 1 else 0
    if residual is not None:
        check_shape("residual", residual, (batch, first, height, width))
    if other is not None:
        check_shape("other", other, (batch, channels - first, height, width))
    pixels, lanes = height * width, channels // groups
    kind = empty_out(x, ()).dtype
    shape = (batch, channels, height, width)
    if out is not None:
        check_shape("out", out, shape)
    into = out if out is not None and out.dtype == kind else None
    if into is None:
        into = torch.empty(shape, device=x.device, dtype=kind, memory_format=torch.channels_last)
    stride_out = pixel_rows("out", into)
    total = torch.empty((batch, first, height, width), device=x.device, dtype=kind, memory_format=torch.channels_last)
    total = total if keep else None
    if not into.numel():
        return into.to(x.dtype), total.to(x.dtype) if total is not None else None
    lanes2 = triton.next_power_of_2(lanes)
    strides = (
        pixel_rows("x", x), pixel_rows("other", other) if other is not None else 0,
        pixel_rows("residual", residual) if residual is not None else 0, stride_shift,
    )  # fmt: skip
    sources = (x, other if other is not None else x, residual if residual is not None else x,
               shift if shift is not None else weight)  # fmt: skip
    flags = {"TWO": other is not None, "RESIDUAL": residual is not None, "SHIFT": shift is not None}
    kept = {"SUM": keep, "EXTRA": extra is not None}
    more = (extra if extra is not None else weight, total if total is not None else into)
    pow2 = triton.next_power_of_2(pixels)
    if pow2 * lanes2 <= whole:
        whole_kernel[(groups, batch)](
            *sources, *more, weight, bias, into, pixels, first, channels, *strides, stride_out, eps,
            BLOCK_P=pow2, BLOCK_C=lanes2, LANES=lanes, **flags, **kept, SILU=silu, enable_fp_fusion=True,
            num_warps=8 if pow2 * lanes2 > 4096 else 4,
        )  # fmt: skip
    else:
        per, block_c = groups_of_block(groups, lanes)
        block_p = max(1, block // block_c)
        columns = triton.cdiv(groups, per)
        wanted = splits or min(-(-pixels // block_p), -(-PROGRAMS // (batch * columns)), MOST_PARTS)
        span = triton.cdiv(pixels, max(1, wanted))
        count = triton.cdiv(pixels, span)
        parts = torch.empty(batch, count, groups, 2, device=x.device, dtype=torch.float32)
        tile = {"WIDTH": per * lanes, "BLOCK_C": block_c, "GROUPS": triton.next_power_of_2(per), "LANES": lanes}
        tile["enable_fp_fusion"] = True
        stats_kernel[(count, columns, batch)](
            *sources, *more, parts, pixels, first, channels, groups, span, *strides,
            BLOCK_P=block_p, **tile, **flags, **kept, num_warps=8 if is_blackwell(x) else 4,
        )  # fmt: skip
        # in the interpreter bf16 is held in fp32, and the sum is not rounded yet
        written = total is not None and not upcast(x.dtype)
        if written:
            sources, strides = (total, *sources[1:]), (first, *strides[1:])
        apply_kernel[(triton.cdiv(pixels, block_p), columns, batch)](
            *sources, more[0], parts, weight, bias, into, pixels, first, channels, groups, span, count, *strides, stride_out,
            eps,
            SPLITS=triton.next_power_of_2(count), BLOCK_P=block_p, **tile, **flags, WRITTEN=written,
            EXTRA=extra is not None, SILU=silu,
        )  # fmt: skip
    y = into.to(x.dtype) if out is None else out if into is out else out.copy_(into)
    return y, total.to(x.dtype) if total is not None else None
