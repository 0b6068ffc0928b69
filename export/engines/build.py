"""`stepforge build`: plans of all components of a bundle, each built once for what it is built for.

A plan is built in a child process under a lock of its own, so that several builders share the work, and gets its place by one
rename: whoever looks sees no plan or the whole one. What is there already is not built again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stepforge.export.engines.step import shapes as step_shapes
from stepforge.export.engines.step import write as write_step
from stepforge.export.engines.worker import RESULT, TIMINGS, Job
from stepforge.runtime.backends.gpu import OLDEST, driver, first_gpu
from stepforge.runtime.backends.graph_file import checked_graph
from stepforge.runtime.backends.tensorrt import step
from stepforge.runtime.backends.tensorrt.library import BuildOptions, Library
from stepforge.runtime.backends.tensorrt.plans import (
    CARD,
    FORMAT,
    INLINE,
    PLAN,
    Card,
    Plan,
    Profile,
    card_json,
    component_hash,
    computed_in,
    key,
    root,
)
from stepforge.runtime.backends.tensorrt.profiles import Use, profiles
from stepforge.runtime.bundle import Bundle, ComponentId, Tensor
from stepforge.runtime.bundle.typed import parse
from stepforge.runtime.errors import BackendError
from stepforge.runtime.files import printable, strict_json, sync_folder

Progress = Callable[[str, str, int, int], None]  # component, phase, steps done, steps in all


@dataclass(frozen=True, slots=True)
class Order:
    """What is built for a bundle. precision: see `plans.computed_in`."""

    library: str
    precision: str
    use: Use
    options: BuildOptions


@dataclass(frozen=True, slots=True)
class Built:
    """component: a network's, or a part of the step ("step/update")."""

    component: ComponentId | str
    plan: Plan
    is_new: bool


@dataclass(frozen=True, slots=True)
class _Task:
    """One plan. graph: path of the graph, checked or ours, given the folder in which it may write."""

    component: ComponentId | str
    digest: str
    precision: str
    shapes: tuple[Profile, ...]
    graph: Callable[[Path], Path]
    bundle: Path
    banks: tuple[str, ...] = ()
    signature: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] = ((), ())


def build_plans(
    bundle: Bundle, order: Order, components: Sequence[ComponentId] | None = None, progress: Progress | None = None
) -> Iterator[Built]:
    """Build what is missing, one component after the other, and then the parts of a step that are no network.

    Raises BackendError for the first that fails.
    """
    library = Library(order.library)
    library.check(order.options)
    if order.options.lora_plugin:
        _check_plugin(library, order.precision)
    gpu = "" if order.options.targets else _gpu()
    tell = progress or (lambda *_: None)
    for component in components or tuple(bundle.components):
        task = _network(bundle, component, order)
        has_plugin = order.options.lora_plugin and bool(task.banks)
        yield _built(task, library, replace(order.options, lora_plugin=has_plugin), gpu, tell)
    if components is None:
        for name in step.NAMES:
            shapes = step_shapes(name)
            task = _Task(f"step/{name}", step.digest(name), "fp32", (shapes,), partial(_part, name), bundle.path)
            options = replace(order.options, strip_weights=False, lora_plugin=False)
            yield _built(task, library, options, gpu, tell)


def _check_plugin(library: Library, precision: str) -> None:
    """Raises BackendError where --lora-plugin cannot be had."""
    library.plugins()
    if precision == "fp32":
        raise BackendError("--lora-plugin multiplies in fp16 or bf16; choose one of them by --precision")
    if missing := [name for name in ("torch", "triton") if find_spec(name) is None]:
        raise BackendError(
            f"--lora-plugin compiles our kernel, which needs {' and '.join(missing)}; pip install 'stepforge[torch]'"
        )
    found = first_gpu()
    if found is not None and found.capability < OLDEST:
        raise BackendError(f"--lora-plugin is for GPUs from sm_{OLDEST[0]}{OLDEST[1]} on, and this is {found}")


def _network(bundle: Bundle, component: ComponentId, order: Order) -> _Task:
    entry = bundle.components[component]
    model = bundle.model(component.stage) or bundle.card
    return _Task(
        component, component_hash(bundle, component), computed_in(component, model.family, order.precision),
        profiles(bundle, component, order.use), lambda _: checked_graph(bundle, component, entry.graph).path, bundle.path,
        tuple(t.name for t in entry.inputs if ".lora_" in t.name), (entry.inputs, entry.outputs),
    )  # fmt: skip


