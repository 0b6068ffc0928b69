"""What a LoRA file says of one module, as algebra on float32 arrays.

Strength m scales the change of a weight W: W' = W + m·ΔW for all kinds but DoRA, whose formula is below. Each kind is a
row of PRODUCTS. Sources: LyCORIS `lycoris/modules/*.py` (their `forward`, not the merge, which scales twice), PEFT
`peft/tuners/lora`, arXiv 2106.09685 (LoRA), 2108.06098 (LoHa), 2212.10650 (LoKr), 2205.05638 (IA3), 2402.09353 (DoRA).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from stepforge.runtime.arrays import Float32

Tensors = Mapping[str, Float32]
Shape = tuple[int, ...]
MOST_RANK = 1024  # kohya's largest; small layers get it as well
MAX_STRENGTH = 100.0  # far above what gives a picture


@dataclass(frozen=True, slots=True)
class Layer:
    """One module's entry of a file. `tensors` are named by role, see PRODUCTS."""

    kind: str
    rank: int | None
    scale: float  # alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA
    tensors: Tensors
    magnitude: Float32 | None = None  # DoRA: the norm that each row (or column) of the new weight has
    magnitude_by: str = "lycoris"  # whose formula applies at strengths other than 1

    @property
    def name(self) -> str:
        return self.kind if self.magnitude is None else f"{self.kind}+dora"


def low_rank(layer: Layer, shape: Shape) -> tuple[Float32, Float32] | None:
    """(down [r, in·k·k], up [out, r]) with up·down = ΔW exactly, scale included; None if the layer is not of that form.

    A Tucker middle is a k×k convolution between two 1×1: its product with `down` is one k×k convolution.
    """
    if layer.kind != "lora" or layer.magnitude is not None or layer.tensors.keys() & BIASES:
        return None
    with np.errstate(over="ignore", invalid="ignore"):  # callers refuse what is infinite
        up = layer.tensors["up"].reshape(shape[0], -1) * np.float32(layer.scale)
        return _down(layer.tensors, shape), up


def _down(tensors: Tensors, shape: Shape) -> Float32:
    down = tensors["down"]
    if "mid" not in tensors:
        return down.reshape(len(down), -1)
    mid, flat = tensors["mid"], down.reshape(len(down), -1)
    joined: Float32 = np.einsum("abt,bi->ait", mid.reshape(len(mid), len(flat), -1), flat)
    return joined.reshape(len(mid), -1)


def _lora(tensors: Tensors, shape: Shape) -> Float32:
    delta: Float32 = tensors["up"].reshape(shape[0], -1) @ _down(tensors, shape)
    return delta.reshape(shape)


def _loha(tensors: Tensors, shape: Shape) -> Float32:
    """(w1a w1b) ∘ (w2a w2b); with Tucker cores t, w1a and w2a are transposed."""
    halves = []
    for half in ("1", "2"):
        a, b = _matrix(tensors[f"w{half}_a"]), _matrix(tensors[f"w{half}_b"])
        if f"t{half}" in tensors:
            halves.append(_tucker(tensors[f"t{half}"], a, b).reshape(len(a.T), -1))
        else:
            halves.append(a @ b)
    delta: Float32 = halves[0] * halves[1]
    return delta.reshape(shape)


def _lokr(tensors: Tensors, shape: Shape) -> Float32:
    """kron(w1, w2), each whole or as the product of two factors; the taps of a convolution belong to w2's columns."""
    w1 = _matrix(tensors["w1"]) if "w1" in tensors else _matrix(tensors["w1_a"]) @ _matrix(tensors["w1_b"])
    if "w2" in tensors:
        w2 = _matrix(tensors["w2"])
    elif "t2" in tensors:
        w2 = _matrix(_tucker(tensors["t2"], _matrix(tensors["w2_a"]), _matrix(tensors["w2_b"])))
    else:
        w2 = _matrix(tensors["w2_a"]) @ _matrix(tensors["w2_b"])
    product: Float32 = np.kron(w1, w2)
    return product.reshape(shape)


def _matrix(tensor: Float32) -> Float32:
    """Rows as they are, all else in columns: trainers write factors of a convolution with its taps, or flat."""
    return tensor.reshape(len(tensor), -1)


