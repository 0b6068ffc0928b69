"""Graphs that are hostile but match their hashes: each backend refuses them in one line, or runs them to the stated shapes."""

import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from mutate import flipped
from onnx import TensorProto, helper, numpy_helper

os.environ["STEPFORGE_CACHE"] = ""

from stepforge.runtime.backends import open_backend
from stepforge.runtime.backends.fake import fake_bundle
from stepforge.runtime.bundle import (
    TEXT_ENCODERS,
    UNET,
    VAE_DECODER,
    Bundle,
    Component,
    ComponentId,
    Tensor,
    read,
    sha256,
    write_manifest,
)
from stepforge.runtime.errors import BackendError, BundleError

ERRORS = (BackendError, BundleError)
QUICK, SOAK = 25, 2500
SECONDS = 20.0
BACKENDS = ("openvino", "onnxruntime", "torch")

IMAGE = ("rows", 4, "height", "width")
NETWORKS: dict[ComponentId, tuple[dict[str, tuple[Any, ...]], dict[str, tuple[Any, ...]]]] = {
    TEXT_ENCODERS[0]: ({"input_ids": ("rows", 77)}, {"hidden_states": ("rows", 77, 16)}),
    UNET: (
        {"sample": IMAGE, "timestep": ("rows",), "encoder_hidden_states": ("rows", "tokens", 16)},
        {"prediction": IMAGE},
    ),
    VAE_DECODER: ({"latents": IMAGE}, {"pixels": ("rows", 3, "8*height", "8*width")}),
}
CALLS = {
    TEXT_ENCODERS[0]: {"input_ids": np.arange(154).reshape(2, 77) % 99},
    UNET: {
        "sample": np.ones((2, 4, 8, 6), np.float32),
        "timestep": np.ones(2, np.float32),
        "encoder_hidden_states": np.ones((2, 77, 16), np.float32),
    },
    VAE_DECODER: {"latents": np.ones((1, 4, 8, 6), np.float32)},
}


def weights(rng: np.random.RandomState) -> dict[ComponentId, dict[str, np.ndarray]]:
    f32 = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return {
        TEXT_ENCODERS[0]: {"table": f32(258, 16), "w": f32(16, 16), "scale": f32(16), "bias": f32(16)},
        UNET: {"conv": f32(4, 4, 3, 3), "bias": f32(4), "wt": f32(16, 4), "axes": np.array([1]),
               "shape": np.array([0, 4, 1, 1])},
        VAE_DECODER: {"conv": f32(3, 4, 3, 3), "bias": f32(3), "scales": np.array([1, 1, 8, 8], np.float32)},
    }  # fmt: skip


NODES = {
    TEXT_ENCODERS[0]: [
        helper.make_node("Gather", ["table", "input_ids"], ["e"]),
        helper.make_node("MatMul", ["e", "w"], ["h"]),
        helper.make_node("Gelu", ["h"], ["g"]),
        helper.make_node("LayerNormalization", ["g", "scale", "bias"], ["hidden_states"], axis=-1),
    ],
    UNET: [
        helper.make_node("Conv", ["sample", "conv", "bias"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1]),
        helper.make_node("ReduceMean", ["encoder_hidden_states", "axes"], ["m"], keepdims=0),
        helper.make_node("MatMul", ["m", "wt"], ["p"]),
        helper.make_node("Reshape", ["p", "shape"], ["q"]),
        helper.make_node("Add", ["c", "q"], ["s"]),
        helper.make_node("Split", ["s"], ["a", "b"], axis=1, num_outputs=2),
        helper.make_node("Sigmoid", ["a"], ["t"]),
        helper.make_node("Concat", ["t", "b"], ["prediction"], axis=1),
    ],
    VAE_DECODER: [
        helper.make_node("Resize", ["latents", "", "scales"], ["r"], mode="nearest", nearest_mode="floor",
                         coordinate_transformation_mode="asymmetric"),
        helper.make_node("Conv", ["r", "conv", "bias"], ["pixels"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1]),
    ],
}  # fmt: skip