def _part(name: str, folder: Path) -> Path:
    write_step(name, folder / f"{name}.onnx")
    return folder / f"{name}.onnx"


def _gpu() -> str:
    found = first_gpu()
    if found is None:
        raise BackendError(
            "there is no NVIDIA GPU to build for; give --target, such as sm_89, with an engine that takes it"
        )
    return f"{found}, driver {driver()}"


def _built(task: _Task, library: Library, options: BuildOptions, gpu: str, progress: Progress) -> Built:
    place, settings = root(), {name: value for name, value in asdict(options).items() if name != "targets"}
    name = key(task.digest, library.name, library.version, options.targets, gpu, task.precision, settings, task.shapes)
    folder = place / task.digest[:16]
    with _locked(folder, name):
        if (plan := _existing(folder / name)) is not None:
            return Built(task.component, plan, False)
        private = Path(tempfile.mkdtemp(dir=folder, prefix=".private-"))
        try:
            timings = place / f"{library.name}-{library.version}.timings" if library.traits.has_timing_cache else None
            job = Job(
                library.name, str(task.graph(private).resolve()), str(task.bundle.resolve()), task.precision, task.banks,
                task.shapes, options, str(private.resolve()), "" if timings is None else str(timings.resolve()),
            )  # fmt: skip
            result = _run(job, task.component, progress)
            _check_signature(task, result)
            card = Card(
                FORMAT, str(task.component), task.digest, library.name, result.pop("version"),
                tuple(options.targets or (gpu.split(", ")[-2],)), gpu, task.precision, settings, task.shapes,
                **{n: result[n] for n in ("inputs", "outputs", "layers", "weights", "bytes", "sha256", "seconds",
                                          "peak_bytes")},
            )  # fmt: skip
            (private / CARD).write_text(card_json(card), "utf-8")
            if timings is not None and (private / TIMINGS).is_file():
                (private / TIMINGS).replace(timings)
            _publish(private, folder / name)
        finally:
            shutil.rmtree(private, ignore_errors=True)
    found = _existing(folder / name)
    assert found is not None, "it was published under the lock"
    return Built(task.component, found, True)


def _run(job: Job, component: ComponentId | str, progress: Progress) -> dict[str, Any]:
    """The job in a process of its own. Raises BackendError with its last word."""
    command = [sys.executable, "-m", "stepforge.export.engines.worker"]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(asdict(job)).encode())
            child.stdin.close()
            for line in child.stdout:
                if line.startswith(b'{"phase"'):  # libraries print on standard output as well
                    told = json.loads(line)
                    progress(str(component), told["phase"], told["done"], told["total"])
        except BrokenPipeError:
            pass  # it ended early; why is on its standard error
        except BaseException:
            child.kill()
            raise
        code = child.wait()
        errors.seek(0)
        words = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    if code:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise BackendError(
            f"building {component} failed ({how}): {printable(words[-1] if words else 'no reason', 800)}"
        )
    result: dict[str, Any] = strict_json(Path(job.folder, RESULT).read_bytes())
    return result


def _check_signature(task: _Task, result: dict[str, Any]) -> None:
    """What the engine takes and gives is what the bundle states: A and B of every adapter layer among it."""
    for what, stated in zip(("inputs", "outputs"), task.signature, strict=True):
        if lost := [tensor.name for tensor in stated if tensor.name not in result[what]]:
            raise BackendError(f"the engine of {task.component} has lost {what} {', '.join(lost[:3])}")


def _existing(folder: Path) -> Plan | None:
    """The plan there, if it is whole."""
    try:
        plan = Plan(folder, parse(Card, strict_json((folder / CARD).read_bytes()), "card"))
        plan.data()
    except (OSError, ValueError, BackendError):
        return None
    return plan


def _publish(private: Path, folder: Path) -> None:
    """Only what belongs to a plan, readable, in one step. What stood there was damaged."""
    for path in private.iterdir():
        if path.name not in (CARD, INLINE, PLAN):
            path.unlink()
            continue
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    private.chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)
    private.replace(folder)
    sync_folder(folder.parent)


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """Hold a plan against other builders, in this process and others; ends with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f".{name}.lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise BackendError(
            f"{folder} cannot be written: {error.strerror}; STEPFORGE_PLANS names another place"
        ) from error
