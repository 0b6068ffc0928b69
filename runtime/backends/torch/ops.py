"""What each operator of a program computes. Operands in ONNX's order, attributes as keywords.

Only the operators that our exporter writes, and those that passes make of them. Operators whose operands are all on the
host stay there.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from stepforge.kernels import ops as kernels
from stepforge.runtime.backends.torch import fused, lowrank, peft
from stepforge.runtime.backends.torch.program import Node
from stepforge.runtime.errors import BackendError

Value = Any  # torch.Tensor, np.ndarray
TYPES = {1: torch.float32, 6: torch.int32, 7: torch.int64, 10: torch.float16, 16: torch.bfloat16}


def host(*values: Value) -> bool:
    return all(isinstance(value, np.ndarray | np.generic) for value in values)


def together(values: Sequence[Value]) -> list[Value]:
    """All as tensors on one device; host values join the first tensor."""
    device = next(value.device for value in values if isinstance(value, torch.Tensor))
    return [torch.as_tensor(value, device=device) if host(value) else value for value in values]


def add(x: Value, y: Value) -> Value:
    return x + y


def mul(x: Value, y: Value, *, to: Any = None) -> Value:
    return x * y if to is None else (x * y).to(to)


def div(x: Value, y: Value) -> Value:
    return x // y if host(x, y) else x / y  # sizes are not negative


def leaky_relu(x: Value, *, alpha: float = 0.01) -> Value:
    return F.leaky_relu(x, alpha)


def prelu(x: Value, slope: Value) -> Value:
    return F.prelu(x, slope.reshape(-1))  # slopes per channel, [C, 1, 1]


def depth_to_space(x: Value, *, blocksize: int, mode: str = "DCR") -> Value:
    if mode != "CRD":
        raise BackendError(f"operator DepthToSpace of mode {mode} is not supported by the torch backend")
    return F.pixel_shuffle(x, blocksize)


def shape(x: Value, *, start: int = 0, end: int | None = None) -> Value:
    return np.array(tuple(x.shape)[start:end], np.int64)


def reshape(x: Value, to: Value, *, allowzero: int = 0) -> Value:
    sizes = [int(size) for size in to]
    if not allowzero:
        sizes = [size or x.shape[axis] for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def squeeze(x: Value, axes: Value = None) -> Value:
    if host(x):
        return np.squeeze(x, None if axes is None else tuple(axes.tolist()))
    return x.squeeze() if axes is None else x.squeeze(tuple(axes.tolist()))


def unsqueeze(x: Value, axes: Value) -> Value:
    places = axes.tolist()
    if host(x):
        return np.expand_dims(x, tuple(places))
    rank = x.ndim + len(places)
    for place in sorted(place % rank for place in places):
        x = x.unsqueeze(place)
    return x


def transpose(x: Value, *, perm: Sequence[int], copy: bool = False) -> Value:
    return x.permute(tuple(perm)).contiguous() if copy else x.permute(tuple(perm))


def concat(*values: Value, axis: int) -> Value:
    return np.concatenate(values, axis) if host(*values) else torch.cat(together(values), axis)


def split(x: Value, *, axis: int = 0, num_outputs: int) -> Value:
    return x.tensor_split(num_outputs, axis) if x.shape[axis] % num_outputs == 0 else _uneven(x, axis, num_outputs)


def _uneven(x: Value, axis: int, parts: int) -> Value:
    return x.split(math.ceil(x.shape[axis] / parts), axis)  # ONNX: only the last part is smaller


def slice_(x: Value, starts: Value, ends: Value, axes: Value = None, steps: Value = None) -> Value:
    places = range(len(starts)) if axes is None else axes.tolist()
    strides = [1] * len(starts) if steps is None else steps.tolist()
    index = [slice(None)] * x.ndim
    for place, start, end, stride in zip(places, starts.tolist(), ends.tolist(), strides, strict=True):
        index[place] = slice(*slice(start, end, stride).indices(x.shape[place]))
        if stride == -1 and not host(x) and abs(end) > x.shape[place] and start == -1:  # torch has no such slices
            x, index[place] = x.flip(place), slice(None)
    if any(part.step is not None and part.step < 0 for part in index) and not host(x):
        raise BackendError(f"operator Slice with steps {strides} is not supported by the torch backend")
    return x[tuple(index)]


def gather(x: Value, index: Value, *, axis: int = 0) -> Value:
    if host(x, index):
        return np.take(x, index, axis)
    if host(index) and index.ndim == 0:
        return x.select(axis, int(index))
    x, index = together([x, index])
    if axis == 0 and x.ndim == 2:
        return F.embedding(index, x)
    return x.index_select(axis, index.reshape(-1)).reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def gather_nd(x: Value, index: Value, *, batch_dims: int = 0) -> Value:
    if batch_dims:
        raise BackendError("operator GatherND with batch_dims is not supported by the torch backend")
    return x[tuple(index.unbind(-1))]


def range_(start: Value, end: Value, step: Value) -> Value:
    return np.arange(int(start), int(end), int(step))


def cast(x: Value, *, to: Any) -> Value:
    if host(x):
        return x
    dtype = TYPES.get(to) if isinstance(to, int) else to
    if dtype is None:
        raise BackendError(f"operator Cast to ONNX's type {to} is not supported by the torch backend")
    return x.to(dtype)


def sin(x: Value, *, to: Any = None) -> Value:
    return x.sin() if to is None else x.sin().to(to)


def cos(x: Value, *, to: Any = None) -> Value:
    return x.cos() if to is None else x.cos().to(to)


def argmax(x: Value, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Value:
    if select_last_index:
        raise BackendError("operator ArgMax with select_last_index is not supported by the torch backend")
    return x.argmax(axis, bool(keepdims))  # the first of equal maxima, as in ONNX


def reduce_mean(x: Value, axes: Value, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Value:
    return x.mean(tuple(axes.tolist()), bool(keepdims))


def gemm(x: Value, w: Value, bias: Value = None, *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0,
         transB: int = 0) -> Value:  # fmt: skip
    if (alpha, beta, transA) != (1.0, 1.0, 0):
        raise BackendError("operator Gemm with factors or transA is not supported by the torch backend")
    return F.linear(x, w if transB else w.T, bias)


def conv(x: Value, w: Value, bias: Value = None, *, group: int = 1, pads: Sequence[int] = (0, 0, 0, 0),
         strides: Sequence[int] = (1, 1), dilations: Sequence[int] = (1, 1), kernel_shape: Sequence[int] = (),
         auto_pad: str = "NOTSET") -> Value:  # fmt: skip
    if auto_pad != "NOTSET" or len(pads) != 4:
        raise BackendError(
            f"operator Conv with auto_pad {auto_pad} and pads {pads} is not supported by the torch backend"
        )
    top, left, bottom, right = pads
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    return F.conv2d(x, w, bias, tuple(strides), (top, left), tuple(dilations), group)


def average_pool(x: Value, *, kernel_shape: Sequence[int], strides: Sequence[int] = (1, 1),
                 pads: Sequence[int] = (0, 0, 0, 0), dilations: Sequence[int] = (1, 1), ceil_mode: int = 0,
                 count_include_pad: int = 0, auto_pad: str = "NOTSET") -> Value:  # fmt: skip
    if any(pads) or ceil_mode or set(dilations) != {1} or auto_pad not in ("NOTSET", "VALID"):
        raise BackendError("operator AveragePool with padding or dilations is not supported by the torch backend")
    return F.avg_pool2d(x, tuple(kernel_shape), tuple(strides))


def pow_(x: Value, y: Value) -> Value:
    return x ** (float(y) if host(y) and y.ndim == 0 else y)


def resize(x: Value, roi: Value = None, scales: Value = None, sizes: Value = None, *, mode: str = "nearest",
           nearest_mode: str = "", coordinate_transformation_mode: str = "", antialias: int = 0,
           cubic_coeff_a: float = 0.0, exclude_outside: int = 0, extrapolation_value: float = 0.0,
           keep_aspect_ratio_policy: str = "stretch") -> Value:  # fmt: skip
    if (mode, nearest_mode, coordinate_transformation_mode) != ("nearest", "floor", "asymmetric"):
        raise BackendError(f"operator Resize of mode {mode} {nearest_mode} is not supported by the torch backend")
    if sizes is not None:
        return F.interpolate(x, size=[int(size) for size in sizes[2:]], mode="nearest")
    return F.interpolate(x, scale_factor=[float(scale) for scale in scales[2:]], mode="nearest")


def layer_norm(x: Value, weight: Value, bias: Value = None, *, axis: int = -1, epsilon: float = 1e-5,
               stash_type: int = 1) -> Value:  # fmt: skip
    return F.layer_norm(x, x.shape[axis:], weight, bias, epsilon)


def instance_norm(x: Value, weight: Value, bias: Value, *, epsilon: float = 1e-5) -> Value:
    return F.instance_norm(x, weight=weight, bias=bias, eps=epsilon)


def gelu(x: Value, *, approximate: str = "none") -> Value:
    return F.gelu(x, approximate=approximate)


def attention(q: Value, k: Value, v: Value, mask: Value = None, *, scale: float) -> Value:
    usual = q.shape[-1] ** -0.5
    # the exporter stores its root in the weights' type, which for fp16 is off by 2^-11
    scale = usual if math.isclose(scale, usual, rel_tol=2**-10) else scale
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def group_norm(x: Value, weight: Value, bias: Value, *, groups: int, epsilon: float) -> Value:
    return F.group_norm(x, groups, weight, bias, epsilon)


def group_norm_silu(x: Value, weight: Value, bias: Value, *, groups: int, epsilon: float, silu: bool) -> Value:
    pixels = x if x.ndim == 4 else x[..., None]
    return kernels.group_norm(pixels, weight, bias, groups, epsilon, silu=silu)[0].reshape(x.shape)


OPS: Mapping[str, Callable[..., Value]] = {
    "Add": add, "ArgMax": argmax, "AveragePool": average_pool, "Cast": cast, "Concat": concat, "Conv": conv,
    "Cos": cos, "DepthToSpace": depth_to_space, "Div": div,
    "Equal": lambda x, y: x == y,
    "Gather": gather, "GatherND": gather_nd, "Gelu": gelu, "Gemm": gemm, "Identity": lambda x: x,
    "InstanceNormalization": instance_norm,
    "LayerNormalization": layer_norm, "LeakyRelu": leaky_relu, "MatMul": lambda x, y: x @ y, "Mul": mul, "Range": range_,
    "Pow": pow_, "PRelu": prelu, "Reciprocal": lambda x: 1 / x, "ReduceMean": reduce_mean, "Reshape": reshape, "Resize": resize,
    "Shape": shape, "Sigmoid": lambda x: x.sigmoid(),
    "Sin": sin, "Slice": slice_, "Softmax": lambda x, *, axis=-1: x.softmax(axis), "Split": split,
    "Sqrt": lambda x: x.sqrt(), "Squeeze": squeeze, "Sub": lambda x, y: x - y, "Tanh": lambda x: x.tanh(),
    "Transpose": transpose, "Unsqueeze": unsqueeze,
    # made by passes
    "Linear": lambda x, w, bias=None: F.linear(x, w, bias), "Silu": lambda x: F.silu(x), "Attention": attention,
    "GroupNorm": group_norm, "GroupNormSilu": group_norm_silu, "Geglu": lambda h: kernels.geglu(h),
    "LowrankLinear": lowrank.linear, "LowrankGeglu": lowrank.geglu, "LowrankConv": lowrank.conv,
    "PeftLinear": peft.linear, "PeftConv": peft.conv,
    **fused.OPS,
}  # fmt: skip


def function(node: Node) -> Callable[..., Value]:
    """What computes a node from its operands. Raises BackendError for an operator or attribute that is not known."""
    if node.op not in OPS:
        raise BackendError(f"operator {node.op} is unknown to the torch backend; it knows {', '.join(OPS)}")
    found = OPS[node.op]
    known = inspect.signature(found).parameters
    if unknown := [name for name in node.attributes if name not in known]:
        raise BackendError(f"operator {node.op} has the attribute {unknown[0]}, which the torch backend does not know")
    return functools.partial(found, **node.attributes) if node.attributes else found
