"""The time of a layer with an adapter by a roofline: seconds = max(FLOPs / sustained rate, bytes / sustained bandwidth).

Nothing is found in L2. Peaks are the makers' data sheets (dense, 16-bit in, fp32 sum). The constants fit 570 times of one
H100 (`benchmarks/kernel_fit.py benchmarks/results/h100_kernels.json`), with a median deviation of 7.7 %: 721 TFLOP/s and
3.0 TB/s sustained. Other GPUs are assumed to sustain the same shares of their peaks; none of them has been measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from stepforge.kernels.dispatch.layers import Layer
from stepforge.kernels.dispatch.tiles import EXPAND_RANKS, ONEPASS_RANKS, block_rows, onepass_tile, padded_rank

TENSOR_SHARE = 0.73  # share of the tensor peak that cuBLAS sustains (h100_kernels.json)
BANDWIDTH_SHARE = 0.90  # share of the memory bandwidth that is sustained (h100_kernels.json)
LAUNCH = 2.7e-6  # seconds a launch costs inside a CUDA graph (h100_kernels.json)
OURS = 2.2  # Triton's products over cuBLAS', pointer loads (h100_kernels.json)
STEP = 0.5e-6  # seconds a program of ours takes at least for DEPTH of K (h100_kernels.json)
DEPTH = 64
ADDMM_LAUNCHES = 10  # launches of `fallback.addmm` a slice: masks, fp32, strengths, back to 16 bits, three products
CONV_LAUNCHES = 3  # shrink, expand, and the copy that they need
BYTES = 2  # an element of 16 bits


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    arch: int
    processors: int
    tflops: float
    gigabytes: float  # a second
    tensor_share: float = TENSOR_SHARE
    bandwidth_share: float = BANDWIDTH_SHARE
    launch: float = LAUNCH
    ours: float = OURS
    step: float = STEP

    @property
    def rate(self) -> float:
        return self.tensor_share * self.tflops * 1e12

    @property
    def bandwidth(self) -> float:
        return self.bandwidth_share * self.gigabytes * 1e9


GPUS = {
    "A100": Gpu("A100 80 GB", 80, 108, 312, 2039),
    "3090": Gpu("RTX 3090", 86, 82, 71, 936),
    "4090": Gpu("RTX 4090", 89, 128, 165, 1008),
    "H100": Gpu("H100 SXM", 90, 132, 989, 3352),
    "B200": Gpu("B200", 100, 148, 2250, 8000),
    "5090": Gpu("RTX 5090", 120, 170, 209, 1792),
}
GPU_OF_ARCH = {gpu.arch: gpu for gpu in GPUS.values()}


def roofline(gpu: Gpu, flops: float, elements: float) -> float:
    return max(flops / gpu.rate, BYTES * elements / gpu.bandwidth)


def base(gpu: Gpu, layer: Layer) -> float:
    """The layer without an adapter, which is also the layer with a merged one. A convolution reads each pixel once."""
    m, k, n = layer.m, layer.k, layer.n
    return roofline(gpu, 2 * m * k * n, m * k / layer.taps + k * n + m * n)


def wide(gpu: Gpu, layer: Layer, columns: int) -> float:
    """[x | S]·[W | B]ᵀ, `columns` wider: cuBLAS takes the time of its roofline (0.99 × by the median of
    h100_pilot.json, K 320 to 5120, 16 to 128 columns), and the kernel that writes x writes S too. Packed layers have their
    columns once a slice."""
    m, k, n, extra = layer.m, layer.k, layer.n, columns * layer.slices
    product = roofline(gpu, 2 * m * (k + extra) * n, m * (k + extra) / layer.taps + (k + extra) * n + m * n)
    return product + roofline(gpu, gpu.ours * 2 * m * k * extra, k * extra)


def tiles_per_program(gpu: Gpu, layer: Layer, block_m: int, block_n: int) -> int:
    """NT: as many tiles of columns for one S as leave two programs for each multiprocessor."""
    tiles = ceil(layer.n / layer.slices / block_n)
    blocks = ceil(layer.m / block_m) * layer.slices
    fitting = [nt for nt in range(1, tiles + 1) if blocks * ceil(tiles / nt) >= 2 * gpu.processors]
    nt = max(fitting, default=1)
    return min(nt, ceil(tiles / ceil(tiles / nt)))  # no program left with a shorter share than it needs


def peft(gpu: Gpu, layer: Layer, rank: int) -> float:
    """PEFT's eager layer: shrink, expand, times the strength, add: four launches a slice, x and six times y."""
    m, k, n, slices = layer.m, layer.k, layer.n, layer.slices
    x = m * k / layer.taps
    shrink = roofline(gpu, 2 * m * k * rank * slices, slices * (x + k * rank + m * rank))
    up = roofline(gpu, 2 * m * rank * n, m * rank * slices + rank * n + m * n)
    return base(gpu, layer) + shrink + up + roofline(gpu, 0, 5 * m * n) + 4 * slices * gpu.launch


