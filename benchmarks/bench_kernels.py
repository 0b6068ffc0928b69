"""The kernels on a GPU: every family checked, timed beside its peers and its roofline, pass or fail. And their roofline alone.

    python benchmarks/bench_kernels.py --model          what the roofline predicts for each layer, rank and GPU; needs no GPU
    python benchmarks/bench_kernels.py                  all families on the first CUDA GPU, and one table at the end
    make test-gpu                                       this with --fit, and all else that a GPU has to say (gpu_report.py)

Every path's result is checked against its error bound in fp64 and must repeat to the bit before it is timed. A time is the
median of a captured CUDA graph, with L2 overwritten before each run and outside the clock. Limits are printed first.
Exit status: 0 all pass, 1 something failed, 2 there is no GPU that can run the kernels.

The first person with a GPU: run `make test-gpu` on an idle machine and commit the `out/gpu/kernels.json` that it writes as
`benchmarks/results/kernels_<gpu>.json`, or send it with the whole output. It has every measurement, the machine, the driver
and the versions, and the constants that fit; those then go into `stepforge/kernels/dispatch/cost.py`, and
`python -m stepforge.kernels.dispatch` writes the table of choices again.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from check_gpu import driver, missing
from harness import Timing, machine

from stepforge.kernels.dispatch import cost
from stepforge.kernels.dispatch.choose import dispatch, nearest_arch
from stepforge.kernels.dispatch.layers import GATED, SD15, SDXL, Layer

MODELED = ("A100", "H100", "4090", "B200")
RANKS = (4, 8, 16, 32, 64, 128)
PATHS = ("PEFT", "addmm", "split", "onepass", "gated")
FAMILY_NAMES = ("linear", "grouped", "conv", "norm", "GEGLU", "gated", "guide")
SANITIZERS = ("memcheck", "racecheck")


def predicted(gpu: cost.Gpu, layer: Layer, rank: int) -> dict[str, float]:
    """Seconds of each path that takes the layer; all but "gated" with the GEGLU that follows it, if one does."""
    choice = cost.choose(gpu, layer, rank)
    after = cost.geglu(gpu, layer) if layer.gated else 0.0
    seconds = {
        "merged": choice.base,
        "PEFT": cost.peft(gpu, layer, rank) + after,
        "addmm": cost.addmm(gpu, layer, rank) + after,
    }
    return seconds | {path: value for path, value in choice.seconds.items() if path in ("split", "onepass", "gated")}


def print_model(gpus: Sequence[str], ranks: Sequence[int]) -> None:
    print("Overhead over the layer without an adapter, %, by a roofline (see stepforge/kernels/dispatch/cost.py).")
    print(f"{100 * cost.OURS - 100:.0f} % are added for Triton's product over cuBLAS'. * marks what dispatch takes.")
    for name in gpus:
        gpu = cost.GPUS[name]
        print(f"\n{gpu.name}: {gpu.tflops:.0f} TFLOP/s, {gpu.gigabytes:.0f} GB/s, {gpu.processors} multiprocessors")
        print(f"{'layer (M, K, N)':42} {'GFLOP':>7} {'MB':>6} {'µs':>7} {'r':>4} " + " ".join(f"{p:>8}" for p in PATHS))
        for layer in (*SD15, *SDXL, *GATED):
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


def raise_clocks(seconds: float = 1.0) -> None:
    """An idle GPU runs at low clocks, and the first cases would be timed at them."""
    import torch

    square, started = torch.ones(4096, 4096, device="cuda").half(), time.perf_counter()
    while time.perf_counter() < started + seconds:
        torch.mm(square, square)
        torch.cuda.synchronize()


class CudaTimer:
    """Median and quartiles of a CUDA graph of a path, with L2 overwritten before each run and outside the clock."""

    def __init__(self, runs: int = 100) -> None:
        import torch

        self._runs = runs
        self._flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def __call__(self, path: Any) -> Timing:
        import torch

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                path.call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            path.call()
        graph.replay()  # the first uploads the graph
        seconds = []
        for _ in range(self._runs):
            self._flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds.append(1e-3 * start.elapsed_time(end))
        low, median, high = statistics.quantiles(seconds, n=4)
        return Timing(median, low, high)


@dataclass(slots=True)
class Outcome:
    """What became of a case. taken: dispatch's path; models: the roofline of each path; errors: in units of the bound;
    ratios: of each limit, over what it allows; faults: why it failed."""

    case: Any
    taken: str = ""
    models: dict[str, Callable[[cost.Gpu], float]] = field(default_factory=dict)
    times: dict[str, Timing] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def examine(case: Any, timer: Callable[[Any], Timing] | None, outcome: Outcome) -> None:
    """Check and time each path of a case, then its limits. An exception in one path leaves the others."""
    import torch

    from stepforge.kernels import bounds

    setup = case.setup()
    for path in setup.paths:
        outcome.models[path.name] = path.seconds
        try:
            if path.result is not None:
                first, second = path.result(), path.result()
                outcome.errors[path.name] = error = bounds.excess(first, setup.exact, path.slack * setup.bound)
                if error > 1:
                    outcome.faults.append(f"{path.name} is off by {error:.3g} of its bound")
                if not torch.equal(first, second):
                    outcome.faults.append(f"{path.name} does not repeat to the bit")
            if timer is not None:
                outcome.times[path.name] = timer(path)
        except Exception as error:
            outcome.faults.append(f"{path.name}: {reason(error)}")
    for limit in setup.limits:
        outcome.taken = limit.path if limit.name == "dispatch" else outcome.taken
        rivals = {name: outcome.times[name].median for name in limit.rivals if name in outcome.times}
        if limit.path not in outcome.times or not rivals:
            continue
        best = min(rivals, key=lambda name: rivals[name])
        ratio = outcome.times[limit.path].median / rivals[best]
        outcome.ratios[f"{limit.name}: {limit.path} {ratio:.3f} × {best}, limit {limit.ratio}"] = ratio / limit.ratio
    outcome.faults += [text for text, ratio in outcome.ratios.items() if ratio > 1]


def reason(error: Exception) -> str:
    """An exception in one line: its first, and its last, where Triton's compiler says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:160]}{f' … {lines[-1][:160]}' if lines[1:] else ''}"


