"""What LoRA at run time costs: `python benchmarks/bench_lora.py`, on a model with the shape of SD 1.5 and random weights.

    pass        one denoiser pass of 2 rows, without banks (as with merged weights) against with banks, in turn
    swap        an adapter of rank 16 for the whole model: reading its file, and putting it into a slot of a running engine
    throughput  16 requests with 8 adapters: all mixed in one batch, against one adapter after the other

`--work` keeps the 4.3 GB model and its bundles for the next call (the same folder as bench_denoiser.py's).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_denoiser import inputs, prepare
from harness import Timing, interleaved, machine, timed

from stepforge.runtime.bundle import UNET

RUNNERS = ("openvino bf16", "openvino fp32", "onnxruntime fp32")
ADAPTERS, REQUESTS = 8, 16


def write_adapter(bundle: Path, out: Path, rank: int, targets: str, seed: int) -> None:
    """A random adapter in kohya's layout, fp16, for every layer that a bank of these targets covers."""
    from safetensors.numpy import save_file

    from stepforge.runtime.bundle import read

    random = np.random.default_rng(seed)
    tensors = {}
    for component, entry in read(bundle, check=False).components.items():
        prefix = "lora_unet_" if component.role == "denoiser" else "lora_te_text_model_"
        for module in entry.modules:
            narrow = targets == "transformer" and component.role == "denoiser" and ".attentions." not in module.path
            if module.kind == "norm" or narrow:
                continue
            name = prefix + module.path.replace(".", "_")
            down = 0.02 * random.standard_normal((rank, *module.shape[1:]), np.float32)
            up = 0.02 * random.standard_normal((module.shape[0], rank, *(1 for _ in module.shape[2:])), np.float32)
            tensors |= {
                f"{name}.lora_down.weight": down.astype(np.float16),
                f"{name}.lora_up.weight": up.astype(np.float16),
            }
            tensors[f"{name}.alpha"] = np.array(rank, np.float16)
    save_file(tensors, out)


def measure_pass(args: argparse.Namespace) -> dict[str, Any]:
    """One runner, plain and banked in turn; a process of its own."""
    from stepforge import open_bundle
    from stepforge.runtime.backends import open_backend
    from stepforge.runtime.engine.adapters import Adapters, row_inputs

    backend, precision = args.one.split()
    plain, banked = open_bundle(args.work / "bundle", check=False), open_bundle(args.banks, check=False)
    plain_graph = open_backend(backend, plain, precision=precision).open(UNET)
    engine = open_backend(backend, banked, precision=precision)
    adapters = Adapters(banked, engine)
    adapters.load("one", args.adapter)
    adapters.load("two", args.adapter)
    slots = [adapters.acquire(adapters.choose({name: 1.0}), ()) for name in ("one", "two")]
    banked_graph = engine.open(UNET, adapters.banks(UNET))
    values = inputs(args.size)
    rows = {**values, **row_inputs(slots, [1.0, 1.0])}
    runs = {"plain": lambda: plain_graph(values), "banks": lambda: banked_graph(rows)}
    return {name: [t.median, t.low, t.high] for name, t in interleaved(runs, runs=args.runs).items()}


def measure_swap(args: argparse.Namespace) -> dict[str, Any]:
    """In a running engine of the first runner."""
    from stepforge import load

    backend, precision = args.one.split()
    with load(args.banks, backend=backend, precision=precision) as engine:
        adapters = engine.adapters
        names = iter(range(10**6))

        def read() -> None:
            adapters.load(str(next(names)), args.adapter)

        reading = timed(read, runs=5)
        sets = [adapters.choose({name: 1.0}) for name in adapters.list()]
        seconds = []
        for _ in range(4):  # more sets than slots: each acquisition fills a slot
            for chosen in sets:
                started = time.perf_counter()
                adapters.acquire(chosen, ())
                seconds.append(time.perf_counter() - started)
        seconds = seconds[len(sets) :]  # the first round touches the banks' memory for the first time
        return {"read": [reading.median, reading.low, reading.high],
                "swap": [float(np.median(seconds)), min(seconds), max(seconds)]}  # fmt: skip