def _tucker(core: Float32, a: Float32, b: Float32) -> Float32:
    """[r, r, k, k] core, a [r, p], b [r, q] -> [p, q, k·k]"""
    product: Float32 = np.einsum("ijt,ip,jq->pqt", core.reshape(len(a), len(b), -1), a, b)
    return product


def _full(tensors: Tensors, shape: Shape) -> Float32:
    return tensors["diff"].reshape(shape) if "diff" in tensors else np.zeros(shape, np.float32)


# kind -> ΔW before the scale. Roles: lora down, up, [mid, up_bias, bias]; loha w1_a, w1_b, w2_a, w2_b, [t1, t2];
# lokr w1 | w1_a, w1_b and w2 | w2_a, w2_b, [t2]; full [diff, diff_b] (norms too); ia3 weight, on_input; bias bias
PRODUCTS: dict[str, Callable[[Tensors, Shape], Float32]] = {
    "lora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "full": _full,
}
BIASES = {"up_bias", "diff_b", "bias"}


def delta(layer: Layer, weight: Float32, bias: Float32 | None, strength: float) -> tuple[Float32, Float32 | None]:
    """The change of a module's weight and bias, float32, against its pristine ones.

    Raises ValueError if the layer changes a bias that the module does not have.
    """
    m = np.float32(strength)
    if layer.kind == "bias":
        change = np.zeros_like(weight)
    elif layer.kind == "ia3":
        factor = _along(layer.tensors["weight"], weight, 1 if layer.tensors["on_input"].item() else 0)
        change = m * weight * factor
    else:
        product = PRODUCTS[layer.kind](layer.tensors, weight.shape) * np.float32(layer.scale)
        change = m * product if layer.magnitude is None else _decompose(layer, weight, product, strength)
    return change, _bias_change(layer, bias, m)


def _bias_change(layer: Layer, bias: Float32 | None, m: np.float32) -> Float32 | None:
    """None if the layer has nothing for the bias."""
    tensors = layer.tensors
    if not tensors.keys() & BIASES:
        return None
    if bias is None:
        raise ValueError("it changes a bias that the module does not have")
    change: Float32 = np.zeros_like(bias)
    if "up_bias" in tensors:
        change = change + m * np.float32(layer.scale) * tensors["up_bias"].reshape(bias.shape)
    if "diff_b" in tensors:
        change = change + m * tensors["diff_b"].reshape(bias.shape)
    if "bias" in tensors:  # PEFT stores the trained bias itself, and uses it at every strength
        change = change + (tensors["bias"].reshape(bias.shape) - bias)
    return change


def _decompose(layer: Layer, weight: Float32, product: Float32, strength: float) -> Float32:
    """DoRA: magnitude · V/‖V‖ − W with V = W + ΔW.

    At strength m PEFT scales ΔW inside V. LyCORIS scales the change of the norms: V·(m·(magnitude/‖V‖ − 1) + 1) − W.
    """
    assert layer.magnitude is not None
    axis = _norm_axis(layer, weight.shape)
    inner = strength if layer.magnitude_by == "peft" else 1.0
    direction = weight + np.float32(inner) * product
    others = tuple(a for a in range(weight.ndim) if a != axis)
    norms = np.sqrt(np.square(direction.astype(np.float64)).sum(axis=others))
    factor = layer.magnitude.astype(np.float64).reshape(-1) / (norms + np.finfo(np.float32).eps)  # LyCORIS adds it
    if layer.magnitude_by != "peft":
        factor = strength * (factor - 1.0) + 1.0
    return _along(factor.astype(np.float32), weight, axis) * direction - weight


def _norm_axis(layer: Layer, weight: Shape) -> int:
    """0: one norm for each output (PEFT, LyCORIS by default); 1: one for each input, written [1, in, ...]."""
    assert layer.magnitude is not None
    shape = layer.magnitude.shape
    by_input = len(shape) > 1 and shape[0] == 1 and shape[1] == weight[1]
    return 1 if layer.magnitude_by != "peft" and (by_input or math.prod(shape) != weight[0]) else 0


def _along(values: Float32, weight: Float32, axis: int) -> Float32:
    """A vector shaped so that it multiplies one axis of the weight."""
    return values.reshape(*(weight.shape[axis] if a == axis else 1 for a in range(weight.ndim)))