def device_lost() -> bool:
    """After an illegal access nothing runs in this process any more."""
    import torch

    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception:
        return True
    return False


def flushed(text: str) -> None:
    print(text, flush=True)


def measure(
    cases: Iterable[Any], gpu: cost.Gpu, timer: Callable[[Any], Timing] | None, show: Callable[[str], None] = flushed
) -> list[Outcome]:
    """All cases, each with one line as it is done. timer None: check, do not time."""
    import torch

    outcomes: list[Outcome] = []
    lost = ""
    for case in cases:
        outcome = Outcome(case)
        outcomes.append(outcome)
        if lost:
            outcome.faults.append(f"not run: the GPU's context was lost in {lost}; --families runs others alone")
        else:
            torch.manual_seed(0)
            try:
                examine(case, timer, outcome)
            except Exception as error:
                outcome.faults.append(reason(error))
            if outcome.faults and device_lost():
                lost = f"{case.family} {case.name}"
        show(line(outcome, gpu))
        if not lost:
            gc.collect()
            torch.cuda.empty_cache()  # does nothing before CUDA is initialised
    return outcomes


def line(outcome: Outcome, gpu: cost.Gpu) -> str:
    cells = [
        f"{path}{'*' if path == outcome.taken else ''} {1e6 * timing.median:.1f}|{1e6 * outcome.models[path](gpu):.1f}"
        for path, timing in outcome.times.items()
    ]
    head = f"{outcome.case.family:9} {outcome.case.name:46} {'FAIL' if outcome.faults else 'pass'}  {'  '.join(cells)}"
    return "\n".join([head.rstrip(), *(f"{'':10}FAIL {fault}" for fault in outcome.faults)])


def summary(outcomes: Sequence[Outcome], others: Sequence[tuple[str, str]] = ()) -> tuple[str, bool]:
    """The table of all families, and whether everything passed. others: (what, why it failed or "") besides the cases."""
    lines = [f"{'family':10} {'cases':>5} {'passed':>6} {'failed':>6}  {'error':>6}  {'time':>6}  of its limit, where"]
    for family in dict.fromkeys(outcome.case.family for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.case.family == family]
        failed = sum(bool(outcome.faults) for outcome in own)
        error = max((value for outcome in own for value in outcome.errors.values()), default=None)
        worst = max(((r, text, o.case.name) for o in own for text, r in o.ratios.items()), default=None)
        cells = [f"{error:.3f}" if error is not None else "-", f"{worst[0]:.3f}" if worst else "-"]
        where = f"{worst[2]}: {worst[1]}" if worst else ""
        lines.append(
            f"{family:10} {len(own):5} {len(own) - failed:6} {failed:6}  {cells[0]:>6}  {cells[1]:>6}  {where}".rstrip()
        )
    lines += [f"{what:10} {'FAIL ' + why if why else 'pass'}" for what, why in others]
    good = bool(outcomes) and not any(outcome.faults for outcome in outcomes) and not any(why for _, why in others)
    lines.append("all pass" if good else "FAILED")
    return "\n".join(lines), good


