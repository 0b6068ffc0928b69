"""The kernels' roofline, and with a GPU their times beside it.

    python benchmarks/bench_kernels.py --model          what the model predicts for each layer, rank and GPU
    python benchmarks/bench_kernels.py                  on a CUDA GPU: measured beside predicted, pass or fail

Overheads are over the layer without an adapter, which is what a merged adapter costs. A measurement is the median of a
captured CUDA graph that first overwrites L2; every path's result is checked against its error bound before it is timed.
The limits are printed with the table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

from stepforge.kernels import cost
from stepforge.kernels.dispatch import dispatch, nearest_arch
from stepforge.kernels.layers import SD15, SDXL, Layer
from stepforge.kernels.tiles import ONEPASS_RANKS, expand_tile, onepass_tile, padded_rank

MODELED = ("A100", "H100", "4090", "B200")
RANKS = (4, 8, 16, 32, 64, 128)
PATHS = ("PEFT", "addmm", "split", "onepass")
# what a measured layer must reach where dispatch picks a path: no slower than the others, by 2 % of noise;
# and the one pass at rank 16 on the layers it is made for, against the merged layer
SLACK = 1.02
AGAINST_MERGED = {"qkv packed": 1.10, "GEGLU-up": 1.10}


def predicted(gpu: cost.Gpu, layer: Layer, rank: int) -> dict[str, float]:
    """Seconds of each path that takes the layer."""
    seconds = {
        "merged": cost.base(gpu, layer),
        "PEFT": cost.peft(gpu, layer, rank),
        "addmm": cost.addmm(gpu, layer, rank),
    }
    return seconds | {
        path: value for path, value in cost.choose(gpu, layer, rank).seconds.items() if path in ("split", "onepass")
    }


def print_model(gpus: list[str], ranks: list[int]) -> None:
    print("Overhead over the layer without an adapter, %, by a roofline (see stepforge/kernels/cost.py).")
    print(f"{100 * cost.OURS - 100:.0f} % are added for Triton's product over cuBLAS'. * marks what dispatch takes.")
    for name in gpus:
        gpu = cost.GPUS[name]
        print(f"\n{gpu.name}: {gpu.tflops:.0f} TFLOP/s, {gpu.gigabytes:.0f} GB/s, {gpu.processors} multiprocessors")
        print(f"{'layer (M, K, N)':42} {'GFLOP':>7} {'MB':>6} {'µs':>7} {'r':>4} " + " ".join(f"{p:>8}" for p in PATHS))
        for layer in (*SD15, *SDXL):
            flops, elements = 2 * layer.m * layer.k * layer.n, layer.m * layer.k // layer.taps + layer.k * layer.n
            size = cost.BYTES * (elements + layer.m * layer.n)
            label = f"{layer.name} ({layer.m}, {layer.k}, {layer.n})"
            for rank in ranks:
                seconds = predicted(gpu, layer, rank)
                taken = dispatch(layer, rank, gpu.arch).path
                cells = [cell(seconds, path, taken) for path in PATHS]
                front = f"{label:42} {flops / 1e9:7.2f} {size / 1e6:6.1f} {1e6 * seconds['merged']:7.1f}"
                print(f"{front if rank == ranks[0] else ' ' * len(front)} {rank:4} " + " ".join(cells))


def cell(seconds: dict[str, float], path: str, taken: str) -> str:
    if path not in seconds:
        return f"{'-':>8}"
    # a convolution's path has addmm's traffic: cuDNN, shrink, expand onto y
    mark = "*" if path == taken or (path == "addmm" and taken == "conv") else ""
    return f"{100 * (seconds[path] / seconds['merged'] - 1):.1f}{mark}".rjust(8)


def tensors(layer: Layer, rank: int) -> dict[str, Any]:
    """Inputs of a layer in fp16 with the sizes of a network's."""
    import torch

    r = padded_rank(rank)

    def draw(*shape: int, size: float = 1.0) -> Any:
        return (torch.randn(*shape, device="cuda") * size).half()

    return {
        "x": draw(layer.m, layer.k),
        "w": draw(layer.n, layer.k, size=layer.k**-0.5),
        "a": draw(1, layer.slices, r, layer.k, size=layer.k**-0.5),
        "b": draw(1, layer.n, r, size=rank**-0.5),
        "scale": torch.ones(1, layer.slices, r // 16, device="cuda"),
        "ranks": torch.full((1,), rank, dtype=torch.int32, device="cuda"),
    }


def candidates(layer: Layer, rank: int, arch: int, given: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each path as a call without arguments. PEFT: its forward, with the strength as a multiplication."""
    import torch.nn.functional as F

    from stepforge.kernels import fallback, lowrank

    x, w, a, b = (given[name] for name in ("x", "w", "a", "b"))
    width = layer.n // layer.slices

    def peft() -> Any:
        y = F.linear(x, w)
        for part in range(layer.slices):
            columns = slice(part * width, part * width + width)
            low = F.linear(F.linear(x, a[0, part, :rank]), b[0, columns, :rank])
            y[:, columns] = y[:, columns] + low * 1.0
        return y

    yield "merged", lambda: F.linear(x, w)
    yield "PEFT", peft
    yield "addmm", lambda: fallback.addmm(**given)
    choice = dispatch(layer, rank, arch)
    if "split" in choice.seconds:
        tile = expand_tile(arch, choice.block_m)
        yield "split", lambda: lowrank.split(**given, tile=tile, parts=choice.parts)
    if "onepass" in choice.seconds and padded_rank(rank) in ONEPASS_RANKS:
        one = onepass_tile(arch, padded_rank(rank), choice.block_m)
        yield "onepass", lambda: lowrank.onepass(**given, tile=one, nt=choice.nt)


def microseconds(call: Callable[[], Any], runs: int = 50) -> tuple[float, float, float]:
    """Median and quartiles of a CUDA graph of the call, with L2 overwritten before each run and outside the clock."""
    import torch

    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(runs):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    low, median, high = statistics.quantiles(times, n=4)
    return median, low, high


def measure(ranks: list[int]) -> int:
    import torch

    from stepforge.kernels import bounds

    properties = torch.cuda.get_device_properties(0)
    arch = nearest_arch(10 * properties.major + properties.minor)
    gpu = cost.GPU_OF_ARCH[arch]
    print(f"{properties.name}, sm_{arch}, torch {torch.__version__}, CUDA {torch.version.cuda}; modelled as {gpu.name}")
    print(f"limits: dispatch's path ≤ {SLACK} × the fastest; one pass at r = 16 ≤ {AGAINST_MERGED} × merged")
    print("µs: median (quartiles) | predicted; overhead over merged, %: measured | predicted")
    failed = 0
    for layer in (layer for layer in (*SD15, *SDXL) if layer.taps == 1 and layer.m >= 128):
        for rank in ranks:
            given = tensors(layer, rank)
            exact, bound = bounds.lowrank_linear(**given, u=bounds.TENSOR_CORE_SUM)
            model, found = predicted(gpu, layer, rank), {}
            print(f"{layer.name} ({layer.m}, {layer.k}, {layer.n}) r {rank}")
            for path, call in candidates(layer, rank, arch, given):
                if path in ("split", "onepass") and (off := bounds.excess(call(), exact, bound)) > 1:
                    print(f"  {path:8} FAIL: off by {off:.2f} of its error bound")
                    failed += 1
                    continue
                median, low, high = microseconds(call)
                found[path] = median
                extra = 100 * (median / found["merged"] - 1)
                told = 100 * (model[path] / model["merged"] - 1)
                print(
                    f"  {path:8} {median:8.1f} ({low:.1f}..{high:.1f}) | {1e6 * model[path]:8.1f}"
                    f"   {extra:+7.1f} | {told:+7.1f}"
                )
            for verdict in verdicts(layer, rank, dispatch(layer, rank, arch).path, found):
                failed += verdict.startswith("FAIL")
                print(f"  {verdict}")
    print(f"{failed} failures" if failed else "all pass")
    return min(failed, 1)


def verdicts(layer: Layer, rank: int, taken: str, found: dict[str, float]) -> list[str]:
    """Pass or fail of a layer's measured paths."""
    results = []
    rivals = {path: value for path, value in found.items() if path not in ("merged", "PEFT")}
    if taken in rivals:
        best = min(rivals, key=lambda path: rivals[path])
        word = "pass" if rivals[taken] <= SLACK * rivals[best] else "FAIL"
        results.append(f"{word}: dispatch takes {taken}, the fastest is {best}")
    for kind, limit in AGAINST_MERGED.items():
        if rank == 16 and layer.name.endswith(kind) and "onepass" in found:
            ratio = found["onepass"] / found["merged"]
            results.append(f"{'pass' if ratio <= limit else 'FAIL'}: one pass {ratio:.3f} × merged, limit {limit}")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="store_true", help="print the roofline; needs no GPU")
    parser.add_argument("--gpus", nargs="+", choices=sorted(cost.GPUS), default=list(MODELED))
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    args = parser.parse_args()
    if args.model:
        print_model(args.gpus, args.ranks)
        return 0
    import torch

    if not torch.cuda.is_available():
        print("there is no CUDA GPU: give --model for the prediction", file=sys.stderr)
        return 2
    return measure(args.ranks)


if __name__ == "__main__":
    sys.exit(main())
