"""The kernels as torch operators, stepforge::*, which torch.compile and torch.export keep as one node each.

On the CPU an operator is its reference; on CUDA the kernel that `dispatch` names. No operator has a gradient.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from stepforge.kernels import reference
from stepforge.kernels.dispatch.choose import dispatch, nearest_arch
from stepforge.kernels.dispatch.layers import Layer
from stepforge.kernels.dispatch.tiles import expand_tile, onepass_tile
from stepforge.kernels.launch import FLOATS, check_halves, check_linear, require


@functools.cache
def arch_of(device: Any) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return nearest_arch(10 * major + minor)


def on_cpu(tensor: Tensor) -> bool:
    """Where an operator is its reference; tests say otherwise and have the kernels interpreted."""
    return bool(tensor.device.type == "cpu")


def adjacent(matrix: Tensor) -> Tensor:
    """The matrix, or a copy whose rows have their elements side by side (a transposed view of tokens has not)."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def aligned(x: Tensor, w: Tensor) -> bool:
    """Whether the kernels can load 16 bytes at a time."""
    return bool(x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 and w.data_ptr() % 16 == 0)


def run_linear(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, *,
    arch: int, table: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None, block_m: int = 0,
) -> Tensor:  # fmt: skip
    """The layer on the path that `dispatch` names for `arch`; addmm for fp32, which the tensor cores would round to tf32."""
    from stepforge.kernels import fallback, lowrank

    x, residual = adjacent(x), adjacent(residual) if residual is not None else None
    rank = check_linear(x, w, a, b, scale, ranks, table, bias, residual)
    require(table is None or block_m > 0, "a table of row blocks comes with its block_m")
    extra: dict[str, Any] = {"table": table, "bias": bias, "residual": residual}
    layer = Layer("", x.shape[0], x.shape[1], w.shape[0], slices=a.shape[1])
    choice = dispatch(layer, rank, arch, grouped=table is not None, block_m=block_m or None)
    if choice.path == "addmm" or x.dtype == torch.float32 or not aligned(x, w):
        return fallback.addmm(x, w, a, b, scale, ranks, **extra)
    if choice.path == "onepass":
        tile = onepass_tile(arch, rank, choice.block_m)
        return lowrank.onepass(x, w, a, b, scale, ranks, tile=tile, nt=choice.nt, **extra)
    tile = expand_tile(arch, choice.block_m)
    return lowrank.split(x, w, a, b, scale, ranks, tile=tile, parts=choice.parts, **extra)


@custom_op("stepforge::lowrank_linear", mutates_args=())
def _lowrank_linear(
    x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, ranks: torch.Tensor,
    table: torch.Tensor | None, bias: torch.Tensor | None, residual: torch.Tensor | None, block_m: int,
) -> torch.Tensor:  # fmt: skip
    if on_cpu(x):
        return reference.lowrank_linear(x, w, a, b, scale, ranks, table, bias, residual)
    return run_linear(
        x, w, a, b, scale, ranks, arch=arch_of(x.device), table=table, bias=bias, residual=residual,
        block_m=block_m,
    )  # fmt: skip


@_lowrank_linear.register_fake
def _(x, w, a, b, scale, ranks, table, bias, residual, block_m):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], w.shape[0])


def lowrank_linear(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, *,
    table: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None,
    block_m: int = 0,
) -> Tensor:  # fmt: skip
    """y = x Wᵀ + (scale ⊙ x Aᵀ) Bᵀ + bias + residual.

    x [..., K] and residual [..., N]; the others as in `reference.lowrank_linear` and as `pack` makes them. table: the
    row blocks of `packing.block_table` for block_m rows. Returns [..., N]. ValueError for shapes that do not fit.
    """
    flat = x.reshape(-1, x.shape[-1])
    over = residual.reshape(-1, residual.shape[-1]) if residual is not None else None
    y = _lowrank_linear(flat, w, a, b, scale, ranks, table, bias, over, block_m)
    return y.reshape(*x.shape[:-1], w.shape[0])