def model_of(key: ComponentId, tensors: dict[str, np.ndarray], folder: Path) -> onnx.ModelProto:
    """Its float weights lie in model.onnx.data, as an export's do."""
    inputs, outputs = NETWORKS[key]
    kinds = {True: TensorProto.INT64, False: TensorProto.FLOAT}
    data, initializers = b"", []
    for name, array in tensors.items():
        tensor = numpy_helper.from_array(array, name)
        if array.nbytes > 100 and array.dtype == np.float32:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for word, value in (("location", "model.onnx.data"), ("offset", len(data)), ("length", array.nbytes)):
                tensor.external_data.add(key=word, value=str(value))
            data += array.tobytes()
        initializers.append(tensor)
    graph = helper.make_graph(
        NODES[key], "main",
        [helper.make_tensor_value_info(name, kinds[name == "input_ids"], shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        initializers,
    )  # fmt: skip
    (folder / "model.onnx.data").write_bytes(data)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def start(folder: Path) -> tuple[Bundle, dict[ComponentId, onnx.ModelProto]]:
    fake, tensors, models = fake_bundle(64), weights(np.random.RandomState(0)), {}
    for key in NETWORKS:
        (folder / key.folder).mkdir(parents=True)
        models[key] = model_of(key, tensors[key], folder / key.folder)
        (folder / key.folder / "model.onnx").write_bytes(models[key].SerializeToString())
    (folder / "tokenizer.json").write_bytes(fake.file(fake.card.text_encoders[0].tokenizer).read_bytes())
    encoder = replace(fake.card.text_encoders[0], tokenizer="tokenizer.json")
    components = {
        key: Component(
            f"{key.folder}/model.onnx",
            tuple(Tensor(n, "int64" if n == "input_ids" else "float32", s) for n, s in inputs.items()),
            tuple(Tensor(n, "float32", s) for n, s in outputs.items()),
        )
        for key, (inputs, outputs) in NETWORKS.items()
    }
    card = replace(fake.card, text_encoders=(encoder,))
    bundle = replace(fake, path=folder, card=card, components=components, stages={})
    hashed(bundle)
    for name in BACKENDS:  # an unchanged bundle runs, and says the same everywhere
        for key, inputs in CALLS.items():
            outputs = open_backend(name, read(folder), precision="fp32", threads=1).open(key)(inputs)
            assert all(np.isfinite(value).all() for value in outputs.values())
    return bundle, models


def hashed(bundle: Bundle) -> None:
    """Its manifest with sizes and hashes as they are now."""
    names = [p.relative_to(bundle.path).as_posix() for p in bundle.path.rglob("*") if p.is_file()]
    files = {n: ((bundle.path / n).stat().st_size, sha256(bundle.path / n)) for n in names if n != "bundle.json"}
    write_manifest(replace(bundle, files=files))


def case(rng: random.Random, base: Any) -> tuple[str, ComponentId, str, bytes]:
    """Backend, component, what was done to its graph, and the graph."""
    _, models = base
    key = rng.choice(list(models))
    model = onnx.ModelProto()
    model.CopyFrom(models[key])
    if rng.random() < 0.15:
        return rng.choice(BACKENDS), key, "bytes", flipped(model.SerializeToString(), rng)
    done = []
    for _ in range(rng.choice((1, 1, 2))):
        change = rng.choice(CHANGES)
        try:
            change(model, rng)
        except (ValueError, TypeError, IndexError, OverflowError):  # what protobuf itself refuses
            continue
        done.append(change.__name__)
    return rng.choice(BACKENDS), key, " ".join(done), model.SerializeToString()


def check(case: tuple[str, ComponentId, str, bytes], base: Any) -> None:
    backend, key, _, data = case
    bundle, models = base
    path = bundle.path / key.folder / "model.onnx"
    try:
        path.write_bytes(data)
        hashed(bundle)
        graph = open_backend(backend, read(bundle.path), precision="fp32", threads=1).open(key)
        outputs = graph(CALLS[key])
        sizes = {"rows": len(next(iter(CALLS[key].values()))), "height": 8, "width": 6, "8*height": 64, "8*width": 48}
        for name, shape in NETWORKS[key][1].items():
            wanted = tuple(sizes.get(size, size) for size in shape)
            assert outputs[name].shape == wanted, f"{name} has shape {outputs[name].shape}, not {wanted}"
            assert outputs[name].dtype == np.float32
    finally:
        path.write_bytes(models[key].SerializeToString())


INTEGERS = (0, 1, -1, 2, 3, 7, 1 << 16, 1 << 31, -(1 << 31), (1 << 63) - 1, -(1 << 63))
TEXTS = (
    "", "x", "../outside/secret.bin", "../../outside/secret.bin", "/etc/passwd", "a" * 5000, "\0", "\x1b[2J", "é", "NOTSET",
)  # fmt: skip
OPS = (
    "Loop", "If", "Scan", "Constant", "ConstantOfShape", "Expand", "Tile", "Range", "Resize", "Conv", "ConvTranspose", "Gemm",
    "MatMul", "Reshape", "Split", "Concat", "Slice", "Gather", "GatherND", "Pad", "TopK", "Einsum", "SequenceMap", "LSTM",
    "StringNormalizer", "MaxPool", "Upsample", "Cast", "Transpose", "Squeeze", "Unsqueeze", "InstanceNormalization", "Identity",
    "EPContext", "MultiHeadAttention", "no such op", "",
)  # fmt: skip


def an_operator(model: Any, rng: random.Random) -> None:
    rng.choice(model.graph.node).op_type = rng.choice(OPS)


def a_domain(model: Any, rng: random.Random) -> None:
    rng.choice(model.graph.node).domain = rng.choice(("ai.onnx", "com.microsoft", "ai.onnx.ml", "x", *TEXTS))


def an_attribute(model: Any, rng: random.Random) -> None:
    node = rng.choice(model.graph.node)
    if node.attribute and rng.random() < 0.7:
        attribute = rng.choice(node.attribute)
        if attribute.ints:
            attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(INTEGERS)
            if rng.random() < 0.3:
                attribute.ints.append(rng.choice(INTEGERS))
        elif attribute.s:
            attribute.s = rng.choice((b"\xff\xfe", b"linear", b"cubic", *(text.encode() for text in TEXTS)))
        else:
            attribute.i = rng.choice(INTEGERS)
    else:
        name = rng.choice(
            ("axis", "group", "num_outputs", "to", "perm", "strides", "dilations", "auto_pad", "alpha", "x")
        )
        value = rng.choice((*INTEGERS, [1, -1], [0, 0], 1e30, float("nan"), b"SAME_UPPER", b"\xff"))
        node.attribute.append(helper.make_attribute(name, value))


def an_edge(model: Any, rng: random.Random) -> None:
    """Cycles, missing operands, names given twice."""
    node, other = rng.choice(model.graph.node), rng.choice(model.graph.node)
    names = [*other.input, *other.output, "", "none", *TEXTS]
    which = node.input if rng.random() < 0.7 else node.output
    if which and rng.random() < 0.8:
        which[rng.randrange(len(which))] = rng.choice(names)
    else:
        which.append(rng.choice(names))


def an_order(model: Any, rng: random.Random) -> None:
    nodes = list(model.graph.node)
    rng.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def a_shape(model: Any, rng: random.Random) -> None:
    tensor = rng.choice(model.graph.initializer)
    at = rng.randrange(len(tensor.dims))
    tensor.dims[at] = rng.choice((*INTEGERS, tensor.dims[at] + 1, 2 * tensor.dims[at]))
    if rng.random() < 0.5 and tensor.raw_data:
        tensor.raw_data = tensor.raw_data * 2


def a_reshaped_weight(model: Any, rng: random.Random) -> None:
    """Of as many elements, in another shape."""
    tensor = rng.choice(model.graph.initializer)
    dims = list(tensor.dims)
    rng.shuffle(dims)
    kind = rng.randrange(3)
    count = int(np.prod(dims))
    tensor.dims[:] = dims if kind == 0 else [count] if kind == 1 else [1, *dims]


def a_type(model: Any, rng: random.Random) -> None:
    rng.choice(model.graph.initializer).data_type = rng.choice((0, 1, 2, 5, 6, 7, 8, 9, 10, 11, 14, 16, 17, 23, 99))


def a_number(model: Any, rng: random.Random) -> None:
    """Of an inline weight: shapes, axes, scales, indices."""
    tensor = rng.choice(model.graph.initializer)
    if tensor.raw_data:
        data = np.frombuffer(tensor.raw_data, np.int64 if tensor.data_type == 7 else np.float32).copy()
        data[rng.randrange(len(data))] = rng.choice(
            INTEGERS if tensor.data_type == 7 else (0, -1, 1e9, 0.1, np.inf, np.nan)
        )
        tensor.raw_data = data.tobytes()


def external_data(model: Any, rng: random.Random) -> None:
    tensors = [tensor for tensor in model.graph.initializer if tensor.external_data]
    tensor = rng.choice(tensors or model.graph.initializer)
    entries = {entry.key: entry for entry in tensor.external_data}
    if not entries or rng.random() < 0.2:
        tensor.data_location = rng.choice((TensorProto.EXTERNAL, TensorProto.DEFAULT))
        return
    entry = rng.choice(list(entries.values()))
    if entry.key == "location":
        entry.value = rng.choice(
            (*TEXTS, "../../../../../../etc/passwd", "model.onnx", "../model.onnx", "bundle.json", ".")
        )
    else:
        entry.value = rng.choice(
            (*(str(n) for n in INTEGERS), "0x10", "1e3", " 4", "-4", "٣", entry.value + "4", "1" * 50)
        )
    if rng.random() < 0.2:
        tensor.external_data.remove(entry)


def an_interface(model: Any, rng: random.Random) -> None:
    """Inputs and outputs: renamed, removed, of other types and shapes."""
    values = rng.choice((model.graph.input, model.graph.output))
    value = rng.choice(values)
    match rng.randrange(5):
        case 0:
            value.name = rng.choice(("x", "sample", "pixels", *TEXTS))
        case 1:
            values.remove(value)
        case 2:
            value.type.tensor_type.elem_type = rng.choice((0, 1, 7, 10, 8, 99))
        case 3:
            dim = rng.choice(value.type.tensor_type.shape.dim)
            dim.dim_value = rng.choice(INTEGERS)
        case 4:
            values.append(value)


def another_output(model: Any, rng: random.Random) -> None:
    """What the network gives is another value of its graph: another shape than stated."""
    node = rng.choice(model.graph.node)
    model.graph.node.append(helper.make_node("Identity", [node.output[0]], ["out"]))
    last = model.graph.output[0].name
    for other in model.graph.node:
        for at, name in enumerate(other.output):
            if name == last:
                other.output[at] = "was"
        for at, name in enumerate(other.input):
            if name == last:
                other.input[at] = "was"
    model.graph.node[-1].output[0] = last
    if rng.random() < 0.5:
        del model.graph.output[0].type.tensor_type.shape.dim[:]
        model.graph.output[0].type.tensor_type.ClearField("shape")


def an_endless_loop(model: Any, rng: random.Random) -> None:
    """A Loop whose condition stays true, 2^62 times."""
    names = [("i", 7, []), ("c", 9, []), ("v", 1, None)]
    given = [helper.make_tensor_value_info(*one) for one in names]
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Sin", ["v"], ["v2"])], "body", given,
        [helper.make_tensor_value_info("c2", 9, []), helper.make_tensor_value_info("v2", 1, None)],
    )  # fmt: skip
    model.graph.initializer.extend(
        [numpy_helper.from_array(np.array(1 << 62), "trips"), numpy_helper.from_array(np.array(True), "go")]
    )
    node = model.graph.node[-1]
    model.graph.node.append(helper.make_node("Loop", ["trips", "go", "inner"], [node.output[0]], body=body))
    node.output[0] = "inner"


def a_function(model: Any, rng: random.Random) -> None:
    opsets = [helper.make_opsetid("", 20)]
    function = helper.make_function(
        "own", "F", ["x"], ["y"], [helper.make_node("F", ["x"], ["y"], domain="own")], opsets
    )
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("own", 1))
    node = rng.choice(model.graph.node)
    node.op_type, node.domain = "F", "own"


