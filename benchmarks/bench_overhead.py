"""What the engine itself costs: host time of a plan, a submit, a step and a result; import; cold start.

    python benchmarks/bench_overhead.py [BUNDLE]

Host times are measured on the fake backend at SD1.5's 512x512 latent size. `plan`: `compile_plan`, with another guidance
weight each time (cold) and the same request again (cached). `submit`: the call on the caller's thread. Both are processor
time of that thread. `step`: the wall time from the first submit to the last result less the time inside the networks, over
the steps of all requests. `result`: wall time from the decoder's return to the future's callback. Submit and result also
with a manifest like that of an SD1.5 bundle with two variants of the denoiser (`LAYERS`). With a bundle (default
out/emoji.bundle, if there) it also measures the time from starting Python to the first image on disk, without and with the
engine library's cache.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from harness import machine

from stepforge import Bundle, Engine, Request
from stepforge.runtime.backends.fake import Fake, fake_bundle
from stepforge.runtime.bundle import Module
from stepforge.runtime.plan.compile import compile_plan

ROOT = Path(__file__).resolve().parents[1]
LAYERS, FILES = 900, 1500  # modules and files of one network; the SD1.5 UNet has 686 tensors


def large_bundle() -> Bundle:
    """The fake bundle with a manifest as long as one of Stable Diffusion 1.5: layers of the denoiser, files of all networks."""
    bundle = fake_bundle()
    modules = tuple(
        Module(f"down_blocks.0.attentions.0.transformer_blocks.0.{i}.to_q", "linear", (320, 320), False)
        for i in range(2 * LAYERS)
    )
    components = {
        key: replace(entry, modules=modules) if str(key).startswith("denoiser") else entry
        for key, entry in bundle.components.items()
    }
    files = {f"denoiser/unet/weights/{i:05d}.bin": (1 << 20, f"{i:064x}") for i in range(2 * FILES)}
    return replace(bundle, components=components, files=files)


class Timed(Fake):
    """The fake backend, with a denoiser that costs next to nothing and the clock around every network."""

    seconds = 0.0
    decoded = 0.0  # when the decoder last returned

    def open(self, component, banks=None):  # type: ignore[no-untyped-def]
        graph = super().open(component, banks)
        if str(component).startswith("denoiser/"):
            outputs: dict[int, np.ndarray] = {}

            def graph(inputs, outputs=outputs):  # type: ignore[no-untyped-def]
                rows = len(inputs["sample"])
                if rows not in outputs:
                    outputs[rows] = np.zeros_like(inputs["sample"])
                return {"prediction": outputs[rows]}

        def run(inputs):  # type: ignore[no-untyped-def]
            started = time.perf_counter()
            result = graph(inputs)
            self.decoded = time.perf_counter()
            self.seconds += self.decoded - started
            return result

        return run


def plan_microseconds(sampler: str, steps: int, runs: int = 40) -> dict[str, list[float]]:
    card = fake_bundle().scheduler
    requests = [Request(prompt="x", sampler=sampler, steps=steps, guidance=7.5 + k / 1000) for k in range(runs)]
    return {
        "cold": timed([lambda request=request: compile_plan(request, card) for request in requests]),  # type: ignore[misc]
        "cached": timed([lambda: compile_plan(requests[-1], card)] * runs),
    }


def edge_microseconds(bundle: Bundle, runs: int = 60) -> dict[str, list[float]]:
    """Submit and result of requests of one step, one after the other."""
    backend = Timed(bundle)
    submits, results = [], []
    with Engine(bundle, backend) as engine:
        for k in range(runs):
            request = Request(prompt="a cat", steps=20, sampler="unipc", guidance=1.0, seed=k)
            done: list[float] = []
            started = time.thread_time()
            future = engine.submit(request)
            submits.append(1e6 * (time.thread_time() - started))
            future.add_done_callback(lambda _, done=done: done.append(time.perf_counter()))  # type: ignore[misc]
            future.result()
            while not done:
                time.sleep(0.001)
            results.append(1e6 * (done[0] - backend.decoded))
    return {"submit": submits[1:], "result": results[1:]}


def timed(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Processor microseconds of each call."""
    found = []
    for call in calls:
        started = time.thread_time()
        call()
        found.append(1e6 * (time.thread_time() - started))
    return found


