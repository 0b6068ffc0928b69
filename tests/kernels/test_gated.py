"""GEGLU in the epilogue of its low-rank up-projection: the bound, the bits, mistakes that are caught."""

from __future__ import annotations

import functools

import pytest
import torch

from stepforge.kernels import bounds, gated, lowrank, reference
from stepforge.kernels.dispatch.tiles import Tile, expand_tile, padded_rank
from stepforge.kernels.packing import block_table

pytestmark = pytest.mark.slow  # the quick lane has three minutes

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
TILE = Tile(16, 32, 32, warps=4, stages=2, group_m=2)  # 16 columns of the output
NAMES = ("x", "w", "a", "b", "scale", "ranks")
GUARD = 4096


def layer(m=40, k=80, n=48, rank=8, *, dtype=HALF, adapters=1, bias=True):
    """Inputs with the sizes of a network's, for n columns of the output. Lanes above the rank hold NaN."""
    r = padded_rank(rank)
    a = torch.randn(adapters, 1, r, k) / k**0.5
    b = torch.randn(adapters, 2 * n, r) / rank**0.5
    a[:, :, rank:] = torch.nan
    b[:, :, rank:] = torch.nan
    given = {"x": torch.randn(m, k), "w": torch.randn(2 * n, k) / k**0.5, "a": a, "b": b}
    given = {name: tensor.to(dtype) for name, tensor in given.items()}
    given["scale"] = torch.rand(adapters, 1, r // 16) + 0.5
    given["ranks"] = torch.full((adapters,), rank, dtype=torch.int32)
    given["bias"] = torch.randn(2 * n).to(dtype) if bias else None
    return given


def call(given, *, tile=TILE, parts=1, table=None):
    first = [given[name] for name in NAMES]
    return gated.lowrank_geglu(*first, tile=tile, parts=parts, table=table, bias=given["bias"])


def check(given, **extra):
    result = call(given, **extra)
    exact, bound = bounds.lowrank_geglu(**given, table=extra.get("table"))
    assert result.dtype == given["x"].dtype
    assert result.shape == exact.shape
    ratio = bounds.excess(result, exact, bound)
    assert ratio <= 1.0, f"off by {ratio:.2f} of its bound"


def plain(given):
    """Without an adapter: the product of the one-pass kernel and GEGLU, each in fp32, rounded once."""
    wide = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in given.items()}
    first = [wide[name] for name in NAMES]
    tile = Tile(16, 16, 32, warps=4, stages=2)
    h = lowrank.onepass(*first, tile=tile, bias=wide["bias"], low_rank=False)
    return gated.geglu(h).to(given["x"].dtype)


def same(one, other):
    assert torch.isfinite(other).all()
    assert torch.equal(one.view(torch.int16), other.view(torch.int16))


CASES = {  # m, k, n, rank
    "one row": (1, 48, 32, 4),
    "rows below a block": (15, 80, 64, 8),
    "one block": (16, 64, 16, 16),
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
QUICK = ("one row over", "K with a tail", "rank 100", "two parts of K")


LONG = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize("case", CASES)
def test_within_the_bound(case):
    check(layer(*CASES[case]), parts=2)


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=LONG) for c in CASES])
@pytest.mark.parametrize("dtype", [BRAIN, FULL], ids=str)
def test_other_types_within_the_bound(dtype, case):
    check(layer(*CASES[case], dtype=dtype), parts=2)


@pytest.mark.parametrize("rank", [16, 64])
def test_shipped_tile(rank):
    """The tile that sm_80 runs, on a layer with the residues of SD1.5's first level."""
    check(layer(130, 320, 160, rank), tile=expand_tile(80, 64))


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL], ids=str)
def test_rows_on_different_adapters(dtype):
    given = layer(3 * 20, dtype=dtype, adapters=2, bias=False)
    check(given, table=block_table([1, -1, 0], 20, 16), parts=2)


