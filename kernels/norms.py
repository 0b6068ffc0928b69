"""Triton bodies of group normalisation with SiLU.

    y = silu(((x − mean) · rstd · weight + bias) · (1 + scale) + shift),   mean and rstd over a group of channels

Statistics are (count, mean, M2 = Σ (x − mean)²) in fp32, merged by Chan, Golub and LeVeque (1979): squares are taken of
differences only, so a mean of 1000 standard deviations costs no accuracy, as E[x²] − E[x]² would. Three launches: parts,
merge, apply. Each part has one writer and parts merge in a fixed order, so runs repeat to the bit.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, import-untyped"
import torch
import triton
import triton.language as tl

from stepforge.kernels.launch import Tensor, check_floats, check_packed, check_shape, empty_out, require

PROGRAMS = 512  # parts to aim for: two for each multiprocessor of the largest GPU known
MERGE = 1024  # parts merged at once


@triton.jit
def merged(n, mean, m2, n_new, mean_new, m2_new):
    """Statistics of two sets from the statistics of each; an empty second set changes nothing."""
    total = n + n_new
    share = n_new / tl.maximum(total, 1.0)
    delta = mean_new - mean
    return total, mean + delta * share, m2 + m2_new + delta * delta * n * share


@triton.jit
def silu(y):
    return y / (1.0 + tl.exp(-y))


@triton.jit(do_not_specialize=["span"])
def parts_nhwc_kernel(x, parts, pixels, C, span, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """parts [B, splits, C, 3] of x [B, pixels, C]: a program takes `span` pixels of BLOCK_C channels, one set each."""
    split = tl.program_id(0)
    image = tl.program_id(2)
    cs = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    near = x + image.to(tl.int64) * pixels * C + cs[None, :]
    n = 0.0
    mean = tl.zeros([BLOCK_C], dtype=tl.float32)
    m2 = tl.zeros([BLOCK_C], dtype=tl.float32)
    end = tl.minimum(pixels, split * span + span)
    for p in range(split * span, end, BLOCK_P):
        ps = p + tl.arange(0, BLOCK_P)
        mask = (ps < end)[:, None] & (cs < C)[None, :]
        value = tl.load(near + ps.to(tl.int64)[:, None] * C, mask=mask, other=0.0).to(tl.float32)
        count = tl.minimum(end - p, BLOCK_P).to(tl.float32)
        middle = tl.sum(value, axis=0) / count
        apart = tl.where(mask, value - middle[None, :], 0.0)
        n, mean, m2 = merged(n, mean, m2, count, middle, tl.sum(apart * apart, axis=0))
    place = parts + ((image * tl.num_programs(0) + split) * C + cs) * 3
    tl.store(place, tl.zeros([BLOCK_C], dtype=tl.float32) + n, mask=cs < C)
    tl.store(place + 1, mean, mask=cs < C)
    tl.store(place + 2, m2, mask=cs < C)


@triton.jit(do_not_specialize=["span"])
def parts_nchw_kernel(x, parts, size, span, BLOCK: tl.constexpr):
    """parts [B, splits, G, 3] of x [B, G, size]: a program takes `span` elements of one group."""
    split = tl.program_id(0)
    group = tl.program_id(1)
    image = tl.program_id(2)
    near = x + (image.to(tl.int64) * tl.num_programs(1) + group) * size
    n = 0.0
    mean = 0.0
    m2 = 0.0
    end = tl.minimum(size, split * span + span)
    for at in range(split * span, end, BLOCK):
        offs = at + tl.arange(0, BLOCK)
        value = tl.load(near + offs, mask=offs < end, other=0.0).to(tl.float32)
        count = tl.minimum(end - at, BLOCK).to(tl.float32)
        middle = tl.sum(value, axis=0) / count
        apart = tl.where(offs < end, value - middle, 0.0)
        n, mean, m2 = merged(n, mean, m2, count, middle, tl.sum(apart * apart, axis=0))
    place = parts + ((image * tl.num_programs(0) + split) * tl.num_programs(1) + group) * 3
    tl.store(place, n)
    tl.store(place + 1, mean)
    tl.store(place + 2, m2)


@triton.jit(do_not_specialize=["splits", "eps"])
def merge_parts_kernel(parts, stats, splits, lanes, eps, BLOCK: tl.constexpr):
    """stats [B, G, 2] = (mean, 1/sqrt(var + eps)) of parts [B, splits, G·lanes, 3]."""
    group = tl.program_id(0)
    image = tl.program_id(1)
    groups = tl.num_programs(0)
    n = 0.0
    mean = 0.0
    m2 = 0.0
    for at in range(0, splits * lanes, BLOCK):
        offs = at + tl.arange(0, BLOCK)
        mask = offs < splits * lanes
        place = parts + ((image * splits + offs // lanes) * groups * lanes + group * lanes + offs % lanes) * 3
        counts = tl.load(place, mask=mask, other=0.0)
        means = tl.load(place + 1, mask=mask, other=0.0)
        squares = tl.load(place + 2, mask=mask, other=0.0)
        total = tl.maximum(tl.sum(counts, axis=0), 1.0)
        # about one of the means, not about 0: their sum would round at the size of a large mean
        near = tl.load(parts + (image * splits * groups * lanes + group * lanes) * 3 + 1)
        middle = near + tl.sum(tl.where(mask, counts * (means - near), 0.0), axis=0) / total
        apart = tl.where(mask, means - middle, 0.0)
        m2_new = tl.sum(squares + counts * apart * apart, axis=0)
        n, mean, m2 = merged(n, mean, m2, tl.sum(counts, axis=0), middle, m2_new)
    tl.store(stats + (image * groups + group) * 2, mean)
    tl.store(stats + (image * groups + group) * 2 + 1, 1.0 / tl.sqrt_rn(m2 / tl.maximum(n, 1.0) + eps))


@triton.jit
def apply_nhwc_kernel(
    x, stats, weight, bias, scale, shift, out,
    pixels, C, groups, lanes,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, SCALE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """x, out [B, pixels, C]; weight, bias [C]; scale, shift [B, C]."""
    image = tl.program_id(2)
    ps = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    cs = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = cs < C
    place = stats + (image * groups + cs // lanes) * 2
    mean = tl.load(place, mask=c_ok, other=0.0)
    factor = tl.load(place + 1, mask=c_ok, other=0.0) * tl.load(weight + cs, mask=c_ok, other=0.0).to(tl.float32)
    add = tl.load(bias + cs, mask=c_ok, other=0.0).to(tl.float32)
    if SCALE:
        grow = 1.0 + tl.load(scale + image * C + cs, mask=c_ok, other=0.0).to(tl.float32)
        factor = factor * grow
        add = add * grow + tl.load(shift + image * C + cs, mask=c_ok, other=0.0).to(tl.float32)
    offs = ps.to(tl.int64)[:, None] * C + cs[None, :]  # 2^31 elements of one image: 4096² pixels of 128 channels
    mask = (ps < pixels)[:, None] & c_ok[None, :]
    base = image.to(tl.int64) * pixels * C
    value = tl.load(x + base + offs, mask=mask, other=0.0).to(tl.float32)
    y = (value - mean[None, :]) * factor[None, :] + add[None, :]
    if SILU:
        y = silu(y)
    tl.store(out + base + offs, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def apply_nchw_kernel(
    x, stats, weight, bias, scale, shift, out,
    pixels, C, groups, lanes,
    BLOCK: tl.constexpr, SCALE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """x, out [B, C, pixels]; weight, bias [C]; scale, shift [B, C]."""
    image = tl.program_id(2)
    c = tl.program_id(1)
    place = stats + (image * groups + c // lanes) * 2
    mean = tl.load(place)
    factor = tl.load(place + 1) * tl.load(weight + c).to(tl.float32)
    add = tl.load(bias + c).to(tl.float32)
    if SCALE:
        grow = 1.0 + tl.load(scale + image * C + c).to(tl.float32)
        factor = factor * grow
        add = add * grow + tl.load(shift + image * C + c).to(tl.float32)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    base = (image.to(tl.int64) * C + c) * pixels
    value = tl.load(x + base + offs, mask=offs < pixels, other=0.0).to(tl.float32)
    y = (value - mean) * factor + add
    if SILU:
        y = silu(y)
    tl.store(out + base + offs, y.to(out.dtype.element_ty), mask=offs < pixels)


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
        parts_nhwc_kernel[(count, columns, batch)](
            x, parts, pixels, channels, span, BLOCK_P=block_p, BLOCK_C=block_c, enable_fp_fusion=True
        )
        merge_parts_kernel[(groups, batch)](parts, stats, count, lanes, eps, BLOCK=MERGE, enable_fp_fusion=True)
        apply_nhwc_kernel[(triton.cdiv(pixels, block_p), columns, batch)](
            x, stats, *affine, out, pixels, channels, groups, lanes, BLOCK_P=block_p, BLOCK_C=block_c, **fused
        )
    else:
        size = pixels * lanes
        count = splits or splits_of(size, batch * groups, block)
        span = triton.cdiv(size, count)
        parts = torch.empty(batch, count, groups, 3, device=x.device, dtype=torch.float32)
        parts_nchw_kernel[(count, groups, batch)](x, parts, size, span, BLOCK=block, enable_fp_fusion=True)
        merge_parts_kernel[(groups, batch)](parts, stats, count, 1, eps, BLOCK=MERGE, enable_fp_fusion=True)
        apply_nchw_kernel[(triton.cdiv(pixels, block), channels, batch)](
            x, stats, *affine, out, pixels, channels, groups, lanes, BLOCK=block, **fused
        )
    return out.to(x.dtype)