def check(layer: Layer, shape: Shape) -> None:
    """Raise ValueError, saying why, if the layer cannot belong to a module whose weight has this shape.

    By shapes alone: a hostile file must not make us multiply anything first.
    """
    tensors, out = layer.tensors, shape[0]
    inputs, kernel = (shape[1], shape[2:]) if len(shape) > 1 else (1, ())
    most = max(MOST_RANK, out, inputs * math.prod(kernel))
    for role in ("down", "mid", "w1_b", "w2_b", "t1", "t2") if layer.kind in ("lora", "loha", "lokr") else ():
        if role in tensors and len(tensors[role]) > most:
            raise ValueError(f"its rank is {len(tensors[role])}, more than a weight {list(shape)} has")
    if layer.kind == "lora":
        r = layer.rank or 0
        middle = len(tensors["mid"]) if "mid" in tensors else r
        taps = () if "mid" in tensors else kernel
        _sized(tensors["down"], (r, inputs, *taps), "down")
        _sized(tensors["up"], (out, middle), "up")
        if "mid" in tensors:
            _sized(tensors["mid"], (middle, r, *kernel), "mid")
    elif layer.kind == "loha":
        r = layer.rank or 0
        for half in ("1", "2"):
            if f"t{half}" in tensors:
                _sized(tensors[f"t{half}"], (r, r, *kernel), f"t{half}")
                _sized(tensors[f"w{half}_a"], (r, out), f"w{half}_a")
                _sized(tensors[f"w{half}_b"], (r, inputs), f"w{half}_b")
            else:
                _sized(tensors[f"w{half}_a"], (out, r), f"w{half}_a")
                _sized(tensors[f"w{half}_b"], (r, inputs, *kernel), f"w{half}_b")
    elif layer.kind == "lokr":
        one, two = _lokr_shape(tensors, "w1"), _lokr_shape(tensors, "w2", kernel)
        if (one[0] * two[0], one[1] * two[1]) != (out, inputs * math.prod(kernel)):
            raise ValueError(f"its w1 {list(one)} and w2 {list(two)} do not make a weight {list(shape)}")
    elif layer.kind == "full":
        if "diff" in tensors:
            _sized(tensors["diff"], shape, "diff")
    elif layer.kind == "ia3":
        wanted = inputs if tensors["on_input"].item() else out
        if tensors["weight"].size != wanted:  # a convolution's is [1, n, 1, 1]
            raise ValueError(f"its weight is {list(tensors['weight'].shape)}, the module needs {wanted} numbers")
    if layer.magnitude is not None and layer.magnitude.size not in shape[: 1 if layer.magnitude_by == "peft" else 2]:
        raise ValueError(f"its magnitude {list(layer.magnitude.shape)} fits no axis of a weight {list(shape)}")


def _sized(tensor: Float32, wanted: Shape, role: str) -> None:
    """Same leading size and same number of elements: trainers write a 1x1 kernel, or leave it out."""
    if tensor.size != math.prod(wanted) or not tensor.shape or tensor.shape[0] != wanted[0]:
        raise ValueError(f"its {role} is {list(tensor.shape)}, the module needs {list(wanted)}")


def _lokr_shape(tensors: Tensors, part: str, kernel: Shape = ()) -> tuple[int, int]:
    """Rows and columns of a factor, the taps of a convolution among its columns."""
    if part in tensors:
        whole = tensors[part]
        if whole.ndim < 2:
            raise ValueError(f"its {part} is {list(whole.shape)}, not a matrix")
        return len(whole), whole.size // len(whole)
    a, b = tensors[f"{part}_a"], tensors[f"{part}_b"]
    if part == "w2" and "t2" in tensors:
        r = len(tensors["t2"])
        for role, tensor in (("w2_a", a), ("w2_b", b)):
            _sized(tensor, (r, tensor.size // r), role)
        _sized(tensors["t2"], (r, r, *kernel), "t2")
        return a.size // r, b.size // r * math.prod(kernel)
    if a.ndim < 2 or b.ndim < 2 or a.size != len(a) * len(b):
        raise ValueError(f"its {part}_a {list(a.shape)} and {part}_b {list(b.shape)} do not multiply")
    return len(a), b.size // len(b)