def gates(given, offset):
    given["bias"][given["w"].shape[0] // 2 :] = offset


INPUTS = {
    "as PEFT starts": lambda given: given["b"].mul_(1e-2),
    "large offset": lambda given: given["x"].add_(64),
    "subnormal": lambda given: given["x"].mul_(2.0**-18),
    "zeros": lambda given: given["x"].zero_(),
    "gates closed": lambda given: gates(given, -6.0),
    "gates open": lambda given: gates(given, 40.0),
    "product beyond the type": lambda given: given["bias"].fill_(300),
}


@pytest.mark.parametrize("family", INPUTS)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # to infinity, as it must
def test_hard_inputs(family):
    given = layer(17, 32, 40, 32)
    INPUTS[family](given)
    check(given)


def test_no_worse_than_separate_launches():
    """Against fp64, at most twice as far off as the same arithmetic in separate fp16 operations."""
    given = layer(64, 320, 64, 16)
    scale = given["scale"][0, 0].repeat_interleave(16)
    exact, _ = bounds.lowrank_geglu(**given)
    apart = given["x"] @ given["w"].T + given["bias"]
    apart = apart + (given["x"] @ given["a"][0, 0].T * scale).half() @ given["b"][0].T
    value, gate = apart.chunk(2, dim=-1)
    apart = value * torch.nn.functional.gelu(gate)
    assert (call(given) - exact).abs().max() <= 2 * (apart - exact).abs().max() + 1e-6


def test_reference_is_the_plain_formula():
    given = layer(5, 12, 6, 3, dtype=FULL)
    a, b = given["a"][0, 0, :3].double(), given["b"][0, :, :3].double()
    weight = given["w"].double() + float(given["scale"][0, 0, 0]) * b @ a
    value, gate = (given["x"].double() @ weight.T + given["bias"].double()).split(6, dim=1)
    exact = value * gate * (1 + torch.erf(gate / 2**0.5)) / 2
    assert (reference.lowrank_geglu(**given) - exact).abs().max() < 1e-5
    assert (bounds.lowrank_geglu(**given)[0] - exact).abs().max() < 1e-12


@pytest.mark.parametrize("parts", [1, 2])
def test_fp32_has_the_bits_of_two_kernels(parts):
    """`expand` and `geglu` one after the other: in fp32 what is left out is no rounding."""
    given = layer(dtype=FULL)
    first = [given[name] for name in NAMES]
    tile = Tile(16, 16, 32, warps=4, stages=2)
    apart = gated.geglu(lowrank.split(*first, tile=tile, parts=parts, bias=given["bias"]))
    assert torch.equal(call(given, parts=parts), apart)


def test_no_adapter_to_the_bit():
    """Strength 0, B = 0, rank 0 and adapter −1, the last two with NaN in all that must not be read.

    Images of one block each: a row keeps its place in its tile, on which the sum of a CPU's BLAS can depend.
    """
    given = layer(m=32)
    base = plain(given)
    given["a"].nan_to_num_(0.0)
    given["b"].nan_to_num_(0.0)
    same(call({**given, "scale": torch.zeros_like(given["scale"])}), base)
    same(call({**given, "b": torch.zeros_like(given["b"])}), base)
    for name in ("a", "b"):
        given[name].fill_(torch.nan)
    same(call({**given, "ranks": torch.zeros_like(given["ranks"])}), base)
    given["scale"].fill_(torch.nan)
    same(call(given, table=block_table([-1, -1], 16, 16)), base)


def test_rank_padding_changes_nothing():
    """R = 64 with garbage above the rank gives the bits of R = 16."""
    given = layer(rank=16)
    wide = {**given, "scale": torch.full((1, 1, 4), 7.0)}
    wide["a"] = torch.full((1, 1, 64, 80), torch.nan).half()
    wide["b"] = torch.full((1, 96, 64), torch.nan).half()
    wide["a"][:, :, :16], wide["b"][..., :16], wide["scale"][..., :1] = given["a"], given["b"], given["scale"]
    same(call(wide), call(given))


def guarded(tensor):
    """The tensor between NaN, or for integers between numbers that would address far outside."""
    fill = torch.nan if tensor.is_floating_point() else 1 << 20
    buffer = torch.full((tensor.numel() + 2 * GUARD,), fill, dtype=tensor.dtype)
    return buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape).copy_(tensor)


def test_guard_bands_never_leak():
    """Shapes with a tail in every direction: what lies around the inputs is NaN and must not be read into a sum."""
    given = layer(19, 50, 41, 5)
    same(call({name: guarded(tensor) for name, tensor in given.items()}), call(given))


def test_nothing_around_the_output_is_written(monkeypatch):
    buffers = []

    def empty(like, shape):
        buffers.append(torch.full((shape[0] * shape[1] + 2 * GUARD,), 123.0, dtype=like.dtype))
        return buffers[-1][GUARD:-GUARD].view(shape)

    monkeypatch.setattr(gated, "empty_out", empty)
    call(layer(19, 50, 41, 5))
    (buffer,) = buffers
    assert (buffer[:GUARD] == 123).all()
    assert (buffer[-GUARD:] == 123).all()


