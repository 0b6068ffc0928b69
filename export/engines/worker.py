"""One plan, built in a process of its own: parsers and compilers of other people's graphs crash, and need their memory back.

    python -m stepforge.export.engines.worker < job.json

Progress goes to standard output, a JSON line each: {"phase": ..., "done": ..., "total": ...}. The plan, and `result.json`
with what a card needs to know of it, go to the job's folder. What fails is one line on standard error, and exit code 1.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from stepforge.export.engines import plugin
from stepforge.export.engines.lower import lowered, weight_table
from stepforge.runtime.backends.gpu import OLDEST, first_gpu
from stepforge.runtime.backends.tensorrt.library import BuildOptions, Library
from stepforge.runtime.backends.tensorrt.plans import INLINE, PLAN, Shapes
from stepforge.runtime.bundle.typed import Between, parse
from stepforge.runtime.errors import BackendError, StepforgeError
from stepforge.runtime.files import printable, strict_json

RESULT, TIMINGS = "result.json", "timings"


@dataclass(frozen=True, slots=True)
class Job:
    """Paths are absolute."""

    library: str
    graph: str  # checked before
    bundle: str  # folder of the bundle, of which weights are named relative to
    precision: str
    banks: tuple[str, ...]
    profiles: Annotated[tuple[Mapping[str, Shapes], ...], Between(1, 64)]
    options: BuildOptions
    folder: str
    timings: str  # measurements of earlier builds; empty: none are kept


def main() -> int:
    started = time.monotonic()
    try:
        job = parse(Job, strict_json(sys.stdin.buffer.read()), "job")
        result = build(job)
    except (StepforgeError, ValueError, OSError, MemoryError) as error:
        print(printable(error, 1000) or type(error).__name__, file=sys.stderr)
        return 1
    result["seconds"] = round(time.monotonic() - started, 2)
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    Path(job.folder, RESULT).write_text(json.dumps(result), "utf-8")
    return 0


def build(job: Job) -> dict[str, Any]:
    """Lower, parse, build and write one plan. Raises BackendError."""
    folder = Path(job.folder)
    library = Library(job.library)
    library.check(job.options)
    say("lower", 0, 1)
    graph = lowered(Path(job.graph), job.precision, job.banks, folder)
    module = library.module
    logger, monitor = _logger(module), _monitor(module)
    builder = module.Builder(logger)
    network = library.network(builder)
    say("parse", 0, 1)
    parser = module.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise BackendError(f"{library.name} cannot parse the graph: {'; '.join(library.errors(parser)) or logger.last}")
    if job.options.lora_plugin:
        gpu = first_gpu()
        major, minor = OLDEST if gpu is None or job.options.hardware_compatible else gpu.capability
        plugin.insert(network, module, library.plugins(), plugin.sites(graph, job.banks), 10 * major + minor)
    config = builder.create_builder_config()
    library.configure(config, job.options)
    for shapes in job.profiles:
        profile = builder.create_optimization_profile()
        for name, limits in shapes.items():
            profile.set_shape(name, limits.low, limits.best, limits.high)
        config.add_optimization_profile(profile)
    timings = Path(job.timings) if job.timings else None
    cache = None
    if timings is not None:
        cache = library.timing_cache(config, timings.read_bytes() if timings.is_file() else b"")
    config.progress_monitor = monitor
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise BackendError(f"{library.name} cannot build the network: {logger.last or 'it gives no reason'}")
    digest = hashlib.sha256(memoryview(serialized)).hexdigest()
    (folder / PLAN).write_bytes(memoryview(serialized))
    if cache is not None:
        (folder / TIMINGS).write_bytes(memoryview(cache.serialize()))
    weights = {}
    if job.options.strip_weights:
        weights = weight_table(Path(job.graph), graph, Path(job.bundle), folder / INLINE)
    return {
        "version": library.version,
        "inputs": {t.name: library.dtype(t.dtype) for t in map(network.get_input, range(network.num_inputs))},
        "outputs": {t.name: library.dtype(t.dtype) for t in map(network.get_output, range(network.num_outputs))},
        "layers": layers(library, network),
        "weights": {name: asdict(weight) for name, weight in weights.items()},
        "bytes": (folder / PLAN).stat().st_size,
        "sha256": digest,
        "warnings": logger.warnings,
    }


def layers(library: Library, network: Any) -> dict[str, int]:
    """Kinds of layers and what they compute in, as the strongly typed network states it before fusion."""
    found: Counter[str] = Counter()
    for at in range(network.num_layers):
        layer = network.get_layer(at)
        found[f"{layer.type.name} {library.dtype(layer.get_output(0).dtype)}"] += 1
    return dict(sorted(found.items()))


def say(phase: str, done: int, total: int) -> None:
    print(json.dumps({"phase": phase, "done": done, "total": total}), flush=True)


def _logger(module: Any) -> Any:
    """Keeps the last error, which the calls themselves do not tell, and the warnings."""

    class Logger(module.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.last = ""
            self.warnings: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity <= module.ILogger.ERROR:
                self.last = printable(text, 400)
            elif severity == module.ILogger.WARNING:
                self.warnings.append(printable(text, 400))

    return Logger()


def _monitor(module: Any) -> Any:
    class Monitor(module.IProgressMonitor):  # type: ignore[misc, name-defined]
        """The outermost phases; inner ones have no known end."""

        def __init__(self) -> None:
            super().__init__()
            self._totals: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._totals[phase] = steps
            say(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            say(phase, step + 1, self._totals.get(phase, step + 1))
            return True

        def phase_finish(self, phase: str) -> None:
            self._totals.pop(phase, None)

    return Monitor()


if __name__ == "__main__":
    sys.exit(main())