def run_geglu(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, *,
    arch: int, table: Tensor | None = None, bias: Tensor | None = None, block_m: int = 0,
) -> Tensor:  # fmt: skip
    """GEGLU in the layer's epilogue where `dispatch` says so, else after the layer on its own path."""
    from stepforge.kernels import gated

    x = adjacent(x)
    rank = gated.check_geglu(x, w, a, b, scale, ranks, table, bias)
    require(table is None or block_m > 0, "a table of row blocks comes with its block_m")
    layer = Layer("", x.shape[0], x.shape[1], w.shape[0], gated=True)
    choice = dispatch(layer, rank, arch, grouped=table is not None, block_m=block_m or None)
    if choice.path != "gated" or x.dtype == torch.float32 or not aligned(x, w):
        h = run_linear(x, w, a, b, scale, ranks, arch=arch, table=table, bias=bias, block_m=block_m)
        return gated.geglu(h)
    tile = expand_tile(arch, choice.block_m)
    return gated.lowrank_geglu(x, w, a, b, scale, ranks, tile=tile, parts=choice.parts, table=table, bias=bias)


@custom_op("stepforge::lowrank_geglu", mutates_args=())
def _lowrank_geglu(
    x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, ranks: torch.Tensor,
    table: torch.Tensor | None, bias: torch.Tensor | None, block_m: int,
) -> torch.Tensor:  # fmt: skip
    if on_cpu(x):
        return reference.lowrank_geglu(x, w, a, b, scale, ranks, table, bias)
    return run_geglu(x, w, a, b, scale, ranks, arch=arch_of(x.device), table=table, bias=bias, block_m=block_m)


@_lowrank_geglu.register_fake
def _(x, w, a, b, scale, ranks, table, bias, block_m):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], w.shape[0] // 2)


def lowrank_geglu(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, *,
    table: Tensor | None = None, bias: Tensor | None = None, block_m: int = 0,
) -> Tensor:  # fmt: skip
    """y = v · gelu(g), [v | g] = x Wᵀ + (scale ⊙ x Aᵀ) Bᵀ + bias: the feed-forward's up-projection with its GEGLU.

    x [..., K]; the others as in `reference.lowrank_geglu`, table and block_m as in `lowrank_linear`. Returns [..., N].
    ValueError for shapes that do not fit.
    """
    check_halves(w, a)
    y = _lowrank_geglu(x.reshape(-1, x.shape[-1]), w, a, b, scale, ranks, table, bias, block_m)
    return y.reshape(*x.shape[:-1], w.shape[0] // 2)


@custom_op("stepforge::lowrank_conv", mutates_args=())
def _lowrank_conv(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: torch.Tensor,
    ranks: torch.Tensor,
    table: torch.Tensor | None,
    stride: int,
    pad: int,
    block_m: int,
) -> torch.Tensor:
    if on_cpu(y):
        return reference.lowrank_conv(y, x, a, b, scale, ranks, table, stride, pad)
    from stepforge.kernels import conv

    tile = expand_tile(arch_of(y.device), block_m or 64)
    return conv.lowrank_conv(y, x, a, b, scale, ranks, tile=tile, table=table, stride=stride, pad=pad)


@_lowrank_conv.register_fake
def _(y, x, a, b, scale, ranks, table, stride, pad, block_m):  # type: ignore[no-untyped-def]
    return torch.empty_like(y, memory_format=torch.contiguous_format)


def lowrank_conv(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: Tensor, ranks: Tensor, *,
    table: Tensor | None = None, stride: int = 1, pad: int = 1, block_m: int = 0,
) -> Tensor:  # fmt: skip
    """y + (scale ⊙ conv(x, A)) Bᵀ for y [B, N, H', W'], x [B, C, H, W] of either memory format; y's shape, channels last."""
    rows = y.permute(0, 2, 3, 1).contiguous()
    pixels = x.permute(0, 2, 3, 1).contiguous()
    return _lowrank_conv(rows, pixels, a, b, scale, ranks, table, stride, pad, block_m).permute(0, 3, 1, 2)


def images(x: Tensor | None) -> Tensor | None:
    """The images, or a copy, with their channels side by side."""
    return x if x is None or x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)


