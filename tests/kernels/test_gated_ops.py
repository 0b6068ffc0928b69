"""`ops.lowrank_geglu`: torch sees through it, the path that dispatch names runs, and the model behind that choice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import stepforge.kernels as kernels
from stepforge.kernels import bounds, fallback, gated, lowrank, ops
from stepforge.kernels.dispatch import choose as dispatch
from stepforge.kernels.dispatch import cost
from stepforge.kernels.dispatch.layers import GATED, Layer
from stepforge.kernels.dispatch.tiles import ARCHES, block_rows
from stepforge.kernels.packing import block_table

HALF, FULL = torch.float16, torch.float32
NAMES = ("x", "w", "a", "b", "scale", "ranks")


def layer(m=40, k=32, n=48, *, dtype=FULL):
    """Two adapters of rank 16, n columns of the output."""
    given = {
        "x": torch.randn(m, k),
        "w": torch.randn(2 * n, k) / k**0.5,
        "a": torch.randn(2, 1, 16, k) / k**0.5,
        "b": torch.randn(2, 2 * n, 16) / 4,
        "bias": torch.randn(2 * n),
    }
    given = {name: tensor.to(dtype) for name, tensor in given.items()}
    return given | {"scale": torch.rand(2, 1, 1) + 0.5, "ranks": torch.tensor([16, 7], dtype=torch.int32)}


class FeedForward(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(32, 96)

    def forward(self, x, a, b, scale, ranks, table):
        return kernels.lowrank_geglu(
            x, self.up.weight, a, b, scale, ranks, bias=self.up.bias, table=table, block_m=16
        )  # fmt: skip


def module_inputs():
    bank = layer()
    return torch.randn(2, 20, 32), *(bank[name] for name in NAMES[2:]), block_table([1, -1], 20, 16)


def test_compiles_as_one_graph():
    block, given = FeedForward(), module_inputs()
    with torch.no_grad():
        expected = block(*given)
        assert expected.shape == (2, 20, 48)
        assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(*given), expected)
    torch._dynamo.reset()


def test_exports():
    block, given = FeedForward().eval(), module_inputs()
    with torch.no_grad():
        program = torch.export.export(block, given)
        assert torch.equal(program.module()(*given), block(*given))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "stepforge.lowrank_geglu.default" in called


@pytest.mark.parametrize("table", [None, block_table([1, 0], 10, 16)], ids=["one adapter", "two"])
def test_operator_is_well_formed(table):
    given = layer(20, 32, 24)
    arguments = (*(given[name] for name in NAMES), table, given["bias"], 16)
    operator = torch.ops.stepforge.lowrank_geglu.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_operator_refuses_halves_that_do_not_fit():
    given = layer()
    with pytest.raises(ValueError, match="95 rows"):
        kernels.lowrank_geglu(**{**given, "w": given["w"][:-1]})
    with pytest.raises(ValueError, match="2 slices"):
        kernels.lowrank_geglu(**{**given, "a": given["a"].repeat(1, 2, 1, 1)})


def test_the_path_that_dispatch_names_is_taken(monkeypatch):
    """A recorder in place of each path; shapes of SDXL, which need no data to be looked up."""
    taken = []
    for module, name in (
        (gated, "lowrank_geglu"), (lowrank, "onepass"), (lowrank, "split"), (fallback, "addmm"), (gated, "geglu"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *args, name=name, **kw: taken.append(name))

    def path(m, k, n, rank, *, dtype=HALF, table=None, arch=80):
        bank = (
            torch.empty(1, 1, rank, k, dtype=dtype), torch.empty(1, n, rank, dtype=dtype),
            torch.empty(1, 1, rank // 16), torch.zeros(1, dtype=torch.int32),
        )  # fmt: skip
        x, w = torch.empty(m, k, dtype=dtype), torch.empty(n, k, dtype=dtype)
        ops.run_geglu(x, w, *bank, arch=arch, table=table, block_m=64 if table is not None else 0)
        found = tuple(taken)
        taken.clear()
        return found

    calls = {"gated": ("lowrank_geglu",), **{name: (name, "geglu") for name in ("onepass", "split", "addmm")}}
    chosen = {
        (one, rank, arch): dispatch.dispatch(one, rank, arch).path
        for one in GATED
        for rank in (16, 128)
        for arch in (80, 90)
    }
    for (one, rank, arch), name in chosen.items():
        assert path(one.m, one.k, one.n, rank, arch=arch) == calls[name]
    assert {"gated", "addmm"} <= set(chosen.values())
    assert path(154, 640, 5120, 16, table=block_table([0, -1], 77, 64)) == ("lowrank_geglu",)
    assert path(2048, 1280, 10240, 16, dtype=FULL) == ("addmm", "geglu")
    assert path(2, 1280, 10240, 16) == ("addmm", "geglu")
    assert path(2048, 633, 5120, 16) == ("addmm", "geglu")
    assert path(2048, 640, 5120, 256) == ("addmm", "geglu")
    assert path(2048, 640, 5136, 16)[1:] == ("geglu",)  # 2568 columns are no multiple of 16


@pytest.mark.parametrize(("arch", "dtype"), [(80, HALF), (90, HALF), (80, FULL)], ids=str)
@pytest.mark.parametrize("table", [None, block_table([1, -1], 75, 64)], ids=["one adapter", "two images"])
def test_dispatched_layer_is_within_the_bound(table, arch, dtype, monkeypatch):
    """What CUDA tensors would run, tile and all, on a transposed view as attention's reshapes leave it; addmm for fp32.

    Half types on the gated path, whose error the bound is about: for layers this small dispatch may take another.
    """
    choose = ops.dispatch
    monkeypatch.setattr(ops, "dispatch", lambda *args, **options: replace(choose(*args, **options), path="gated"))
    given = layer(150, dtype=dtype)
    given["x"] = torch.randn(32, 150).to(dtype).T
    found = ops.run_geglu(**given, arch=arch, table=table, block_m=64)
    exact, bound = bounds.lowrank_geglu(**given, table=table)
    assert bounds.excess(found, exact, bound) <= 1.0


@pytest.mark.parametrize("arch", ARCHES)
def test_every_layer_has_a_path(arch):
    for one in GATED:
        for rank in (1, 16, 24, 64, 100, 128, 200):
            for grouped in (False, True):
                choice = dispatch.dispatch(one, rank, arch, grouped=grouped)
                assert choice.path in choice.seconds
                assert ("gated" in choice.seconds) == (rank <= 128)
                assert choice.path != "gated" or choice.block_m in block_rows(arch)


def test_model_against_a_second_calculation():
    """SDXL L1 on an A100, rank 16, in µs: 8192 rows of 640 to 2·2560, by hand from FLOPs and bytes."""
    gpu = cost.GPUS["A100"]
    (one,) = (one for one in GATED if one.name == "SDXL L1 GEGLU")
    choice = cost.choose(gpu, one, 16)
    product = 2 * 8192 * 640 * 5120 / (0.73 * 312e6)
    after = 2 * 8192 * (5120 + 2560) / (0.9 * 2039e3) + 2.7
    shrink = 2 * (8192 * 640 + 640 * 16 + 2 * 8192 * 16) / (0.9 * 2039e3) + 2.7
    fused = 2.2 * product * (1 + 16 / 640) + shrink
    assert 1e6 * choice.base == pytest.approx(product + after, rel=1e-3)
    assert 1e6 * choice.seconds["gated"] == pytest.approx(fused, rel=1e-3)
    assert 1e6 * choice.seconds["split"] == pytest.approx(fused + after, rel=1e-3)
    plain = cost.choose(gpu, Layer("", one.m, one.k, one.n), 16)
    assert choice.seconds["onepass"] == plain.seconds["onepass"] + cost.geglu(gpu, one)


def test_explain_prints_both():
    text = dispatch.explain(GATED[0], 16, 80)
    choice = dispatch.dispatch(GATED[0], 16, 80)
    for path in ("gated", "split + geglu", "onepass + geglu"):
        assert f"{path} " in text
        assert f"{1e6 * choice.seconds[path.split()[0]]:.1f}" in text