def test_permuted_rows_give_permuted_results():
    """Images change places in the batch together with their adapters."""
    given = layer(3 * 20, adapters=2)
    expected = call(given, table=block_table([0, -1, 1], 20, 16)).view(3, 20, 48)
    order = [2, 0, 1]
    moved = {**given, "x": given["x"].view(3, 20, 80)[order].flatten(0, 1)}
    same(call(moved, table=block_table([1, 0, -1], 20, 16)).view(3, 20, 48), expected[order])


@pytest.mark.slow
@pytest.mark.long  # test_properties.py asks the same of the other kernels
def test_order_of_blocks_and_programs_does_not_matter(orders):
    """The table backwards; programs backwards, and interleaved from both ends."""
    given = layer(70, n=100, adapters=2)
    table = block_table([0, 1], 35, 16)
    expected = call(given, parts=2, table=table)
    same(call(given, parts=2, table=table.flip(0)), expected)
    for _ in orders:
        same(call(given, parts=2, table=table), expected)


@pytest.mark.parametrize("rows", [17, *(pytest.param(rows, marks=pytest.mark.long) for rows in (1, 15, 16, 33))])
@pytest.mark.slow
def test_batch_size_does_not_matter(rows):
    given = layer(64)
    expected = call(given)
    for start in (0, 64 - rows):
        same(call({**given, "x": given["x"][start : start + rows]}), expected[start : start + rows])


def test_rows_of_x_may_lie_apart():
    given = layer()
    store = torch.full((40, 200), torch.nan).half()
    store[:, 16:96] = given["x"]
    same(call({**given, "x": store[:, 16:96]}), call(given))


@pytest.mark.slow
@pytest.mark.long  # test_properties.py asks the same of the other kernels
def test_a_stale_table_does_not_stick():
    """One table buffer, as a captured graph has it: adapters, then none and fewer images, then adapters again."""
    given = layer(60, adapters=2)
    table = block_table([0, 1, 0], 20, 16, length=8)
    first = call(given, table=table)
    table.copy_(block_table([-1, -1], 20, 16, length=8))
    same(call(given, table=table)[:40], plain(given)[:40])
    table.copy_(block_table([0, 1, 0], 20, 16, length=8))
    same(call(given, table=table), first)


def test_empty_blocks_write_nothing(monkeypatch):
    monkeypatch.setattr(gated, "empty_out", lambda like, shape: torch.full(shape, torch.nan, dtype=like.dtype))
    result = call(layer(40), table=block_table([0], 20, 16, length=5))
    assert result[20:].isnan().all()
    assert result[:20].isfinite().all()


def test_empty_inputs():
    given = layer()
    assert call({**given, "x": given["x"][:0]}).shape == (0, 48)
    nothing = {**given, "w": given["w"][:0], "b": given["b"][:, :0].contiguous(), "bias": given["bias"][:0]}
    assert call(nothing).shape == (40, 0)