def measure_throughput(args: argparse.Namespace) -> dict[str, Any]:
    from stepforge import Request, load

    backend, precision = args.one.split()
    with load(args.banks, backend=backend, precision=precision) as engine:
        for index in range(ADAPTERS):
            engine.adapters.load(str(index), args.adapter)
        options = {"prompt": "a cat", "width": args.size, "height": args.size, "steps": args.steps, "sampler": "ddim"}
        requests = [Request(**options, seed=index, adapters={str(index % ADAPTERS): 1.0}) for index in range(REQUESTS)]

        def mixed() -> None:
            engine.generate(requests)

        def grouped() -> None:
            for index in range(ADAPTERS):
                engine.generate(requests[index::ADAPTERS])

        runs = interleaved({"mixed": mixed, "grouped": grouped}, runs=args.rounds)
        return {name: [t.median, t.low, t.high] for name, t in runs.items()}


MEASURES = {"pass": measure_pass, "swap": measure_swap, "throughput": measure_throughput}


def child(task: str, runner: str, args: argparse.Namespace, banks: Path, adapter: Path) -> dict[str, Timing]:
    command = [
        sys.executable, __file__, "--task", task, "--one", runner, "--work", args.work, "--banks", banks, "--adapter",
        adapter, "--size", args.size, "--runs", args.runs, "--steps", args.steps, "--rounds", args.rounds,
    ]  # fmt: skip
    output = subprocess.check_output(list(map(str, command)), env={**os.environ, "HF_HUB_OFFLINE": "1"}, text=True)
    return {name: Timing(*values) for name, values in json.loads(output.splitlines()[-1]).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="*", choices=tuple(MEASURES), default=list(MEASURES))
    parser.add_argument("--runners", nargs="*", default=list(RUNNERS))
    parser.add_argument("--targets", nargs="*", default=["transformer", "all"])
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--runs", type=int, default=7, help="counted passes")
    parser.add_argument("--steps", type=int, default=4, help="of each request in the throughput measurement")
    parser.add_argument("--rounds", type=int, default=2, help="counted rounds of the throughput measurement")
    parser.add_argument(
        "--work", type=Path, help="folder for the model and its bundles, kept; default: a temporary one"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--banks", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--adapter", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(MEASURES[args.task[0]](args)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        from stepforge.export.build import BankOptions, with_banks

        args.work = args.work or Path(temporary)
        args.work.mkdir(parents=True, exist_ok=True)
        prepare(args.work)
        print(machine())
        print(f"SD1.5-shaped, random weights, {args.size}x{args.size} pixels, {args.slots} slots of rank {args.rank}")
        for targets in args.targets:
            banks = args.work / f"banks-{targets}-{args.slots}-{args.rank}"
            adapter = args.work / f"adapter-{targets}-{args.rank}.safetensors"
            if not banks.exists():
                with_banks(args.work / "bundle", banks, BankOptions(args.slots, args.rank, targets))
            if not adapter.exists():
                write_adapter(args.work / "bundle", adapter, args.rank, targets, 0)
            print(f"\nlayers: {targets}; adapter file {adapter.stat().st_size / 1e6:.0f} MB")
            for runner in args.runners if "pass" in args.task else ():
                found = child("pass", runner, args, banks, adapter)
                ratio = found["banks"].median / found["plain"].median
                print(
                    f"  pass, 2 rows  {runner:18} plain {found['plain']}  banks {found['banks']}  {100 * (ratio - 1):+.1f} %"
                )
            if "swap" in args.task:
                for runner in args.runners:
                    found = child("swap", runner, args, banks, adapter)
                    print(f"  {runner:18} read the file {found['read']}  swap {found['swap']}")
            if "throughput" in args.task:
                found = child("throughput", args.runners[0], args, banks, adapter)
                ratio = found["grouped"].median / found["mixed"].median
                print(f"  {REQUESTS} requests, {ADAPTERS} adapters, {args.steps} steps, {args.runners[0]}: "
                      f"mixed {found['mixed']}  grouped {found['grouped']}  mixed is {ratio:.2f}x as fast")  # fmt: skip


if __name__ == "__main__":
    main()
