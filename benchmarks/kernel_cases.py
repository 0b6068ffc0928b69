"""What bench_kernels.py measures: for each family of kernels its shapes, its peers, its error bound and its limits.

A new kernel is one generator of cases and one entry in `FAMILIES`. Each case brings inputs of a network's size in fp16,
the roofline of each of its paths (stepforge.kernels.dispatch.cost: bytes at the sustained bandwidth, a price for each launch
after the first), and the exact result with its bound (stepforge.kernels.bounds).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from stepforge.kernels import bounds, conv, fallback, gated, lowrank, norms, ops, reference, update
from stepforge.kernels.dispatch import cost
from stepforge.kernels.dispatch.choose import RANKS, dispatch
from stepforge.kernels.dispatch.cost import Gpu
from stepforge.kernels.dispatch.layers import NORMS, SD15, SDXL, Layer, Norm
from stepforge.kernels.dispatch.tiles import expand_tile, onepass_tile, padded_rank
from stepforge.kernels.packing import block_table

Tensor = Any  # torch.Tensor
Call = Callable[[], Tensor]

NOISE = 1.02  # two medians of one kernel differ by less
AGAINST_MERGED = 1.10
ACCEPTANCE = (  # name, figure, where it comes from
    ("dispatch", f"dispatch's path ≤ {NOISE} × the fastest of its rivals", "what dispatch is for; 2 % is noise"),
    (
        "one pass",
        f"≤ {AGAINST_MERGED} × merged at r = 16 on packed qkv and GEGLU-up",
        "the design's goal: 1.05 to 1.10",
    ),
    ("eager", f"fused ≤ {NOISE} × the same algebra in eager torch", "a slower kernel has no use; 2 % is noise"),
    ("bound", "|result − exact| ≤ bound in every element", "stepforge/kernels/bounds.py, in fp64"),
    ("repeat", "two runs are equal bit for bit", "no atomics, sums in a fixed order"),
)
BLOCK = 64  # rows of a convolution's block: every architecture has a tile for them
GROUPS = 32
PLAN = 1000  # steps: more than a measurement replays, since an image whose plan is done costs nothing


@dataclass(frozen=True, slots=True)
class Path:
    """One way to compute a case. result: what is checked, None for a peer; slack: how many bounds it may be off."""

    name: str
    call: Call
    seconds: Callable[[Gpu], float]  # by the roofline
    result: Call | None = None
    slack: float = 1.0


@dataclass(frozen=True, slots=True)
class Limit:
    """`path` may take `ratio` times the fastest of its rivals."""

    name: str
    path: str
    rivals: tuple[str, ...]
    ratio: float


@dataclass(frozen=True, slots=True)
class Setup:
    paths: list[Path]
    exact: Tensor
    bound: Tensor
    limits: list[Limit]


@dataclass(frozen=True, slots=True)
class Case:
    """setup allocates the inputs and computes the exact result."""

    family: str
    name: str
    setup: Callable[[], Setup]


@dataclass(frozen=True, slots=True)
class Shapes:
    """latents: (images, elements of one)."""

    layers: tuple[Layer, ...]
    norms: tuple[Norm, ...]
    latents: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]


MODELS = Shapes((*SD15, *SDXL), NORMS, ((1, 4 * 64 * 64), (8, 4 * 64 * 64), (1, 4 * 128 * 128)), RANKS)
TINY = Shapes(
    (
        Layer("attn", 128, 32, 64),
        Layer("qkv packed", 128, 32, 96, slices=3),
        Layer("GEGLU-up", 128, 32, 128),
        Layer("conv", 128, 9 * 16, 32, taps=9),
    ),
    (Norm("norm", 1, 64, 4),),
    ((2, 96),),
    (16, 32),
)


def lowrank_inputs(layer: Layer, rank: int, device: str, adapters: int = 1) -> dict[str, Tensor]:
    """x, w, a, b, scale and ranks as `reference.lowrank_linear` takes them."""
    r = padded_rank(rank)

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * size).half()

    return {
        "x": draw(layer.m, layer.k),
        "w": draw(layer.n, layer.k, size=layer.k**-0.5),
        "a": draw(adapters, layer.slices, r, layer.k, size=layer.k**-0.5),
        "b": draw(adapters, layer.n, r, size=rank**-0.5),
        "scale": torch.ones(adapters, layer.slices, r // 16, device=device),
        "ranks": torch.full((adapters,), rank, dtype=torch.int32, device=device),
    }


def peft(layer: Layer, rank: int, given: dict[str, Tensor], adapters: int) -> Any:
    """PEFT's forward. Packed layers are separate modules there; a mixed batch adds to the rows of each adapter."""
    x, a, b = given["x"], given["a"], given["b"]
    rows = layer.m // adapters
    results = []
    for part, w in enumerate(given["w"].chunk(layer.slices)):
        y = F.linear(x, w)
        for adapter in range(adapters):
            own = slice(adapter * rows, adapter * rows + rows)
            up = b[adapter, part * len(w) : part * len(w) + len(w), :rank]
            low = F.linear(F.linear(x[own], a[adapter, part, :rank]), up) * 1.0
            if adapters == 1:
                y = y + low
            else:
                y[own] += low
        results.append(y)
    return results


