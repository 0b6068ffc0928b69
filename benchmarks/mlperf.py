"""MLPerf Inference's LoadGen over a bundle: SingleStream, Offline and Server, one process each.

    pip install mlcommons-loadgen
    python benchmarks/mlperf.py out/emoji.bundle --steps 20 --guidance 3 --json benchmarks/results/mlperf_emoji.json
    python benchmarks/mlperf.py sdxl.bundle --model stable-diffusion-xl --prompts captions.txt ...   see docs/mlperf.md

LoadGen decides what is asked when, and what counts: the harness hands its queries to the engine as they come and tells it when
images are there. Its logs stay in --out. A short run is no submission: what LoadGen says of validity stands in the result.
"""

import argparse
import array
import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import mlperf_loadgen as loadgen
import numpy as np
from harness import machine

import stepforge

SCENARIOS = ("SingleStream", "Offline", "Server")
PROMPTS = Path(__file__).parents[1] / "examples/emoji/prompts.txt"
NEGATIVE = {
    "stable-diffusion-xl": "normal quality, low quality, worst quality, low res, blurry, nsfw, nude"
}  # the reference's
SUMMARY = {  # lines of LoadGen's summary that stand in our result
    "Result is": "result",
    "Samples per second": "samples_per_second",
    "Completed samples per second": "samples_per_second",
    "90.00 percentile latency (ns)": "latency_p90_ns",
    "99.00 percentile latency (ns)": "latency_p99_ns",
    "50.00 percentile latency (ns)": "latency_p50_ns",
    "Mean latency (ns)": "latency_mean_ns",
    "min_query_count": "min_query_count",
    "min_duration (ms)": "min_duration_ms",
}


class Samples:
    """LoadGen's query sample library: prompts. Only loaded ones may be asked for."""

    def __init__(self, prompts: list[str], count: int) -> None:
        self.prompts = prompts
        self.loaded: set[int] = set()
        self.handle = loadgen.ConstructQSL(len(prompts), min(count, len(prompts)), self.load, self.unload)

    def load(self, indices: list[int]) -> None:
        self.loaded.update(indices)

    def unload(self, indices: list[int]) -> None:
        self.loaded.difference_update(indices)

    def __getitem__(self, index: int) -> str:
        if index not in self.loaded:
            raise IndexError(f"LoadGen asks for sample {index}, which it has not loaded")
        return self.prompts[index]


class System:
    """LoadGen's system under test: an engine. `issue` queues and returns, a thread of our own feeds the engine."""

    def __init__(self, engine: stepforge.Engine, samples: Samples, options: dict[str, Any]) -> None:
        self.engine, self.samples, self.options = engine, samples, options
        self.failures: list[str] = []
        self.images = 0
        self._asked: queue.SimpleQueue = queue.SimpleQueue()
        self._ended: queue.SimpleQueue = queue.SimpleQueue()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._feed, self._tell)]
        for thread in self._threads:
            thread.start()
        self.handle = loadgen.ConstructSUT(self.issue, lambda: None)

    def issue(self, queries: list) -> None:
        for query in queries:
            self._asked.put((query.id, query.index))

    def close(self) -> None:
        self._asked.put(None)
        self._threads[0].join()
        self._ended.put(None)
        self._threads[1].join()

    def _feed(self) -> None:
        while (asked := self._asked.get()) is not None:
            number, index = asked
            try:
                future = self.engine.submit(self.samples[index], wait=True, **self.options)
                future.add_done_callback(lambda done, number=number: self._ended.put((number, done.result)))
            except Exception as error:
                self._ended.put((number, lambda error=error: (_ for _ in ()).throw(error)))

    def _tell(self) -> None:
        """A failed query is answered with nothing, so that the run ends, and counted."""
        while (ended := self._ended.get()) is not None:
            number, result = ended
            data = array.array("B")
            try:
                data.frombytes(np.asarray(result().images[0], np.uint8).tobytes())
                self.images += 1
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")
            address, size = data.buffer_info()
            loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(number, address, size)])  # reads the data at once