@custom_op("stepforge::group_norm", mutates_args=())
def _group_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool,
    other: torch.Tensor | None, shift: torch.Tensor | None, residual: torch.Tensor | None, extra: torch.Tensor | None,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    sources: dict[str, Any] = {"other": other, "shift": shift, "residual": residual, "extra": extra}
    if on_cpu(x):
        y, total = reference.group_norm(x, weight, bias, groups, eps, silu=silu, **sources)
        return y, total if keep else y.new_empty(0)
    from stepforge.kernels import norms

    sources |= {"other": images(other), "residual": images(residual)}
    y, total = norms.group_norm(images(x), weight, bias, groups, eps, silu=silu, **sources, keep=keep)
    return y, total if total is not None else y.new_empty(0)


@_group_norm.register_fake
def _(x, weight, bias, groups, eps, silu, other, shift, residual, extra, keep):  # type: ignore[no-untyped-def]
    channels = x.shape[1] + (other.shape[1] if other is not None else 0)
    y = torch.empty_like(x.new_empty(x.shape[0], channels, *x.shape[2:]), memory_format=torch.channels_last)
    return y, torch.empty_like(x, memory_format=torch.channels_last) if keep else x.new_empty(0)


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, *,
    silu: bool = True, other: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None,
    extra: Tensor | None = None, keep: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """silu(norm(v)) of v = [x + residual | other] + shift and, with keep, v + extra of x's channels (`reference`)."""
    y, total = _group_norm(x, weight, bias, groups, eps, silu, other, shift, residual, extra, keep)
    return y, total if keep else None


@custom_op("stepforge::image_sum", mutates_args=())
def _image_sum(x: torch.Tensor, residual: torch.Tensor | None, shift: torch.Tensor | None, scale: int) -> torch.Tensor:
    if on_cpu(x):
        return reference.image_sum(x, residual, shift, scale)
    from stepforge.kernels import sums

    return sums.image_sum(images(x), images(residual), shift, scale=scale)


@_image_sum.register_fake
def _(x, residual, shift, scale):  # type: ignore[no-untyped-def]
    y = x.new_empty(*x.shape[:2], x.shape[2] * scale, x.shape[3] * scale)
    return torch.empty_like(y, memory_format=torch.channels_last)


def image_sum(x: Tensor, residual: Tensor | None = None, shift: Tensor | None = None, *, scale: int = 1) -> Tensor:
    """x + residual + shift, every pixel `scale` times in each direction; shapes as in `reference.image_sum`."""
    return _image_sum(x, residual, shift, scale)


@custom_op("stepforge::layer_norm", mutates_args=())
def _layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, pre: torch.Tensor | None
) -> torch.Tensor:
    if on_cpu(x):
        return reference.layer_norm(x, weight, bias, eps, pre)
    from stepforge.kernels import wide

    return wide.layer_norm(adjacent(x), weight, bias, eps, pre=pre)


@_layer_norm.register_fake
def _(x, weight, bias, eps, pre):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, pre: Tensor | None = None) -> Tensor:
    """LayerNorm of x + pre over the last axis, x [..., C]."""
    return _layer_norm(x.reshape(-1, x.shape[-1]), weight, bias, eps, pre).reshape(x.shape)


@custom_op("stepforge::widen", mutates_args=())
def _widen(
    x: torch.Tensor, a: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, gate: bool,
    pre: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    norm = (weight, bias, eps) if weight is not None else None
    if on_cpu(x):
        return reference.widen(x, a, norm, gate, pre)
    from stepforge.kernels import wide

    return wide.widen(adjacent(x), a, norm=norm, gate=gate, pre=pre)


@_widen.register_fake
def _(x, a, weight, bias, eps, gate, pre):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], a.shape[1] + a.shape[2])