def linear_setup(gpu: Gpu, device: str, layer: Layer, rank: int, *, adapters: int) -> Setup:
    given = lowrank_inputs(layer, rank, device, adapters)
    choice = dispatch(layer, rank, gpu.arch, grouped=adapters > 1)
    extra = {}
    if adapters > 1:
        extra["table"] = block_table(range(adapters), layer.m // adapters, choice.block_m).to(device)
    calls: dict[str, tuple[Call, Callable[[Gpu], float], float]] = {
        # S and y are rounded once more than in the kernels
        "addmm": (lambda: fallback.addmm(**given, **extra), lambda g: cost.addmm(g, layer, rank), 3.0)
    }
    if "split" in choice.seconds:
        wide = expand_tile(gpu.arch, choice.block_m)
        calls["split"] = (
            lambda: lowrank.split(**given, **extra, tile=wide, parts=choice.parts),
            lambda g: cost.split(g, layer, rank),
            1.0,
        )
    if "onepass" in choice.seconds:
        tile = onepass_tile(gpu.arch, padded_rank(rank), choice.block_m)
        calls["onepass"] = (
            lambda: lowrank.onepass(**given, **extra, tile=tile, nt=choice.nt),
            lambda g: cost.onepass(g, layer, rank, choice.nt, tile.block_n),
            1.0,
        )
    paths = [
        Path("merged", lambda: F.linear(given["x"], given["w"]), lambda g: cost.base(g, layer)),
        Path("PEFT", lambda: peft(layer, rank, given, adapters), lambda g: cost.peft(g, layer, rank)),
        *(Path(name, call, seconds, call, slack) for name, (call, seconds, slack) in calls.items()),
    ]
    rivals = tuple(name for name in calls if name != choice.path)
    limits = [Limit("dispatch", choice.path, rivals, NOISE)]
    wide_layer = layer.name.endswith(("qkv packed", "GEGLU-up"))
    if wide_layer and adapters == 1 and padded_rank(rank) == 16 and "onepass" in calls:
        limits.append(Limit("one pass", "onepass", ("merged",), AGAINST_MERGED))
    exact, bound = bounds.lowrank_linear(**given, **extra, u=bounds.TENSOR_CORE_SUM)
    return Setup(paths, exact, bound, limits)


def linear(gpu: Gpu, device: str, shapes: Shapes, *, family: str, adapters: int) -> Iterator[Case]:
    """Layers that a kernel takes: below 128 rows they are cuBLAS'."""
    for layer in shapes.layers:
        if layer.taps == 1 and layer.m >= 128:
            for rank in shapes.ranks:
                name = f"{layer.name} ({layer.m}, {layer.k}, {layer.n}) r {rank}"
                yield Case(family, name, partial(linear_setup, gpu, device, layer, rank, adapters=adapters))


def conv_setup(gpu: Gpu, device: str, layer: Layer, rank: int) -> Setup:
    given = lowrank_inputs(layer, rank, device)
    side, channels = round((layer.m / 2) ** 0.5), layer.k // 9
    x = torch.randn(2, channels, side, side, device=device).half().contiguous(memory_format=torch.channels_last)
    w, a, b = (given[name] for name in ("w", "a", "b"))
    w, a = (t.view(-1, 3, 3, channels).permute(0, 3, 1, 2) for t in (w, a))  # channels last in memory
    tile = expand_tile(gpu.arch, BLOCK)
    bank = {"a": a.permute(0, 2, 3, 1)[None], **{name: given[name] for name in ("b", "scale", "ranks")}}
    pixels = x.permute(0, 2, 3, 1)

    def base() -> Tensor:
        return F.conv2d(x, w, padding=1)

    def added(y: Tensor) -> Tensor:
        return conv.lowrank_conv(y.permute(0, 2, 3, 1).contiguous(), pixels, **bank, tile=tile)

    def eager() -> Tensor:
        return base() + F.conv2d(F.conv2d(x, a[:rank], padding=1), b[0, :, :rank, None, None]) * 1.0

    y = base()
    paths = [
        Path("merged", base, lambda g: cost.base(g, layer)),
        Path("PEFT", eager, lambda g: cost.peft(g, layer, rank)),
        # checked on one y: what cuDNN rounds is not ours
        Path("conv", lambda: added(base()), lambda g: cost.conv(g, layer, rank), lambda: added(y)),
    ]
    rows = y.permute(0, 2, 3, 1).contiguous()
    exact, bound = bounds.lowrank_conv(rows, pixels, **bank, u=bounds.TENSOR_CORE_SUM)
    return Setup(paths, exact, bound, [Limit("dispatch", "conv", ("PEFT",), NOISE)])


def convolutions(gpu: Gpu, device: str, shapes: Shapes) -> Iterator[Case]:
    for layer in shapes.layers:
        if layer.taps == 9:
            for rank in shapes.ranks:
                name = f"{layer.name} ({layer.m}, {layer.k}, {layer.n}) r {rank}"
                yield Case("conv", name, partial(conv_setup, gpu, device, layer, rank))


def norm_setup(device: str, norm: Norm) -> Setup:
    x = torch.randn(norm.rows, norm.channels, norm.side, norm.side, device=device) + 1
    x = x.half().contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.randn(norm.channels, device=device).half() for _ in range(2))

    def ours() -> Tensor:
        return norms.group_norm(x, weight, bias, GROUPS, 1e-5)[0]

    def eager() -> Tensor:
        return F.silu(F.group_norm(x, GROUPS, weight, bias, 1e-5))

    # 512: additions that an element passes through at most, in tests/kernels/test_gpu.py too
    (exact, bound), _ = bounds.group_norm(x, weight, bias, GROUPS, 1e-5, run=512)
    elements = x.numel()
    return fused(ours, eager, exact, bound, moved=(3 * elements, 5 * elements), launches=(1, 3))


