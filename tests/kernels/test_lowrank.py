"""The low-rank linear layers against fp64: every element of every case within its rigorous bound."""

from __future__ import annotations

import pytest
import torch

from stepforge.kernels import bounds, lowrank, reference
from stepforge.kernels.dispatch.tiles import Tile, padded_rank
from stepforge.kernels.packing import Pair, block_table, pack

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
SMALL = Tile(16, 32, 32, warps=4, stages=2, group_m=2)
LARGE = Tile(64, 128, 64, warps=4, stages=3)


def layer(m, k, n, rank, *, dtype=HALF, slices=1, adapters=1, bias=True, residual=False):
    """Inputs with the sizes of a network's: W ~ 1/√K, A ~ 1/√K, B ~ 1/√r. Lanes above the rank hold NaN."""
    r = padded_rank(rank)
    a = torch.randn(adapters, slices, r, k) / k**0.5
    b = torch.randn(adapters, n, r) / rank**0.5
    a[:, :, rank:] = torch.nan
    b[:, :, rank:] = torch.nan
    given = {
        "x": torch.randn(m, k),
        "w": torch.randn(n, k) / k**0.5,
        "a": a,
        "b": b,
        "bias": torch.randn(n) if bias else None,
        "residual": torch.randn(m, n) if residual else None,
    }
    given = {name: tensor.to(dtype) if tensor is not None else None for name, tensor in given.items()}
    given["scale"] = torch.rand(adapters, slices, r // 16) + 0.5
    given["ranks"] = torch.full((adapters,), rank, dtype=torch.int32)
    return given


def call(path, given, *, tile=SMALL, nt=1, parts=1, **extra):
    given = {**given, **extra}
    first = [given.pop(name) for name in ("x", "w", "a", "b", "scale", "ranks")]
    if path == "onepass":
        return lowrank.onepass(*first, tile=tile, nt=nt, **given)
    return lowrank.split(*first, tile=tile, parts=parts, **given)


def check(path, given, **extra):
    result = call(path, given, **extra)
    exact, bound = bounds.lowrank_linear(**given, **{k: v for k, v in extra.items() if k == "table"})
    assert result.dtype == given["x"].dtype
    assert result.shape == exact.shape
    ratio = bounds.excess(result, exact, bound)
    assert ratio <= 1.0, f"{path}: off by {ratio:.2f} of its bound"


CASES = {  # m, k, n, rank
    "one row": (1, 48, 32, 4),
    "rows below a block": (15, 80, 64, 8),
    "one block": (16, 64, 32, 16),
    "one row over": (17, 112, 40, 1),
    "prompt tokens": (77, 96, 33, 12),
    "K with a tail": (33, 33, 31, 3),
    "N of 8": (16, 64, 8, 24),
    "rank 32": (40, 64, 96, 32),
    "rank 64": (20, 64, 65, 64),
    "rank 100": (18, 48, 31, 100),
    "rank 128": (16, 32, 32, 128),
    "two parts of K": (16, 272, 32, 8),
}


def long_but(quick, names):
    return [name if name in quick else pytest.param(name, marks=[pytest.mark.slow, pytest.mark.long]) for name in names]


@pytest.mark.parametrize("path", ["onepass", "split"])
@pytest.mark.parametrize("case", long_but(("one row over", "K with a tail", "rank 100", "two parts of K"), CASES))
@pytest.mark.parametrize("dtype", [BRAIN, FULL], ids=str)
def test_other_types_within_the_bound(dtype, case, path):
    check(path, layer(*CASES[case], dtype=dtype), nt=2, parts=2)


@pytest.mark.parametrize("path", ["onepass", "split"])
@pytest.mark.parametrize("case", CASES)
def test_within_the_bound(case, path):
    check(path, layer(*CASES[case]), nt=2, parts=2)


@pytest.mark.parametrize("path", ["onepass", "split"])
@pytest.mark.parametrize("rank", [16, 64])
def test_shipped_tile(path, rank):
    """The tile that sm_80 runs, on a layer with the residues of SD1.5's first level."""
    check(path, layer(130, 320, 320, rank), tile=LARGE, nt=2)


@pytest.mark.parametrize("path", ["onepass", "split"])
@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL], ids=str)
def test_residual(dtype, path):
    check(path, layer(20, 64, 48, 8, dtype=dtype, residual=True), nt=2)


@pytest.mark.parametrize("path", ["onepass", "split"])
@pytest.mark.parametrize("dtype", [HALF, FULL], ids=str)
def test_packed_slices(dtype, path):
    check(path, layer(34, 64, 3 * 40, 8, dtype=dtype, slices=3), nt=2)


@pytest.mark.parametrize("path", ["onepass", "split"])
@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL], ids=str)
def test_rows_on_different_adapters(dtype, path):
    given = layer(3 * 20, 64, 72, 8, dtype=dtype, adapters=2)
    check(path, given, table=block_table([1, -1, 0], 20, SMALL.block_m), nt=2)