REFUSED = {
    "x of another type": (lambda g: g | {"x": g["x"].float()}, "kernels take one of"),
    "K that differs": (lambda g: g | {"w": g["w"][:, :-1].contiguous()}, "a has shape|w has shape"),
    "odd rows of w": (
        lambda g: g | {"w": g["w"][:-1], "b": g["b"][:, :-1].contiguous(), "bias": g["bias"][:-1]},
        "95 rows",
    ),
    "one A for each half": (
        lambda g: g | {"a": g["a"].repeat(1, 2, 1, 1), "scale": g["scale"].repeat(1, 2, 1)},
        "2 slices",
    ),
    "bias of one half": (lambda g: g | {"bias": g["bias"][:48]}, "bias has shape"),
    "up of one half": (lambda g: g | {"b": g["b"][:, :48].contiguous()}, "b has shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    change, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call(change(layer()))


def test_s_of_another_shape_is_refused():
    given = layer()
    first = [given[name] for name in NAMES]
    s = lowrank.shrink(given["x"], given["a"], given["ranks"], block_m=16)
    with pytest.raises(ValueError, match="s has shape"):
        gated.expand_geglu(*first[:2], s[:, 1:], *first[2:], tile=TILE)


def tight():
    """One input, one rank, W = 0: the low-rank term is one product and its bound has no slack."""
    given = layer(19, 150, 41, 1, bias=False)
    given["x"][:, 1:] = 0
    given["w"].zero_()
    given["scale"].fill_(0.7371)
    return given, None


def tailed():
    """Tails in every direction, two strengths, mixed adapters, NaN around every input."""
    given = layer(21, 150, 41, 27, adapters=2)
    given = {name: guarded(tensor) for name, tensor in given.items()}
    given["scale"] = torch.tensor([[[0.7371, -1.9113]], [[1.0, 0.3331]]])
    given["ranks"] = torch.tensor([27, 27], dtype=torch.int32)
    return given, block_table([0, -1, 1], 7, 16)


def passes(make=tailed):
    """Whether the kernel is within its bound and leaves the memory around its output alone."""
    torch.manual_seed(5)
    given, table = make()
    outs = []

    def empty(like, shape):
        outs.append(torch.full((shape[0] * shape[1] + 2 * GUARD,), 77.0, dtype=like.dtype))
        return outs[-1][GUARD:-GUARD].view(shape)

    kept, gated.empty_out = gated.empty_out, empty
    try:
        result = call(given, parts=2, table=table)
    finally:
        gated.empty_out = kept
    clean = all((out[:GUARD] == 77).all() and (out[-GUARD:] == 77).all() for out in outs)
    exact, bound = bounds.lowrank_geglu(**given, table=table)
    return bool(clean) and bounds.excess(result, exact, bound) <= 1.0


passes_unchanged = functools.cache(passes)

MUTATIONS = {
    "gate and value exchanged": ("y = value * gelu(gate)", "y = gate * gelu(value)"),
    "silu for gelu": ("y = value * gelu(gate)", "y = value * gate / (1.0 + tl.exp(-gate))"),
    "tanh's gelu": (
        "y = value * gelu(gate)",
        "y = value * gate / (1.0 + tl.exp(-1.5957691216 * (gate + 0.044715 * gate * gate * gate)))",
    ),
    "gates' W from the values": ("loaded(w_cols + N * K + ks", "loaded(w_cols + ks"),
    "gates' B from the values": ("loaded(ups + N * R, up_ok", "loaded(ups, up_ok"),
    "gates' bias from the values": ("bias + N + cols", "bias + cols"),
    "adapter's B half as far": ("adapter.to(tl.int64) * 2 * N * R", "adapter.to(tl.int64) * N * R"),
    "K of x and w not masked": (
        "w_ok = (ks < K)[:, None] & col_ok[None, :]\n"
        "            xs = loaded(x_rows + ks[None, :], row_ok[:, None] & (ks < K)[None, :], UPCAST)",
        "w_ok = col_ok[None, :]\n            xs = loaded(x_rows + ks[None, :], row_ok[:, None], UPCAST)",
    ),
    "rank of b not masked": ("up_ok = rank_ok[:, None] & col_ok[None, :]", "up_ok = col_ok[None, :]"),
    "columns not masked": ("col_ok = cols < N", "col_ok = cols < 2 * N"),
    "last tile of K skipped": ("for k in range(0, K, BLOCK_K)", "for k in range(0, K - BLOCK_K, BLOCK_K)"),
    "second part of K skipped": ("for i in tl.static_range(1, SPLIT):", "for i in tl.static_range(1, 1):"),
    "strengths in another order": ("offs_r // 16)", "(R - 1 - offs_r) // 16)"),
    "no adapter taken for the first": ("if adapter >= 0:", "if adapter >= -1:"),
}


@pytest.mark.parametrize("case", MUTATIONS)
# a mutant reads memory that is not its own; what it finds there may overflow, or be infinite
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.slow
def test_mistake_is_caught(case, mutant):
    assert passes_unchanged()
    mutant(gated, *MUTATIONS[case])
    assert not passes()


def test_strength_after_the_rounding_is_caught(mutant):
    """Three roundings where the bound allows one: the order of strength and rounding."""
    late = "rounded(total, kind, UPCAST) * strength[None, :].to(kind)"
    assert passes_unchanged(tight)
    mutant(gated, "rounded(total * strength[None, :], kind, UPCAST)", late)
    assert not passes(tight)


def test_halves_rounded_before_the_product_are_caught(mutant):
    """What the kernel is for: a rounding of h, as two kernels have it, is beyond the bound of one."""
    old = "y = value * gelu(gate)"
    new = "y = value.to(b.dtype.element_ty).to(tl.float32) * gelu(gate.to(b.dtype.element_ty).to(tl.float32))"
    mutant(gated, old, new)
    assert not passes()