def settings_of(options: argparse.Namespace) -> loadgen.TestSettings:
    """LoadGen applies its own mlperf.conf on the first call of a process alone, so there is one scenario a process."""
    settings = loadgen.TestSettings()
    settings.scenario = getattr(loadgen.TestScenario, options.scenario)
    settings.mode = loadgen.TestMode.AccuracyOnly if options.accuracy else loadgen.TestMode.PerformanceOnly
    code = settings.FromConfig(str(options.conf or "/nonexistent"), options.model, options.scenario, 1)
    if options.conf and code:
        sys.exit(f"LoadGen does not read {options.conf}")
    settings.scenario = getattr(loadgen.TestScenario, options.scenario)
    if options.min_duration is not None:
        settings.min_duration_ms = round(1000 * options.min_duration)
    if options.min_queries is not None:
        settings.min_query_count = options.min_queries
    if options.qps is not None:
        settings.server_target_qps = settings.offline_expected_qps = options.qps
    if options.latency is not None:
        settings.server_target_latency_ns = round(1e9 * options.latency)
    return settings


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One scenario in this process."""
    text = options.prompts.read_text(encoding="utf-8")
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    fields = {"steps": options.steps, "guidance": options.guidance, "seed": options.seed, "negative": options.negative}
    if options.sampler:
        fields["sampler"] = options.sampler
    folder = options.out / options.scenario
    folder.mkdir(parents=True, exist_ok=True)
    settings = settings_of(options)
    logs = loadgen.LogSettings()
    logs.log_output.outdir = str(folder)
    logs.log_output.copy_summary_to_stdout = False
    logs.enable_trace = False
    with stepforge.load(
        options.bundle, backend=options.backend, threads=options.threads, max_rows=options.max_rows
    ) as engine:
        samples = Samples(prompts, settings.performance_sample_count_override or len(prompts))
        system = System(engine, samples, fields)
        engine.generate([prompts[0]] * (options.max_rows // 2), **fields)  # a full call, uncounted
        started = time.perf_counter()
        loadgen.StartTestWithLogSettings(system.handle, samples.handle, settings, logs, "")
        seconds = time.perf_counter() - started
        system.close()
        loadgen.DestroySUT(system.handle)
        loadgen.DestroyQSL(samples.handle)
        facts = {"backend": engine.backend.name, "precision": engine.backend.precision, "bundle": engine.bundle.digest}
    return {
        "scenario": options.scenario, "mode": "accuracy" if options.accuracy else "performance", **facts,
        "images": system.images, "failures": len(system.failures), "first_failures": system.failures[:3],
        "seconds": round(seconds, 2), **summary(folder / "mlperf_log_summary.txt"),
    }  # fmt: skip


def summary(path: Path) -> dict[str, Any]:
    """LoadGen's verdict; nothing in accuracy mode, where it makes none."""
    found: dict[str, Any] = {}
    reasons: list[str] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        name, colon, value = (part.strip() for part in line.partition(":"))
        if colon and name in SUMMARY and SUMMARY[name] not in found:
            found[SUMMARY[name]] = float(value) if value.replace(".", "", 1).isdigit() else value
        elif line.lstrip().startswith("*"):
            reasons.append(line.strip(" *"))
    return {**found, "reasons": reasons} if found else {}


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--scenario", default="all", choices=("all", *SCENARIOS))
    parser.add_argument("--model", default="stepforge", help="a name of mlperf.conf's, such as stable-diffusion-xl")
    parser.add_argument("--conf", type=Path, help="user.conf of a submission")
    parser.add_argument(
        "--accuracy", action="store_true", help="every sample once; images go into mlperf_log_accuracy.json"
    )
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="a prompt a line")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=8.0)
    parser.add_argument("--sampler", default="")
    parser.add_argument("--negative", help="[default: the reference's of --model, or none]")
    parser.add_argument(
        "--seed", type=int, default=0, help="of every sample, as the reference gives all the same latents"
    )
    parser.add_argument("--min-duration", type=float, help="seconds")
    parser.add_argument("--min-queries", type=int)
    parser.add_argument("--qps", type=float, help="arrivals a second in Server, expected rate in Offline")
    parser.add_argument("--latency", type=float, help="seconds at the 99th percentile in Server")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-rows", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("out/mlperf"), help="LoadGen's logs, a folder a scenario")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.negative is None:
        options.negative = NEGATIVE.get(options.model, "")
    return options


def main() -> None:
    options = parsed()
    if options.scenario != "all":
        try:
            found = run(options)
        except stepforge.StepforgeError as error:
            sys.exit(f"mlperf.py: {error}")
        print(json.dumps(found))
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
        sys.exit(1 if found["failures"] else 0)
    rows, failed = [], False
    for scenario in SCENARIOS:
        command = [
            sys.executable,
            __file__,
            *sys.argv[1:],
            "--scenario",
            scenario,
            "--json",
            str(options.out / "last.json"),
        ]
        options.out.mkdir(parents=True, exist_ok=True)
        failed |= subprocess.run(command).returncode != 0
        rows.append(json.loads((options.out / "last.json").read_text()))
    load = [round(value, 1) for value in os.getloadavg()]  # machine's load behind the runs: what else it had to do
    result = {
        "machine": machine(),
        "load_average": load,
        "arguments": sys.argv[1:],
        "loadgen": version_of_loadgen(),
        "scenarios": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(1 if failed else 0)


def version_of_loadgen() -> str:
    from importlib.metadata import version

    return version("mlcommons-loadgen")


if __name__ == "__main__":
    main()