def spread(values: Sequence[float]) -> str:
    return f"{min(values):9.1f} {statistics.median(values):9.1f}"


def host_microseconds(requests: int, guidance: float, steps: int = 1000) -> float:
    """Host time of one request's step, in a batch of `requests`."""
    bundle = fake_bundle()
    backend = Timed(bundle)
    with Engine(bundle, backend, max_rows=2 * requests) as engine:
        batch = [Request(prompt="x", steps=steps, guidance=guidance, seed=i) for i in range(requests)]
        engine.generate([Request(prompt="x", steps=2, guidance=guidance)])
        backend.seconds = 0.0
        started = time.perf_counter()
        engine.generate(batch)
        wall = time.perf_counter() - started
    return 1e6 * (wall - backend.seconds) / (steps * requests)


def import_cost() -> dict[str, float]:
    """Seconds and peak megabytes of `import stepforge` and of opening both engine libraries."""
    code = (
        "import time,sys,json;s=time.perf_counter();import stepforge as r;a=time.perf_counter()-s;"
        "import stepforge.runtime.backends.openvino,stepforge.runtime.backends.onnxruntime;b=time.perf_counter()-s;"
        "import resource;print(json.dumps([a,b,resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024,"
        "'torch' in sys.modules]))"
    )
    runs = [json.loads(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5)]
    assert not any(run[3] for run in runs), "the run time imported torch"
    return {
        "import stepforge, s": round(statistics.median(run[0] for run in runs), 3),
        "and openvino + onnxruntime, s": round(statistics.median(run[1] for run in runs), 3),
        "peak resident, MB": round(statistics.median(run[2] for run in runs), 1),
    }


def cold_start(bundle: Path, backend: str) -> dict[str, float]:
    """Seconds from starting Python to the first image on disk: first ever, and with the engine library's cache."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "stepforge.runtime", "generate", str(bundle), "cat face on a blue background",
            "--backend", backend, "--out", f"{folder}/x.png", "--overwrite",
        ]  # fmt: skip
        environment = {**os.environ, "STEPFORGE_CACHE": f"{folder}/cache"}
        seconds = []
        for _ in range(4):
            started = time.perf_counter()
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - started)
    return {"first, s": round(seconds[0], 2), "again, s": round(statistics.median(seconds[1:]), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", default=ROOT / "out/emoji.bundle")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--host-only", action="store_true", help="Leave out import and cold start.")
    args = parser.parse_args()
    print(machine())
    print("\nhost time, microseconds: smallest, median")
    for sampler, steps in (("ddim", 20), ("unipc", 20), ("lms", 50)):
        for what, values in plan_microseconds(sampler, steps).items():
            print(f"  plan, {steps}-step {sampler}, {what:7}{spread(values)}")
    for name, bundle in (("fake manifest", fake_bundle()), ("SD1.5-sized manifest", large_bundle())):
        for what, values in edge_microseconds(bundle).items():
            print(f"  {what}, {name:21}{spread(values)}")
    for requests in (1, 4, 16):
        for guidance in (1.0, 7.5):
            values = [host_microseconds(requests, guidance) for _ in range(args.runs)]
            print(f"  step, {requests:3} requests, guidance {guidance}: {spread(values)}")
    if args.host_only:
        return
    print("\nimport:", json.dumps(import_cost()))
    if args.bundle.exists():
        for backend in ("openvino", "onnxruntime"):
            print(f"cold start to the first 20-step image, {backend}:", json.dumps(cold_start(args.bundle, backend)))
    print(f"peak resident of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
