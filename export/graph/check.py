"""Every graph of a bundle opened as the engines will, before the bundle is published.

    typing       onnx's checker with strict inference of types and shapes; operators of other domains, which ONNX Runtime's own
                 graph has, are not typed
    weights      every part of the weights file that a graph names lies inside that file and has its tensor's size
    signature    inputs and outputs are the manifest's
    openvino     reads the graph: operators, types and ranks; it compiles nothing, which takes a real SDXL a minute and twice
                 its weights, and loads no processor plug-in
    onnxruntime  makes a session of the graph that its backend opens, without optimizations or packed weights, which stay in
                 their file: types, operators, kernels
    torch        reads the program, which is typed strictly too, and looks up its operators

An engine that is not installed is left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx

from stepforge.runtime.backends import reason
from stepforge.runtime.bundle import Bundle, Component, ComponentId
from stepforge.runtime.errors import BackendError, CheckpointError

KINDS = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}


def open_graphs(bundle: Bundle) -> None:
    """Raises CheckpointError that names the first component that cannot be opened, and the reason."""
    engines = {name: opens for name, opens in ENGINES.items() if importlib.util.find_spec(name) is not None}
    for key, entry in bundle.components.items():
        for graph in (entry.graph, *entry.derived.values()):
            path = bundle.file(graph)
            _attempt(key, graph, "onnx", check_typing, path)
            _attempt(key, graph, "onnx", partial(check_tensors, entry=entry), path)
        for engine, opens in engines.items():
            graph = entry.derived.get(engine, entry.graph)
            _attempt(key, graph, engine, opens, bundle.file(graph))


def _attempt(key: ComponentId, graph: str, engine: str, opens: Callable[[Path], None], path: Path) -> None:
    try:
        opens(path)
    except Exception as error:  # each library raises classes of its own
        raise CheckpointError(f"the exported {key} does not load: {engine} refuses {graph}: {reason(error)}") from error


def check_typing(path: Path) -> None:
    """Raises what onnx's checker raises. By path: a proto with its weights may have 2 GiB."""
    onnx.checker.check_model(str(path), full_check=True)


def check_tensors(path: Path, entry: Component) -> None:
    """Weights and signature of a graph file. Raises BackendError."""
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(tensor, path)
    for what, values, tensors in (
        ("input", model.graph.input, entry.inputs),
        ("output", model.graph.output, entry.outputs),
    ):
        found = [(value.name, value.type.tensor_type.elem_type) for value in values]
        wanted = [(tensor.name, KINDS[tensor.dtype]) for tensor in tensors]
        if sorted(found) != sorted(wanted):
            odd = sorted(set(found) ^ set(wanted))[0][0]
            raise BackendError(f"its {what}s are not the manifest's: {odd}")


def _check_external(tensor: onnx.TensorProto, path: Path) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    data = path.with_name(entries["location"])
    start, length = int(entries.get("offset", 0)), int(entries["length"])
    size = int(np.prod(tensor.dims, dtype=np.int64)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    if length != size:
        raise BackendError(f"{tensor.name} has {size} bytes, of which {length} are stored")
    if start < 0 or start + length > data.stat().st_size:
        raise BackendError(
            f"{tensor.name} ends at byte {start + length} of {data.name}, which has {data.stat().st_size}"
        )


def open_in_openvino(path: Path) -> None:
    from stepforge.runtime.backends.openvino import core, why

    try:
        core().read_model(path)
    except RuntimeError as error:
        raise BackendError(why(error)) from error


def open_in_onnxruntime(path: Path) -> None:
    import onnxruntime

    from stepforge.runtime.backends.onnxruntime import why

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # a class of its own per status code
        raise BackendError(why(error)) from error


def open_in_torch(path: Path) -> None:
    from stepforge.runtime.backends.torch.program import read
    from stepforge.runtime.backends.torch.run import Runner

    Runner(read(path))


ENGINES: dict[str, Callable[[Path], None]] = {
    "openvino": open_in_openvino,
    "onnxruntime": open_in_onnxruntime,
    "torch": open_in_torch,
}
