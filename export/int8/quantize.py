"""A bundle's denoisers and ControlNets in INT8, beside their float graphs and over the same weights.

The float networks and what they compute stay as they are; `precision="int8"` runs the new graphs. The ranges are static: one
engine call holds rows at any noise levels, and none may depend on its neighbours. Their cost against ranges of each step's own
is measured in docs/quantization.md.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stepforge.export.graph.check import check_tensors, check_typing, open_in_onnxruntime, open_in_openvino
from stepforge.export.int8.calibrate import Measured, Simulation, measure, record
from stepforge.export.int8.choose import Chosen, choose
from stepforge.export.int8.rewrite import Range, write_quantized
from stepforge.export.parity.reference import drawn_hint
from stepforge.export.publish import check_out, staged
from stepforge.runtime.backends import Arrays, open_backend
from stepforge.runtime.bundle import INT8, Bundle, Component, ComponentId, Role, read, sha256, write_manifest
from stepforge.runtime.errors import CheckpointError, RequestError
from stepforge.runtime.request import Control, Request

ROLES: tuple[Role, ...] = ("denoiser", "control_residuals")
LIMIT = 0.04  # error of a network's output at any noise level
JUDGED, JUDGED_ROWS = 3, 2  # calls (start, middle, end of a trajectory), and rows of each, that errors are measured on

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the engine draws to see the networks' activations: prompts like those of the bundle's users."""

    prompts: Sequence[str]
    steps: int = 20
    guidance: float = 7.5
    width: int | None = None  # pixels; None: the model's own size
    height: int | None = None

    def requests(self, bundle: Bundle) -> list[Request]:
        """Each prompt, and the first once more with each ControlNet on a drawn hint."""
        options = {"steps": self.steps, "guidance": self.guidance, "width": self.width, "height": self.height}
        plain = [Request(prompt=prompt, seed=seed, **options) for seed, prompt in enumerate(self.prompts)]  # type: ignore[arg-type]
        controls = [Control(name=name, image=drawn_hint(bundle)) for name in bundle.controls]
        return plain + [Request(prompt=self.prompts[0], controls=(control,), **options) for control in controls]  # type: ignore[arg-type]


def quantize_bundle(
    path: str | Path,
    calibration: Calibration,
    *,
    out: str | Path | None = None,
    limit: float = LIMIT,
    progress: Progress = lambda stage: None,
) -> tuple[Bundle, dict[ComponentId, Chosen]]:
    """Add INT8 graphs to a bundle, or to a copy of it at `out`; the bundle, and what was chosen for each network.

    limit: largest relative L2 error of a network's output in integers against its own in float, on what the calibration
    showed it at the start, in the middle and at the end of a trajectory. Earlier INT8 graphs are replaced. A network that
    cannot keep the limit stays float.
    Raises RequestError, BundleError, BackendError, and CheckpointError if the bundle's weights are not fp32 or no network
    keeps the limit.
    """
    if not 0 < limit <= 1:
        raise RequestError(f"limit is {limit:g}; give a relative error above 0, at most 1")
    bundle = plain(read(path))
    if bundle.precision != "fp32":
        raise CheckpointError(
            f"{bundle.path} has weights in {bundle.precision}; integers are made of fp32, export it so"
        )
    target = bundle.path if out is None else Path(out)
    if out is not None:
        check_out(target, overwrite=False)
    progress("calibration")
    backend = open_backend("onnxruntime", bundle, precision="fp32")
    calls = record(bundle, backend, calibration.requests(bundle), ROLES)
    del backend
    with staged(target, overwrite=out is None) as folder:
        for name in bundle.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.file(name), folder / name)
        components, chosen = dict(bundle.components), {}
        for key, entry in bundle.components.items():
            if key.variant or not (given := calls.get(key)):
                continue
            progress(key.label)
            found = _choose(folder, entry, given, limit)
            if found is not None:
                chosen[key], ranges = found
                own = {other: e for other, e in bundle.components.items() if other.whole == key}
                components |= {other: _written(folder, e, ranges, chosen[key]) for other, e in own.items()}
        if not chosen:
            raise CheckpointError(f"no network of {bundle.path} keeps an error of {limit:g} in int8; raise the limit")
        new = [graph for entry in components.values() for graph in _graphs(entry)]
        files = {**bundle.files, **{name: (_size(folder, name), sha256(folder / name)) for name in new}}
        source = {**bundle.source, INT8: {str(key): _told(one, limit) for key, one in chosen.items()}}
        done = replace(bundle, path=folder, components=components, files=files, source=source, verdict=None)
        progress("check")
        for entry in components.values():
            _open(folder, entry)
        write_manifest(done)
    return replace(done, path=target), chosen


