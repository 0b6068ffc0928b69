"""ONNX graphs, checked before an engine parses them: engines crash on, or run without end, what the checks here refuse.

A bundle's graphs are plain: known operators in an order in which they can run, no subgraphs (so no loops), no functions, and
weights that lie inline or in a listed file beside the graph. This reads the protobuf encoding (protobuf.dev, "Encoding"; the
numbers of fields are onnx.proto's) only so far as to see that, without onnx. What operators compute stays the engine's to
check: whoever writes a bundle can make any picture, and choose how long it takes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from stepforge.runtime.bundle import Bundle, Component, ComponentId
from stepforge.runtime.checks import shown
from stepforge.runtime.errors import BackendError

MOST_BYTES = 256 << 20  # bytes of a graph file, whose larger weights lie beside it
MOST_NODES = 200_000
MOST_ELEMENTS = 1 << 40
MOST_NUMBER = 1 << 24  # largest of inline whole numbers (shapes, axes, indices), beside those that mean "to the end"
ENDS = (2**63 - 1, -(2**63), 2**31 - 1, -(2**31))
# The standard domain: what exports write, and arithmetic by element. None has a subgraph, and none makes a value of any size
# of a few numbers, but for Range and Resize, whose numbers are bounded below: after Expand to [0, 2^62] OpenVINO 2026.4.1
# crashed in the calls of other networks.
STANDARD = frozenset((
    "Abs", "Add", "ArgMax", "AveragePool", "Cast", "Clip", "Concat", "Conv", "Cos", "DepthToSpace", "DequantizeLinear",
    "Div", "Equal", "Erf", "Exp", "Flatten", "Gather", "GatherND", "Gelu", "Gemm", "Greater", "HardSwish", "Identity",
    "InstanceNormalization", "LayerNormalization", "LeakyRelu", "Less", "Log", "MatMul", "Max", "Min", "Mul", "Neg",
    "PRelu", "Pow", "QuantizeLinear", "Range", "Reciprocal", "ReduceMean", "ReduceSum", "Relu", "Reshape", "Resize",
    "Shape", "Sigmoid", "Sin", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze",
    "Where",
))  # fmt: skip
ONNXRUNTIME = frozenset(
    ("Attention", "MultiHeadAttention", "SkipLayerNormalization", "BiasGelu", "FastGelu", "FusedMatMul", "QuickGelu")
)
OPERATORS = {"": STANDARD, "ai.onnx": STANDARD, "com.microsoft": ONNXRUNTIME}
BYTES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 16: 2}  # size of an element, by TensorProto.DataType
WHOLE = {6: "<i", 7: "<q"}
IR_VERSIONS = range(8, 20)
OPSETS = {"": range(18, 30), "ai.onnx": range(18, 30), "com.microsoft": range(1, 2)}
LIMITS = {  # engines divide by these, and make room for those
    "strides": (1, 64), "dilations": (1, 64), "kernel_shape": (1, 64), "group": (1, 1 << 16), "num_outputs": (1, 1 << 10),
    "num_heads": (1, 1 << 10), "blocksize": (1, 64), "pads": (0, 64),
}  # fmt: skip
MOST_SCALE = 64.0  # largest scale of Resize
PRODUCTS = frozenset(("Conv", "Gemm", "MatMul"))

Span = tuple[int, int]


class CheckedGraph(NamedTuple):
    path: Path
    products: int  # nodes in PRODUCTS


@dataclass(frozen=True, slots=True)
class _Node:
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def checked_graph(bundle: Bundle, component: ComponentId, graph: str) -> CheckedGraph:
    """A component's graph, after its checks. Raises BackendError in one line."""
    path = bundle.file(graph)
    folder = f"{graph.rpartition('/')[0]}/".lstrip("/")
    beside = {name.removeprefix(folder): size for name, (size, _) in bundle.files.items() if name.startswith(folder)}
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES >> 20} MiB")
        nodes = _check(path.read_bytes(), beside, bundle.components[component])
    except (ValueError, OSError) as error:
        text = error.strerror if isinstance(error, OSError) else error
        raise BackendError(f"{graph} is no graph of {component}: {text}") from error
    return CheckedGraph(path, sum(node.op in PRODUCTS for node in nodes))