def a_huge_value(model: Any, rng: random.Random) -> None:
    """Petabytes, made of a few bytes."""
    sizes = rng.choice(([1 << 40], [1 << 20, 1 << 20, 1 << 20], [1 << 62, 4], [-1, -1], [0, 1 << 62]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(sizes), "huge"))
    node = model.graph.node[-1]
    last, node.output[0] = node.output[0], "small"
    kind = rng.choice(("Expand", "Tile", "Reshape", "ConstantOfShape"))
    inputs = ["huge"] if kind == "ConstantOfShape" else ["small", "huge"]
    model.graph.node.append(helper.make_node(kind, inputs, [last]))


def a_reshape(model: Any, rng: random.Random) -> None:
    """An operand goes through a Reshape to as many numbers, fewer or more; zeros stand for sizes that are there."""
    at = rng.randrange(len(model.graph.node))
    node = model.graph.node[at]
    which = rng.randrange(len(node.input))
    target = np.array([rng.choice((0, 0, 1, 2, 4, 7, -1, 1000)) for _ in range(rng.randint(1, 5))])
    model.graph.initializer.append(numpy_helper.from_array(target, "target"))
    options = {"allowzero": 1} if rng.random() < 0.2 else {}
    model.graph.node.insert(at, helper.make_node("Reshape", [node.input[which], "target"], ["reshaped"], **options))
    model.graph.node[at + 1].input[which] = "reshaped"


def versions(model: Any, rng: random.Random) -> None:
    model.ir_version = rng.choice((0, 1, 3, 10, 99, -1))
    model.opset_import[0].version = rng.choice((-1, 0, 1, 6, 9, 13, 18, 20, 23, 99, 1 << 40))
    if rng.random() < 0.3:
        model.opset_import.append(helper.make_opsetid("", rng.choice((1, 20))))


def no_graph(model: Any, rng: random.Random) -> None:
    model.ClearField("graph") if rng.random() < 0.5 else model.graph.ClearField("node")


CHANGES = (
    an_operator, a_domain, an_attribute, an_edge, an_order, a_shape, a_reshaped_weight, a_type, a_number, external_data,
    an_interface, another_output, an_endless_loop, a_function, a_huge_value, a_reshape, versions, no_graph,
)  # fmt: skip