INPUTS = {
    "as PEFT starts": lambda given: given["b"].mul_(1e-2),
    "the adapter undoes the layer": lambda given: cancel(given),
    "large offset": lambda given: given["x"].add_(64),
    "subnormal": lambda given: given["x"].mul_(2.0**-18),
    "S below the normal range": lambda given: alone(given, 2.0**-20),
    "zeros": lambda given: given["x"].zero_(),
    "the largest numbers": lambda given: (given["x"].fill_(60000), given["scale"].fill_(1e-4)),
}


def cancel(given):
    """B A ≈ −W, so that two sums of size 1 leave nearly nothing."""
    rank, k = int(given["ranks"][0]), given["x"].shape[1]
    given["a"][0, 0, :rank] = torch.eye(k)[:rank].to(given["a"].dtype)
    given["b"][0, :, :rank] = -given["w"][:, :rank]
    given["scale"].fill_(1.0)
    given["bias"].zero_()


def alone(given, strength):
    """The low-rank term without a layer to hide in."""
    given["w"].zero_()
    given["bias"].zero_()
    given["b"].mul_(64)
    given["scale"].fill_(strength)


@pytest.mark.parametrize("path", ["onepass", "split"])
@pytest.mark.parametrize("family", INPUTS)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # to infinity, as it must
def test_hard_inputs(family, path):
    given = layer(17, 32, 40, 32)
    INPUTS[family](given)
    check(path, given)


@pytest.mark.parametrize("path", ["onepass", "split"])
def test_no_worse_than_separate_launches(path):
    """Against fp64, the fused layer is at most twice as far off as the same arithmetic in separate fp16 operations."""
    given = layer(64, 320, 64, 16)
    scale = given["scale"][0, 0].repeat_interleave(16)
    exact, _ = bounds.lowrank_linear(**given)
    apart = given["x"] @ given["w"].T + given["bias"]
    apart = apart + (given["x"] @ given["a"][0, 0].T * scale).half() @ given["b"][0].T
    fused = call(path, given)
    assert (fused - exact).abs().max() <= 2 * (apart - exact).abs().max() + 1e-6


@pytest.mark.parametrize("path", ["onepass", "split"])
def test_agrees_with_merged_weights(path):
    """Within both bounds, where the merged weight also pays for its own rounding."""
    given = layer(33, 64, 48, 8)
    up = given["b"][0, :, :8].double() * given["scale"][0, 0, 0].double()
    merged = given["w"].double() + up @ given["a"][0, 0, :8].double()
    exact = given["x"].double() @ merged.half().double().T + given["bias"].double()
    _, bound = bounds.lowrank_linear(**given)
    rounding = bounds.UNIT[HALF] * given["x"].double().abs() @ merged.abs().T
    assert bounds.excess(call(path, given), exact, bound + rounding) <= 1.0


def test_packed_adapters_of_unequal_rank():
    """Two pairs on one slice keep their own strengths; a change of strength changes data only."""
    pairs = [Pair(torch.randn(r, 48).half() / 7, torch.randn(64, r).half() / 3, s) for r, s in ((4, 0.5), (20, -1.25))]
    packed = pack([[pairs], [[pairs[1]]]])
    assert packed.a.shape == (2, 1, 64, 48)
    assert packed.ranks.tolist() == [48, 32]
    assert packed.spans[0][0] == ((0, 1), (1, 3))
    x, w = torch.randn(16, 48).half(), torch.randn(64, 48).half() / 7
    for strengths in ((0.5, -1.25), (0.0, 2.0)):
        packed.set_strengths(0, strengths)
        delta = sum(s * pair.up.double() @ pair.down.double() for s, pair in zip(strengths, pairs, strict=True))
        exact = x.double() @ (w.double() + delta).T
        parts = {"a": packed.a, "b": packed.b, "scale": packed.scale, "ranks": packed.ranks}
        own, bound = bounds.lowrank_linear(x, w, **parts)
        assert (own - exact).abs().max() < 1e-12
        assert bounds.excess(lowrank.onepass(x, w, **parts, tile=SMALL), exact, bound) <= 1.0


def test_reference_is_the_plain_formula():
    given = layer(5, 12, 6, 3, dtype=FULL)
    a, b = given["a"][0, 0, :3].double(), given["b"][0, :, :3].double()
    delta = float(given["scale"][0, 0, 0]) * b @ a
    exact = given["x"].double() @ (given["w"].double() + delta).T + given["bias"].double()
    assert (reference.lowrank_linear(**given) - exact).abs().max() < 1e-5


REFUSED = {
    "x of another type": (lambda g: g | {"x": g["x"].float()}, "kernels take one of"),
    "K that differs": (lambda g: g | {"w": g["w"][:, :-1].contiguous()}, "a has shape|w has shape"),
    "rows that lie apart": (lambda g: g | {"x": g["x"].T.contiguous().T}, "rows of x"),
    "R not a power of two": (
        lambda g: g | {"a": g["a"][:, :, :12].contiguous(), "b": g["b"][..., :12].contiguous()},
        "power of two",
    ),
    "table of another type": (lambda g: g | {"table": torch.zeros(1, 3)}, "int32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    change, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call("onepass", change(layer(8, 32, 32, 4)))