def addmm(gpu: Gpu, layer: Layer, rank: int) -> float:
    """`fallback.addmm`: cuBLAS' product, shrink, and a product onto y; x and twice y."""
    m, k, n = layer.m, layer.k, layer.n
    low = m * rank * layer.slices
    shrink = roofline(gpu, 2 * m * k * rank * layer.slices, m * k / layer.taps + k * rank * layer.slices + low)
    return (
        base(gpu, layer)
        + shrink
        + roofline(gpu, 2 * m * rank * n, low + rank * n + 2 * m * n)
        + (ADDMM_LAUNCHES * layer.slices * gpu.launch)
    )


def geglu(gpu: Gpu, layer: Layer) -> float:
    """The kernel after a layer: reads n columns, writes half."""
    return roofline(gpu, 0, 1.5 * layer.m * layer.n) + gpu.launch


def split(gpu: Gpu, layer: Layer, rank: int, *, gated: bool = False) -> float:
    """`shrink`, then `expand`: one launch more, x once more, S in fp32 written and read. gated: `expand_geglu`, which
    writes half of the columns."""
    m, k, n, r = layer.m, layer.k, layer.n, padded_rank(rank)
    low = m * r * layer.slices
    shrink = roofline(gpu, 2 * m * k * r * layer.slices, m * k * layer.slices + k * r * layer.slices + 2 * low)
    flops = 2 * m * k * n + 2 * m * r * n
    written = m * n / 2 if gated else m * n
    expand = gpu.ours * roofline(gpu, flops, m * k + k * n + written + 2 * low + r * n)
    parts = parts_of(gpu, layer)
    return max(expand, serial(gpu, k)) + max(shrink, serial(gpu, k / parts)) + gpu.launch


def conv(gpu: Gpu, layer: Layer, rank: int) -> float:
    """cuDNN's convolution, implicit-GEMM shrink, expand onto its output: x once more, S, and twice y."""
    m, k, n, r = layer.m, layer.k, layer.n, padded_rank(rank)
    shrink = gpu.ours * roofline(gpu, 2 * m * k * r, m * k / layer.taps + k * r + 2 * m * r)
    expand = gpu.ours * roofline(gpu, 2 * m * r * n, 2 * m * r + r * n + 2 * m * n)
    return base(gpu, layer) + max(shrink, serial(gpu, k)) + expand + CONV_LAUNCHES * gpu.launch


def serial(gpu: Gpu, depth: float) -> float:
    """A program's own time over `depth` of K, however few programs there are: each step waits for its loads."""
    return gpu.step * depth / DEPTH


def parts_of(gpu: Gpu, layer: Layer) -> int:
    """Parts of K in a shrink: too few programs and a long sum take two, added in order by `expand`."""
    return 2 if ceil(layer.m / 32) * layer.slices < gpu.processors and layer.k >= 2048 else 1


def onepass(gpu: Gpu, layer: Layer, rank: int, nt: int, block_n: int) -> float:
    """One launch: S is computed once for nt tiles of columns, so R·⌈tiles/nt⌉/N more products, and R/K for the expand."""
    m, k, n, r = layer.m, layer.k, layer.n, padded_rank(rank)
    chunks = layer.slices * ceil(ceil(n / layer.slices / block_n) / nt)
    flops = 2 * m * k * n + 2 * m * k * r * chunks + 2 * m * r * n
    return max(
        gpu.ours * roofline(gpu, flops, m * k + k * n + m * n + k * r * layer.slices + r * n), nt * serial(gpu, k)
    )


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs a layer. seconds: the estimate of each path that is open to it; base: without an adapter."""

    path: str
    block_m: int
    nt: int
    parts: int  # parts of K in the shrink
    base: float
    seconds: dict[str, float]


def choose(gpu: Gpu, layer: Layer, rank: int, *, grouped: bool = False, block_m: int | None = None) -> Choice:
    """The cheapest path that takes the layer. grouped: rows on different adapters, for which addmm needs one call for
    each; it stays the fallback. block_m: what a table of row blocks was made for."""
    r = padded_rank(rank)
    rows = block_rows(gpu.arch)
    block = block_m or (rows[0] if ceil(layer.m / rows[0]) * ceil(layer.n / 128) >= gpu.processors else rows[-1])
    seconds: dict[str, float] = {}
    nt = parts = 1
    aligned = layer.k % 16 == 0 and layer.n % (16 * layer.slices) == 0
    if aligned and layer.taps == 1 and (layer.m >= 128 or grouped) and block in rows:
        if r in ONEPASS_RANKS:
            tile = onepass_tile(gpu.arch, r, block)
            nt = tiles_per_program(gpu, layer, tile.block_m, tile.block_n)
            seconds["onepass"] = onepass(gpu, layer, rank, nt, tile.block_n)
        if r in EXPAND_RANKS:
            seconds["split"] = split(gpu, layer, rank)
            parts = parts_of(gpu, layer)
    if layer.taps > 1:
        seconds["conv"] = conv(gpu, layer, rank)
    elif not grouped or not seconds:
        seconds["addmm"] = addmm(gpu, layer, rank)
    without = base(gpu, layer)
    if layer.gated:
        after = geglu(gpu, layer)
        without += after
        fused = "split" in seconds and layer.n % 32 == 0  # each half a multiple of 16
        seconds = {path: time + after for path, time in seconds.items()}
        if fused:
            seconds["gated"] = split(gpu, layer, rank, gated=True)
    path = min(seconds, key=lambda name: seconds[name])
    return Choice(path, block, nt, parts, without, seconds)