def sanitize() -> list[tuple[str, str]]:
    """compute-sanitizer over every family at small shapes. Without torch's cache of memory each tensor is an allocation of
    its own, whose ends memcheck sees."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("\ncompute-sanitizer is not on PATH (it comes with the CUDA toolkit): memcheck and racecheck did not run")
        return []
    found = []
    for check in SANITIZERS:
        print(f"\ncompute-sanitizer --tool {check}", flush=True)
        command = [tool, "--tool", check, "--error-exitcode", "1", sys.executable, __file__, "--tiny"]
        done = subprocess.run(command, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, check=False)
        found.append((check, f"exit status {done.returncode}" if done.returncode else ""))
    return found


def record(outcomes: Sequence[Outcome], gpu: cost.Gpu) -> list[dict[str, Any]]:
    return [
        {
            "family": outcome.case.family,
            "case": outcome.case.name,
            "seconds": {path: asdict(timing) for path, timing in outcome.times.items()},
            "predicted": {path: model(gpu) for path, model in outcome.models.items()},
            "error_of_bound": outcome.errors,
            "time_of_limit": outcome.ratios,
            "faults": outcome.faults,
        }
        for outcome in outcomes
    ]


def run(args: argparse.Namespace, properties: Any, device: str, timer: Callable[[Any], Timing] | None) -> int:
    """Everything that was asked for. properties: those of torch.cuda; timer None: check, do not time."""
    import torch
    import triton  # type: ignore[import-untyped]
    from kernel_cases import ACCEPTANCE, MODELS, TINY, cases
    from kernel_fit import points_of, report

    gpu = cost.GPU_OF_ARCH[nearest_arch(10 * properties.major + properties.minor)]
    about = {
        "machine": machine(), "gpu": properties.name, "capability": f"sm_{properties.major}{properties.minor}",
        "driver": driver(), "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__,
        "modelled as": gpu.name,
    }  # fmt: skip
    print("\n".join(f"{name:12} {text}" for name, text in about.items()))
    shapes = TINY if args.tiny else MODELS
    if args.ranks:
        shapes = replace(shapes, ranks=tuple(args.ranks))
    print("\nlimits:")
    for name, figure, origin in ACCEPTANCE:
        print(f"  {name:9} {figure:66} {origin}")
    flushed("\nµs: measured|predicted by the roofline. merged: the layer without an adapter; * what dispatch takes")
    first, step = args.part or (0, 1)
    with torch.inference_mode():
        chosen = itertools.islice(cases(gpu, device, shapes, tuple(args.families)), first, None, step)
        outcomes = measure(chosen, gpu, timer)
    result: dict[str, Any] = {"about": about, "cases": record(outcomes, gpu)}
    others: list[tuple[str, str]] = []
    if args.fit:
        result["fit"] = report(gpu, points_of(outcomes))
    if args.sanitize:
        others += sanitize()
    if args.network:
        from bench_network import network

        result["network"], faults = network(args.work)
        others.append(("network", "; ".join(faults)))
    result["others"] = others
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
        print(f"\nwrote {args.json}")
    table, good = summary(outcomes, others)
    print(f"\n{table}")
    return 0 if good or (args.part and not outcomes) else 1


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="store_true", help="print the roofline; needs no GPU")
    parser.add_argument("--gpus", nargs="+", choices=sorted(cost.GPUS), default=list(MODELED), help="with --model")
    parser.add_argument("--ranks", nargs="+", type=int, help="default: 4 to 128 with --model, else 16 to 128")
    parser.add_argument("--families", nargs="+", choices=FAMILY_NAMES, default=list(FAMILY_NAMES))
    parser.add_argument(
        "--fit", action="store_true", help="the constants of cost.py that fit the measured linear layers"
    )
    parser.add_argument("--json", type=Path, help="file to write every measurement to")
    parser.add_argument("--sanitize", action="store_true", help="memcheck and racecheck at small shapes as well")
    parser.add_argument("--network", action="store_true", help="a whole SD1.5-shaped denoiser beside diffusers as well")
    parser.add_argument(
        "--work", type=Path, default=Path("out/sd15"), help="folder for --network's model (4.3 GB), kept"
    )
    parser.add_argument(
        "--part",
        nargs=2,
        type=int,
        metavar=("I", "N"),
        help="every N-th case from the I-th, not timed: fills Triton's cache",
    )
    parser.add_argument("--on", default="cuda", help=argparse.SUPPRESS)  # cpu: as an sm_80 in the interpreter
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # small shapes, checked and not timed
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    if args.model:
        print_model(args.gpus, args.ranks or RANKS)
        return 0
    if args.on == "cpu":
        return run(args, SimpleNamespace(name="pretended", major=8, minor=0), "cpu", None)
    if lines := list(missing()):
        print(f"cannot run: {'; '.join(lines)}. Without a GPU, --model prints the prediction", file=sys.stderr)
        return 2
    import torch

    timed = not args.tiny and not args.part
    if timed:
        raise_clocks()
    return run(args, torch.cuda.get_device_properties(0), "cuda", CudaTimer() if timed else None)


if __name__ == "__main__":
    sys.exit(main())
