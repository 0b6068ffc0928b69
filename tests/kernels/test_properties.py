"""What must hold to the bit, whatever the numbers: padding, guards, order, batching, the off switch."""

from __future__ import annotations

import pytest
import torch

from stepforge.kernels import bounds, lowrank
from stepforge.kernels.dispatch.tiles import Tile
from stepforge.kernels.packing import block_table

pytestmark = pytest.mark.slow  # test_lowrank holds the bounds in the quick lane
TILE = Tile(16, 32, 32, warps=4, stages=2, group_m=2)
# the separate launches in the long lane; test_lowrank has their bounds
PATHS = ["onepass", pytest.param("split", marks=pytest.mark.long)]
both = pytest.mark.parametrize("path", PATHS)


def layer(m=40, k=80, n=96, *, rank=8, r=16, adapters=1, slices=1):
    given = {
        "x": torch.randn(m, k).half(),
        "w": (torch.randn(n, k) / k**0.5).half(),
        "a": (torch.randn(adapters, slices, r, k) / k**0.5).half(),
        "b": torch.randn(adapters, n, r).half(),
        "scale": torch.rand(adapters, slices, r // 16) + 0.5,
        "ranks": torch.full((adapters,), rank, dtype=torch.int32),
    }
    given["a"][:, :, rank:] = 0
    given["b"][:, :, rank:] = 0
    return given


def call(path, given, *, nt=1, parts=1, tile=TILE, **extra):
    first = [given[name] for name in ("x", "w", "a", "b", "scale", "ranks")]
    if path == "onepass":
        return lowrank.onepass(*first, tile=tile, nt=nt, **extra)
    return lowrank.split(*first, tile=tile, parts=parts, **extra)


def plain(given, **extra):
    """The same tiles without an adapter."""
    first = [given[name] for name in ("x", "w", "a", "b", "scale", "ranks")]
    return lowrank.onepass(*first, tile=TILE, low_rank=False, **extra)


def same(one, other):
    assert torch.isfinite(other).all()
    assert torch.equal(one.view(torch.int16), other.view(torch.int16))


@both
def test_strength_0_is_no_adapter(path):
    given = layer()
    base = plain(given)
    given["scale"].zero_()
    same(call(path, given, nt=2), base)


@both
def test_up_of_0_is_no_adapter(path):
    given = layer()
    base = plain(given)
    given["b"].zero_()
    same(call(path, given, nt=3), base)


@both
def test_adapter_minus_1_is_no_adapter(path):
    """Even where every adapter is NaN, and with a bias and a residual. Images of one block each: a row keeps its place in
    its tile, on which the sum of a CPU's BLAS can depend."""
    given = layer(m=32, adapters=2)
    extra = {"bias": torch.randn(96).half(), "residual": torch.randn(32, 96).half()}
    base = plain(given, **extra)
    for name in ("a", "b", "scale"):
        given[name].fill_(torch.nan)
    same(call(path, given, nt=2, table=block_table([-1, -1], 16, 16), **extra), base)


@both
def test_rank_padding_changes_nothing(path):
    """R = 64 with garbage above the rank gives the bits of R = 16."""
    given = layer(rank=16)
    narrow = call(path, given)
    wide = dict(given)
    wide["a"] = torch.full((1, 1, 64, 80), torch.nan).half()
    wide["b"] = torch.full((1, 96, 64), torch.nan).half()
    wide["scale"] = torch.full((1, 1, 4), torch.nan)
    wide["a"][:, :, :16], wide["b"][..., :16], wide["scale"][..., :1] = given["a"], given["b"], given["scale"]
    same(call(path, {**wide, "scale": wide["scale"].nan_to_num(7.0)}), narrow)


def guarded(tensor):
    """The tensor between NaN, or for integers between numbers that would address far outside."""
    guard = 4096
    fill = torch.nan if tensor.is_floating_point() else 1 << 20
    buffer = torch.full((tensor.numel() + 2 * guard,), fill, dtype=tensor.dtype)
    inner = buffer[guard : guard + tensor.numel()].view(tensor.shape)
    inner.copy_(tensor)
    return inner


@both
def test_guard_bands_never_leak(path):
    """Shapes with a tail in every direction: what lies around the inputs is NaN and must not be read into a sum."""
    given = layer(m=19, k=50, n=41, rank=5)
    extra = {"bias": torch.randn(41).half(), "residual": torch.randn(19, 41).half()}
    expected = call(path, given, nt=2, **extra)
    found = call(path, {k: guarded(v) for k, v in given.items()}, nt=2, **{k: guarded(v) for k, v in extra.items()})
    same(found, expected)


@both
def test_nothing_around_the_output_is_written(path, monkeypatch):
    given = layer(m=19, k=50, n=41, rank=5)
    buffers = []

    def empty(like, shape):
        buffer = torch.full((shape[0] * shape[1] + 8192,), 123.0, dtype=like.dtype)
        buffers.append(buffer)
        return buffer[4096:-4096].view(shape)

    monkeypatch.setattr(lowrank, "empty_out", empty)
    call(path, given)
    (buffer,) = buffers
    assert (buffer[:4096] == 123).all()
    assert (buffer[-4096:] == 123).all()


@both
def test_permuted_rows_give_permuted_results(path):
    """Images change places in the batch together with their adapters."""
    given = layer(m=3 * 20, adapters=2)
    expected = call(path, given, table=block_table([0, -1, 1], 20, 16)).view(3, 20, 96)
    order = [2, 0, 1]
    moved = {**given, "x": given["x"].view(3, 20, 80)[order].flatten(0, 1)}
    found = call(path, moved, table=block_table([1, 0, -1], 20, 16)).view(3, 20, 96)
    same(found, expected[order])


@both
def test_table_order_does_not_matter(path):
    given = layer(m=60, adapters=2)
    table = block_table([0, -1, 1], 20, 16)
    same(call(path, given, table=table.flip(0)), call(path, given, table=table))


@both
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
def test_batch_size_does_not_matter(path, rows):
    given = layer(m=64)
    expected = call(path, given)
    for start in (0, 64 - rows):
        part = {**given, "x": given["x"][start : start + rows]}
        same(call(path, part), expected[start : start + rows])


def test_tiles_per_program_do_not_matter():
    given = layer(n=7 * 32 + 5)
    expected = call("onepass", given, nt=1)
    for nt in (2, 3, 7, 9):
        same(call("onepass", given, nt=nt), expected)


@both
def test_packed_slices_are_three_calls(path):
    given = layer(n=3 * 40, slices=3)
    packed = call(path, given, nt=2)
    for part in range(3):
        columns = slice(40 * part, 40 * part + 40)
        one = {
            **given,
            "w": given["w"][columns],
            "a": given["a"][:, part : part + 1].contiguous(),
            "b": given["b"][:, columns].contiguous(),
            "scale": given["scale"][:, part : part + 1].contiguous(),
        }
        same(packed[:, columns].contiguous(), call(path, one, nt=2))


@both
def test_strengths_are_data(path):
    """A strength for each 16 ranks is within the bound of an up matrix that was scaled before."""
    given = layer(rank=32, r=32)
    given["scale"] = torch.tensor([[[0.5, -2.0]]])  # powers of two: scaling b is exact
    ahead = dict(given)
    ahead["b"] = given["b"] * given["scale"][0, 0].repeat_interleave(16).half()
    ahead["scale"] = torch.ones(1, 1, 2)
    exact, bound = bounds.lowrank_linear(**ahead)
    assert bounds.excess(call(path, given), exact, bound) <= 1.0


@both
def test_linear_in_the_strength(path):
    given = layer()
    results = {}
    for strength in (0.0, 1.0, 3.0):
        given["scale"].fill_(strength)
        _, bound = bounds.lowrank_linear(**given)
        results[strength] = call(path, given).double(), bound
    delta = [results[s][0] - results[0.0][0] for s in (1.0, 3.0)]
    allowed = results[3.0][1] + 3 * results[1.0][1] + 4 * results[0.0][1]
    assert ((delta[1] - 3 * delta[0]).abs() <= allowed).all()


@both
def test_concatenated_ranks_are_a_sum(path):
    one, two = layer(rank=16), layer(rank=16)
    two["x"], two["w"] = one["x"], one["w"]
    joint = {
        **one,
        "a": torch.cat([one["a"], two["a"]], dim=2),
        "b": torch.cat([one["b"], two["b"]], dim=2),
        "scale": torch.cat([one["scale"], two["scale"]], dim=2),
        "ranks": one["ranks"] * 2,
    }
    base = one["x"].double() @ one["w"].double().T
    exact = bounds.lowrank_linear(**one)[0] + bounds.lowrank_linear(**two)[0] - base
    assert bounds.excess(call(path, joint), exact, bounds.lowrank_linear(**joint)[1]) <= 1.0


@both
def test_rows_of_x_may_lie_apart(path):
    given = layer()
    store = torch.full((40, 200), torch.nan).half()
    store[:, 16:96] = given["x"]
    residual = torch.full((40, 150), torch.nan).half()
    residual[:, :96] = 0.5
    moved = {**given, "x": store[:, 16:96]}
    same(call(path, moved, residual=residual[:, :96]), call(path, given, residual=residual[:, :96].contiguous()))


@both
def test_two_runs_agree(path):
    given = layer(m=70, k=200)
    same(call(path, given, nt=2, parts=3), call(path, given, nt=2, parts=3))


@both
def test_order_of_programs_does_not_matter(path, orders):
    """Backwards, and interleaved from both ends: a program that reads what another writes would show."""
    given = layer(m=70, adapters=2, n=200)
    table = block_table([0, 1], 35, 16)
    expected = call(path, given, nt=2, parts=2, table=table)
    for _ in orders:
        same(call(path, given, nt=2, parts=2, table=table), expected)


@both
def test_a_stale_table_does_not_stick(path):
    """One table buffer, as a captured graph has it: adapters, then none and fewer images, then adapters again."""
    given = layer(m=60, adapters=2)
    table = block_table([0, 1, 0], 20, 16, length=8)
    first = call(path, given, table=table)
    table.copy_(block_table([-1, -1], 20, 16, length=8))
    none = call(path, given, table=table)
    same(none[:40], plain(given)[:40])
    table.copy_(block_table([0, 1, 0], 20, 16, length=8))
    same(call(path, given, table=table), first)


@both
def test_empty_blocks_write_nothing(path, monkeypatch):
    given = layer(m=40)
    monkeypatch.setattr(lowrank, "empty_out", lambda like, shape: torch.full(shape, 9.0, dtype=like.dtype))
    result = call(path, given, table=block_table([0], 20, 16, length=5))
    assert (result[20:] == 9).all()
    assert not (result[:20] == 9).any()


@both
def test_empty_inputs(path):
    given = layer()
    assert call(path, {**given, "x": given["x"][:0]}).shape == (0, 96)
    none = {**given, "ranks": torch.zeros(1, dtype=torch.int32)}  # rank 0: nothing of the adapter is read
    none["a"] = torch.full_like(given["a"], torch.nan)
    none["b"] = torch.full_like(given["b"], torch.nan)
    same(call(path, none), plain(given))