def widen(
    x: Tensor, a: Tensor, *, norm: tuple[Tensor, Tensor, float] | None = None, gate: bool = False,
    pre: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[value | value Aᵀ] of x [..., K]; shapes as in `reference.widen`. Returns [..., K + L]."""
    weight, bias, eps = norm or (None, None, 0.0)
    y = _widen(x.reshape(-1, x.shape[-1]), a, weight, bias, eps, gate, pre)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@custom_op("stepforge::widen_norm", mutates_args=())
def _widen_norm(
    x: torch.Tensor, a: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool,
    other: torch.Tensor | None, shift: torch.Tensor | None, residual: torch.Tensor | None, extra: torch.Tensor | None,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    sources: dict[str, Any] = {"other": other, "shift": shift, "residual": residual, "extra": extra}
    if on_cpu(x):
        rows, total = reference.widen_norm(x, a, weight, bias, groups, eps, silu=silu, **sources)
        return rows, total if keep else rows.new_empty(0)
    from stepforge.kernels import wide

    sources |= {"other": images(other), "residual": images(residual)}
    found, kept = wide.widen_norm(images(x), a, weight, bias, groups, eps, silu=silu, **sources, keep=keep)
    return found, kept if kept is not None else found.new_empty(0)


@_widen_norm.register_fake
def _(x, a, weight, bias, groups, eps, silu, other, shift, residual, extra, keep):  # type: ignore[no-untyped-def]
    rows = x.new_empty(x.shape[0] * x.shape[2] * x.shape[3], a.shape[1] + a.shape[2])
    return rows, torch.empty_like(x, memory_format=torch.channels_last) if keep else x.new_empty(0)


def widen_norm(
    x: Tensor, a: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, *,
    silu: bool = False, other: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None,
    extra: Tensor | None = None, keep: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """[y | y Aᵀ] of `group_norm`'s y, pixels as rows [M, C + L], and what it keeps; shapes as in `reference.widen_norm`."""
    rows, total = _widen_norm(x, a, weight, bias, groups, eps, silu, other, shift, residual, extra, keep)
    return rows, total if keep else None


@custom_op("stepforge::geglu", mutates_args=())
def _geglu(h: torch.Tensor) -> torch.Tensor:
    if on_cpu(h):
        return reference.geglu(h)
    from stepforge.kernels import gated

    return gated.geglu(adjacent(h))


@_geglu.register_fake
def _(h):  # type: ignore[no-untyped-def]
    return h.new_empty(h.shape[0], h.shape[1] // 2)


def geglu(h: Tensor) -> Tensor:
    """value · gelu(gate) of h [..., 2C], values first. Returns [..., C]."""
    require(h.dtype in FLOATS or h.dtype == torch.float64, f"geglu takes floats, got {h.dtype}")
    return _geglu(h.reshape(-1, h.shape[-1])).reshape(*h.shape[:-1], h.shape[-1] // 2)


@custom_op("stepforge::guide_update", mutates_args=("step", "state", "sample"))
def _guide_update(
    prediction: torch.Tensor,
    guidance: torch.Tensor,
    table: torch.Tensor,
    scale_in: torch.Tensor,
    step: torch.Tensor,
    state: torch.Tensor,
    z: torch.Tensor,
    sample: torch.Tensor,
    places: torch.Tensor,
    sources: torch.Tensor,
    num_x: int,
    exact: bool,
) -> None:
    if on_cpu(prediction):
        moving = places[step[places] < table.shape[1]]
        new, seen = reference.guide_update(
            prediction, guidance, table, scale_in, step, state, z, places, sources, num_x, exact
        )
        state.copy_(new)
        sample[moving] = seen[moving].to(sample.dtype)
    else:
        from stepforge.kernels import update

        update.guide_update(
            prediction, guidance, table, scale_in, step, state, z, sample, places, sources, num_x, exact=exact
        )
    step.index_add_(0, places, torch.ones_like(places))


@_guide_update.register_fake
def _(prediction, guidance, table, scale_in, step, state, z, sample, places, sources, num_x, exact):  # type: ignore[no-untyped-def]
    return None


def guide_update(
    prediction: Tensor, guidance: Tensor, table: Tensor, scale_in: Tensor, step: Tensor, state: Tensor, z: Tensor,
    sample: Tensor, places: Tensor, sources: Tensor, *, num_x: int, exact: bool = False,
) -> None:  # fmt: skip
    """One step of the images at `places`, in place on state, sample and step; shapes as in `reference.guide_update`.

    All coefficients are read on the device by the device's own step counters, so a captured graph replays every step.
    """
    _guide_update(prediction, guidance, table, scale_in, step, state, z, sample, places, sources, num_x, exact)
