"""What the engine itself costs: host time per step, import, cold start. `python benchmarks/bench_overhead.py [BUNDLE]`.

Host time is measured on the fake backend at SD1.5's 512x512 latent size: the wall time from the first submit to the
last result less the time inside the networks, over the steps of all requests. With a bundle (default out/emoji.bundle,
if there) it also measures the time from starting Python to the first image on disk, without and with the engine
library's cache.
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
from pathlib import Path

import numpy as np
from harness import machine

from stepforge import Engine, Request
from stepforge.runtime.backends.fake import Fake, fake_bundle

ROOT = Path(__file__).resolve().parents[1]


class Timed(Fake):
    """The fake backend, with a denoiser that costs next to nothing and the clock around every network."""

    seconds = 0.0

    def open(self, component):  # type: ignore[no-untyped-def]
        graph = super().open(component)
        if component.role == "denoiser":
            outputs: dict[int, np.ndarray] = {}

            def graph(inputs, outputs=outputs):  # type: ignore[no-untyped-def]
                rows = len(inputs["sample"])
                if rows not in outputs:
                    outputs[rows] = np.zeros_like(inputs["sample"])
                return {"prediction": outputs[rows]}

        def run(inputs):  # type: ignore[no-untyped-def]
            started = time.perf_counter()
            result = graph(inputs)
            self.seconds += time.perf_counter() - started
            return result

        return run


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
    args = parser.parse_args()
    print(machine())
    print("\nhost time of one step, microseconds (median of runs, smallest..largest)")
    for requests in (1, 4, 16):
        for guidance in (1.0, 7.5):
            values = [host_microseconds(requests, guidance) for _ in range(args.runs)]
            spread = f"({min(values):.0f}..{max(values):.0f})"
            print(f"  {requests:3} requests, guidance {guidance}: {statistics.median(values):7.1f} each {spread}")
    print("\nimport:", json.dumps(import_cost()))
    if args.bundle.exists():
        for backend in ("openvino", "onnxruntime"):
            print(f"cold start to the first 20-step image, {backend}:", json.dumps(cold_start(args.bundle, backend)))
    print(f"peak resident of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