def _check(data: bytes, beside: Mapping[str, int], entry: Component) -> list[_Node]:
    """The nodes. Raises ValueError for the first thing that is wrong. beside: sizes of listed files in the graph's folder."""
    graphs = []
    for field, value in _fields(data, (0, len(data))):
        if field == 7:
            graphs.append(_span(value))
        elif field == 1 and _whole(value) not in IR_VERSIONS:
            raise ValueError(f"its IR version is {_whole(value)}; from {IR_VERSIONS.start} on are read")
        elif field == 8:
            _check_opset(data, _span(value))
        elif field in (20, 25):
            raise ValueError("it has functions or a training part")
    if len(graphs) != 1:
        raise ValueError(f"it holds {len(graphs)} graphs")
    known: dict[str, tuple[float, ...]] = {}
    inputs, outputs, nodes = set(), [], []
    for field, value in _fields(data, graphs[0]):
        match field:
            case 1:
                nodes.append(_node(data, _span(value)))
                if len(nodes) > MOST_NODES:
                    raise ValueError(f"it has more than {MOST_NODES} nodes")
            case 5:
                known |= _tensor(data, _span(value), beside)
            case 11:
                inputs.add(_name(data, _span(value)))
            case 12:
                outputs.append(_name(data, _span(value)))
            case 15:
                raise ValueError("it has sparse weights")
    _check_names("input", inputs - known.keys(), {tensor.name for tensor in entry.inputs}, exactly=True)
    _check_names("output", set(outputs), {tensor.name for tensor in entry.outputs}, exactly=False)
    known |= dict.fromkeys(inputs, ())
    for node in nodes:
        if missing := [name for name in node.inputs if name and name not in known]:
            raise ValueError(f"operator {node.op} reads {shown(missing[0])}, which nothing before it gives")
        if twice := [name for name in node.outputs if name in known]:
            raise ValueError(f"operator {node.op} gives {shown(twice[0])} a second time")
        scales = known[node.inputs[2]] if node.op == "Resize" and len(node.inputs) > 2 and node.inputs[2] else (1.0,)
        if not scales or not all(0 < scale <= MOST_SCALE for scale in scales):
            raise ValueError(f"operator Resize has the scales {shown(scales)}; up to {MOST_SCALE} is possible")
        known |= dict.fromkeys((name for name in node.outputs if name), ())
    if missing := [name for name in outputs if name not in known]:
        raise ValueError(f"nothing gives its output {shown(missing[0])}")
    return nodes


def _check_opset(data: bytes, span: Span) -> None:
    domain, version = "", 0
    for field, value in _fields(data, span):
        if field == 1:
            domain = _text(data, value)
        elif field == 2:
            version = _whole(value)
    if version not in OPSETS.get(domain, ()):
        raise ValueError(f"it uses version {version} of the operators {shown(domain)}, which no bundle does")


def _check_names(what: str, found: set[str], stated: set[str], *, exactly: bool) -> None:
    if missing := sorted(stated - found):
        raise ValueError(f"it has no {what} {shown(missing[0])}")
    if exactly and (more := sorted(found - stated)):
        raise ValueError(f"it has the {what} {shown(more[0])}, which the manifest does not state")


def _node(data: bytes, span: Span) -> _Node:
    inputs, outputs, op, domain = [], [], "", ""
    for field, value in _fields(data, span):
        match field:
            case 1:
                inputs.append(_text(data, value))
            case 2:
                outputs.append(_text(data, value))
            case 4:
                op = _text(data, value)
            case 7:
                domain = _text(data, value)
            case 5:
                _check_attribute(data, _span(value), op)
    if op not in OPERATORS.get(domain, ()):
        raise ValueError(f"operator {shown(f'{domain}.{op}'.lstrip('.'))} is none that bundles have")
    return _Node(op, tuple(inputs), tuple(outputs))


def _check_attribute(data: bytes, span: Span, op: str) -> None:
    """Numbers, texts and small tensors only: fields 6, 10, 11 and above are graphs, types and references."""
    name, numbers = "", []
    for field, value in _fields(data, span):
        if field == 1:
            name = _text(data, value)
        elif field in (3, 8):
            numbers += _numbers(data, value)
        elif field == 4:
            _text(data, value)
        elif field == 5:
            _tensor(data, _span(value), {})
        elif field not in (2, 7, 9, 13, 20):
            raise ValueError(f"an attribute of operator {shown(op)} is a graph or a reference")
    low, high = LIMITS.get(name, (-MOST_NUMBER, MOST_NUMBER))
    if not all(low <= number <= high or (number in ENDS and name not in LIMITS) for number in numbers):
        raise ValueError(f"operator {shown(op)} has {shown(name)} {shown(numbers)}; from {low} to {high} is possible")