def normalisations(gpu: Gpu, device: str, shapes: Shapes) -> Iterator[Case]:
    for norm in shapes.norms:
        name = f"{norm.name} ({norm.rows}, {norm.channels}, {norm.side}, {norm.side})"
        yield Case("norm", name, partial(norm_setup, device, norm))


def geglu_setup(device: str, m: int, n: int) -> Setup:
    h = torch.randn(m, n, device=device).half()

    def eager() -> Tensor:
        value, gate = h.chunk(2, dim=-1)
        return value * F.gelu(gate)

    exact, bound = bounds.geglu(h)
    moved = (3 * m * n // 2, 5 * m * n // 2)
    return fused(lambda: gated.geglu(h), eager, exact, bound, moved=moved, launches=(0, 1))


def geglus(gpu: Gpu, device: str, shapes: Shapes) -> Iterator[Case]:
    for layer in shapes.layers:
        if layer.name.endswith("GEGLU-up"):
            yield Case("GEGLU", f"{layer.name} ({layer.m}, {layer.n})", partial(geglu_setup, device, layer.m, layer.n))


def gated_setup(gpu: Gpu, device: str, layer: Layer, rank: int) -> Setup:
    """GEGLU in the epilogue of its up-projection with an adapter, beside the projection on its own path and GEGLU after it."""
    given = lowrank_inputs(layer, rank, device)
    choice = dispatch(layer, rank, gpu.arch)
    tile = expand_tile(gpu.arch, choice.block_m)

    def ours() -> Tensor:
        return gated.lowrank_geglu(**given, tile=tile, parts=choice.parts)

    def after() -> Tensor:
        return gated.geglu(ops.run_linear(**given, arch=gpu.arch))

    def choice_of(g: Gpu) -> cost.Choice:
        return cost.choose(g, layer, rank)

    paths = [
        Path("merged", lambda: gated.geglu(F.linear(given["x"], given["w"])), lambda g: choice_of(g).base),
        Path("after", after, lambda g: min(t for name, t in choice_of(g).seconds.items() if name != "gated")),
        Path("gated", ours, lambda g: cost.split(g, layer, rank, gated=True), ours),
    ]

    taken, other = ("gated", "after") if choice.path == "gated" else ("after", "gated")
    exact, bound = bounds.lowrank_geglu(**given, u=bounds.TENSOR_CORE_SUM)
    return Setup(paths, exact, bound, [Limit("dispatch", taken, (other,), NOISE)])


def gated_layers(gpu: Gpu, device: str, shapes: Shapes) -> Iterator[Case]:
    for layer in shapes.layers:
        if layer.name.endswith("GEGLU-up"):
            for rank in shapes.ranks:
                name = f"{layer.name} ({layer.m}, {layer.k}, {layer.n}) r {rank}"
                own = replace(layer, gated=True)
                yield Case("gated", name, partial(gated_setup, gpu, device, own, rank))


def guide_update(given: dict[str, Tensor]) -> None:
    """One step of every image, in place, and the step counter's."""
    update.guide_update(**given, num_x=1)
    given["step"].add_(1)


def guide_setup(device: str, images: int, size: int) -> Setup:
    """Euler's update of guided images: one latent and one prediction are kept."""
    w, dt, scale = 7.5, -0.01, 0.9
    given = {
        "prediction": torch.randn(2 * images, size, device=device).half(),
        "guidance": torch.tensor([w, 1 - w], device=device).repeat(images, PLAN, 1),
        "table": torch.tensor([1.0, dt, 0.0], device=device).repeat(images, PLAN, 1),  # coefficients of x, p and noise
        "scale_in": torch.full((images, PLAN + 1), scale, device=device),
        "step": torch.zeros(images, dtype=torch.int32, device=device),
        "state": torch.randn(images, 2, size, device=device),
        "z": torch.zeros(images, size, device=device),
        "sample": torch.zeros(images, size, device=device).half(),
        "places": torch.arange(images, dtype=torch.int32, device=device),
        "sources": torch.arange(2 * images, dtype=torch.int32, device=device).view(images, 2),
    }
    fresh = {name: given[name].clone() for name in ("step", "state", "sample")}
    cond, uncond, x = given["prediction"][0::2], given["prediction"][1::2], fresh["state"][:, 0]

    def ours() -> Tensor:
        now = {**given, **{name: value.clone() for name, value in fresh.items()}}
        guide_update(now)
        return torch.cat([now["state"].flatten(), now["sample"].flatten().float()])

    def eager() -> Tensor:
        guided = uncond + w * (cond - uncond)
        return ((x + dt * guided.float()) * scale).half()

    wide = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    del wide["sample"]
    sizes = {name: value.abs() for name, value in wide.items()}
    state, sample = reference.guide_update(**wide, num_x=1)
    reach, far = reference.guide_update(**sizes, num_x=1)
    # products and sums of a step: 16 roundings of fp32 for the state, 20 and one to fp16 for the sample
    error = bounds.rounded_to(torch.float16, sample, 20 * bounds.IEEE_SUM * far)
    exact = torch.cat([state.flatten(), sample.flatten()])
    bound = torch.cat([(16 * bounds.IEEE_SUM * reach).flatten(), error.flatten()])
    moved = (9 * images * size, 28 * images * size)  # fp32 counts as two elements
    return fused(ours, eager, exact, bound, moved=moved, launches=(1, 7), timed=lambda: guide_update(given))


def guidance(gpu: Gpu, device: str, shapes: Shapes) -> Iterator[Case]:
    for images, size in shapes.latents:
        yield Case("guide", f"{images} x {size}", partial(guide_setup, device, images, size))


def fused(
    ours: Call, eager: Call, exact: Tensor, bound: Tensor, *,
    moved: tuple[float, float], launches: tuple[int, int], timed: Call | None = None,
) -> Setup:  # fmt: skip
    """A kernel limited by memory beside eager torch. moved: elements of 16 bits read and written; launches after the
    first; timed: what is measured, if not what is checked."""

    def seconds(which: int) -> Callable[[Gpu], float]:
        return lambda g: cost.roofline(g, 0, moved[which]) + launches[which] * g.launch

    paths = [Path("eager", eager, seconds(1)), Path("fused", timed or ours, seconds(0), ours)]
    return Setup(paths, exact, bound, [Limit("eager", "fused", ("eager",), NOISE)])


FAMILIES: dict[str, Callable[[Gpu, str, Shapes], Iterator[Case]]] = {
    "linear": partial(linear, family="linear", adapters=1),
    "grouped": partial(linear, family="grouped", adapters=2),
    "conv": convolutions,
    "norm": normalisations,
    "GEGLU": geglus,
    "gated": gated_layers,
    "guide": guidance,
}


def cases(gpu: Gpu, device: str, shapes: Shapes, families: tuple[str, ...]) -> Iterator[Case]:
    for family in families:
        yield from FAMILIES[family](gpu, device, shapes)