def plain(bundle: Bundle) -> Bundle:
    """The bundle without INT8 graphs."""
    gone = {graph for entry in bundle.components.values() for graph in _graphs(entry)}
    components = {
        key: replace(entry, derived={name: graph for name, graph in entry.derived.items() if graph not in gone})
        for key, entry in bundle.components.items()
    }
    files = {name: entry for name, entry in bundle.files.items() if name not in gone}
    source = {name: value for name, value in bundle.source.items() if name != INT8}
    return replace(bundle, components=components, files=files, source=source)


def _graphs(entry: Component) -> list[str]:
    """A component's INT8 graphs."""
    return [graph for name, graph in entry.derived.items() if name == INT8 or name.startswith(f"{INT8}-")]


def _size(folder: Path, name: str) -> int:
    return (folder / name).stat().st_size


def _choose(
    folder: Path, entry: Component, calls: Sequence[Arrays], limit: float
) -> tuple[Chosen, dict[str, Range]] | None:
    graph = folder / entry.graph
    measured: Measured = measure(graph, entry, calls)
    ranges = measured.static()
    judged = Simulation(graph, entry, ranges, _spread(calls))
    found = choose(judged.paths, measured.work, judged.errors, limit)
    return None if found is None else (found, ranges)


def _spread(calls: Sequence[Arrays]) -> list[Arrays]:
    """A few rows of a few calls, evenly over the noise levels and with both ends."""
    order = sorted(calls, key=lambda call: -float(call["timestep"].max()))
    found: list[Arrays] = []
    for index in _evenly(len(order), JUDGED):
        rows = len(order[index]["timestep"])
        at = _evenly(rows, JUDGED_ROWS)
        found.append({name: value[at] if len(value) == rows else value for name, value in order[index].items()})
    return found


def _evenly(count: int, most: int) -> NDArray[np.int64]:
    """At most that many of the first `count` numbers, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, most).round().astype(np.int64))


def _written(folder: Path, entry: Component, ranges: Mapping[str, Range], chosen: Chosen) -> Component:
    """A network or a variant of it with INT8 graphs beside its graphs."""
    derived = dict(entry.derived)
    for backend, graph in {"": entry.graph, **entry.derived}.items():
        path = Path(graph)
        name = path.with_name(f"{path.stem}.{INT8}.onnx").as_posix()
        write_quantized(folder / graph, folder / name, ranges, chosen.paths)
        derived[f"{INT8}-{backend}" if backend else INT8] = name
    return replace(entry, derived=derived)


def _open(folder: Path, entry: Component) -> None:
    """Raises CheckpointError for a graph that an engine does not load."""
    for name in _graphs(entry):
        path = folder / name
        check_typing(path)
        check_tensors(path, entry)
    if entry.has_int8:
        open_in_openvino(folder / entry.graph_for("openvino", INT8))
        open_in_onnxruntime(folder / entry.graph_for("onnxruntime", INT8))


def _told(chosen: Chosen, limit: float) -> dict[str, object]:
    """What the manifest says of a network's integers."""
    return {"limit": limit, "error": chosen.error, "work": chosen.work, "kept": [group.name for group in chosen.kept]}