def _tensor(data: bytes, span: Span, beside: Mapping[str, int]) -> dict[str, tuple[float, ...]]:
    """Name of a tensor whose numbers are where they should be, and these if they are few and no whole ones."""
    dims: list[int] = []
    kind, name, raw, external, is_external = 0, "", None, {}, False
    for field, value in _fields(data, span):
        match field:
            case 1:
                dims += _numbers(data, value)
            case 2:
                kind = _whole(value)
            case 8:
                name = _text(data, value)
            case 9:
                raw = _span(value)
            case 13:
                entry = {inner: _text(data, one) for inner, one in _fields(data, _span(value))}
                external[entry.get(1, "")] = entry.get(2, "")
            case 14:
                is_external = bool(_whole(value))
            case 4 | 5 | 6 | 7 | 10 | 11 | 3:
                raise ValueError(f"weight {shown(name)} is stored in another way than bundles do")
    if kind not in BYTES:
        raise ValueError(f"weight {shown(name)} has the type {kind}, which no bundle has")
    count = math.prod(dims)
    if len(dims) > 8 or any(size < 0 for size in dims) or count > MOST_ELEMENTS:
        raise ValueError(f"weight {shown(name)} has the impossible shape {shown(dims)}")
    size = count * BYTES[kind]
    if not is_external:
        start, end = raw or (0, 0)
        if end - start != size:
            raise ValueError(f"weight {shown(name)} has {end - start} bytes, its shape {size}")
        if kind in WHOLE:
            for (number,) in struct.iter_unpack(WHOLE[kind], data[start:end]):
                if abs(number) > MOST_NUMBER and number not in ENDS:
                    raise ValueError(f"weight {shown(name)} has the number {number}; up to {MOST_NUMBER} is possible")
        return {name: struct.unpack(f"<{count}f", data[start:end]) if kind == 1 and count <= 8 else ()}
    if more := external.keys() - {"location", "offset", "length"}:
        raise ValueError(f"weight {shown(name)} states {shown(min(more))} of its file, which no bundle does")
    location = external.get("location", "")
    if location not in beside:
        raise ValueError(f"weight {shown(name)} lies in {shown(location)}, which is no listed file beside the graph")
    offset, length = _decimal(external, "offset", 0), _decimal(external, "length", size)
    if length != size or offset + length > beside[location]:
        raise ValueError(
            f"weight {shown(name)} has {size} bytes; {shown(location)} gives {length} at {offset} of {beside[location]}"
        )
    return {name: ()}


def _decimal(entries: Mapping[str, str], name: str, default: int) -> int:
    text = entries.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f"a weight has the {name} {shown(text)}")
    return int(text)


def _name(data: bytes, span: Span) -> str:
    """Name of a ValueInfoProto."""
    return next((_text(data, value) for field, value in _fields(data, span) if field == 1), "")


def _fields(data: bytes, span: Span) -> Iterator[tuple[int, int | Span]]:
    """Numbers and values of a message's fields: whole numbers, and places of everything else."""
    at, end = span
    while at < end:
        key, at = _varint(data, at, end)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at, end)
            yield key >> 3, value
            continue
        if kind == 2:
            length, at = _varint(data, at, end)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError("it is not a protobuf message")
        if at + length > end:
            raise ValueError("it ends early")
        yield key >> 3, (at, at + length)
        at += length


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            break
    raise ValueError("it is not a protobuf message")


def _span(value: int | Span) -> Span:
    if isinstance(value, int):
        raise ValueError("a field has another type than onnx.proto gives it")
    return value


def _whole(value: int | Span) -> int:
    if not isinstance(value, int):
        raise ValueError("a field has another type than onnx.proto gives it")
    return value - (1 << 64) if value >= 1 << 63 else value


def _numbers(data: bytes, value: int | Span) -> list[int]:
    """A repeated field of whole numbers: one of them, or all of them packed."""
    if isinstance(value, int):
        return [_whole(value)]
    at, end = value
    found = []
    while at < end:
        number, at = _varint(data, at, end)
        found.append(_whole(number))
    return found


def _text(data: bytes, value: int | Span) -> str:
    start, end = _span(value)
    return data[start:end].decode()
