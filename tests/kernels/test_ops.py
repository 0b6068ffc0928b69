"""The torch operators: they are their references on the CPU, and torch.compile and torch.export see through them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import stepforge.kernels as kernels
from stepforge.kernels import bounds, fallback, lowrank, ops, reference
from stepforge.kernels.dispatch import choose as dispatch
from stepforge.kernels.packing import Pair, block_table, pack

packed = pack([[[Pair(torch.randn(4, 32), torch.randn(64, 4), 0.5)]], [[Pair(torch.randn(8, 32), torch.randn(64, 8))]]])
PARTS = {"a": packed.a, "b": packed.b, "scale": packed.scale, "ranks": packed.ranks}


class Block(torch.nn.Module):
    """The places of a U-Net block that the kernels take: norm, adapted convolution and linear layers, GEGLU."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(32, 32, 3, padding=1)
        self.linear = torch.nn.Linear(32, 64)
        self.norm = torch.nn.GroupNorm(4, 32)
        down = torch.nn.Parameter(torch.randn(4, 32, 3, 3))
        self.bank = pack([[[Pair(down.detach(), torch.randn(32, 4), 0.5)]]])

    def forward(self, x, table):
        y, _ = kernels.group_norm(x, self.norm.weight, self.norm.bias, 4, 1e-5)
        bank = self.bank
        y = kernels.lowrank_conv(self.conv(y), y, bank.a, bank.b, bank.scale, bank.ranks)
        tokens = y.flatten(2).transpose(1, 2)
        h = kernels.lowrank_linear(tokens, self.linear.weight, **PARTS, bias=self.linear.bias, table=table, block_m=16)
        return kernels.geglu(h)


def inputs():
    return torch.randn(2, 32, 6, 6), block_table([1, -1], 36, 16)


def test_compiles_as_one_graph():
    """aot_eager also traces the operators with fake tensors, which eager does not."""
    block, given = Block(), inputs()
    with torch.no_grad():
        expected = block(*given)
        assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(*given), expected)
    torch._dynamo.reset()


def test_exports():
    block, given = Block().eval(), inputs()
    with torch.no_grad():
        program = torch.export.export(block, given)
        assert torch.equal(program.module()(*given), block(*given))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    for name in ("lowrank_linear", "lowrank_conv", "group_norm", "geglu"):
        assert f"stepforge.{name}.default" in called


CALLS = {
    "lowrank_linear": lambda: (
        torch.randn(20, 32), torch.randn(64, 32), *PARTS.values(), block_table([1, 0], 10, 16), torch.randn(64), None,
        16,
    ),
    "lowrank_conv": lambda: (
        torch.randn(1, 4, 5, 8), torch.randn(1, 4, 5, 6), torch.randn(1, 16, 3, 3, 6), torch.randn(1, 8, 16),
        torch.ones(1, 1, 1), torch.tensor([7], dtype=torch.int32), None, 1, 1, 0,
    ),
    "group_norm": lambda: (
        torch.randn(2, 8, 3, 5).to(memory_format=torch.channels_last), torch.randn(12), torch.randn(12), 2, 1e-5, True,
        torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last), torch.randn(2, 12), None, torch.randn(8), True,
    ),
    "layer_norm": lambda: (torch.randn(3, 10), torch.randn(10), torch.randn(10), 1e-5, torch.randn(10)),
    "widen": lambda: (torch.randn(6, 10), torch.randn(2, 4, 10), torch.randn(10), torch.randn(10), 1e-5, False, None),
    "widen_norm": lambda: (
        torch.randn(2, 8, 3, 5).to(memory_format=torch.channels_last), torch.randn(2, 4, 8), torch.randn(8), torch.randn(8), 2,
        1e-5, False, None, torch.randn(1, 8), None, None, True,
    ),
    "image_sum": lambda: (torch.randn(1, 4, 3, 5), torch.randn(1, 4, 3, 5), torch.randn(4), 2),
    "geglu": lambda: (torch.randn(3, 10),),
    "guide_update": lambda: (
        torch.randn(3, 9), torch.randn(2, 3, 2), torch.randn(2, 3, 4), torch.rand(2, 4),
        torch.tensor([0, 2], dtype=torch.int32), torch.randn(2, 3, 9), torch.randn(2, 9), torch.zeros(2, 9),
        torch.tensor([1, 0], dtype=torch.int32), torch.tensor([[0, 1], [2, 0]], dtype=torch.int32), 1, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_operator_is_well_formed(name):
    """torch's own check: schema, aliasing, what it changes, fake tensors against real ones."""
    operator = getattr(torch.ops.stepforge, name).default
    torch.library.opcheck(operator, CALLS[name](), test_utils=("test_schema", "test_faketensor"))


def test_update_advances_the_step():
    given = CALLS["guide_update"]()
    *first, num_x, _ = given
    prediction, guidance, table, scale_in, step, state, z, sample, places, sources = first
    new, seen = reference.guide_update(prediction, guidance, table, scale_in, step, state, z, places, sources, num_x)
    ops.guide_update(*first, num_x=num_x)
    assert step.tolist() == [1, 3]
    assert torch.equal(state, new)
    assert torch.equal(sample, seen)


@pytest.mark.parametrize("table", [None, block_table([1, -1, 0], 20, 64)], ids=["one adapter", "three"])
def test_addmm_in_fp32_is_within_the_bound(table):
    """The same bound as the kernels, and the right adapter for each row."""
    given = {"x": torch.randn(60, 32), "w": torch.randn(64, 32), **PARTS, "bias": torch.randn(64)}
    exact, bound = bounds.lowrank_linear(**given, table=table)
    assert bounds.excess(fallback.addmm(**given, table=table), exact, bound) <= 1.0
    if table is not None:
        rows = fallback.adapter_of_row(torch.cat([table, torch.tensor([[60, 0, -1]] * 3)]).int(), 60)
        assert rows.tolist() == [1] * 20 + [-1] * 20 + [0] * 20


def test_the_path_that_dispatch_names_is_taken(monkeypatch):
    """A recorder in place of each path; shapes of SDXL at sm_80, which need no data to be looked up."""
    taken = []
    for module, name in ((lowrank, "onepass"), (lowrank, "split"), (fallback, "addmm")):
        monkeypatch.setattr(module, name, lambda *args, name=name, **kw: taken.append((name, kw.get("nt"))))

    def path(m, k, n, rank, *, dtype=torch.float16, slices=1, table=None):
        bank = (
            torch.empty(1, slices, rank, k, dtype=dtype), torch.empty(1, n, rank, dtype=dtype),
            torch.empty(1, slices, rank // 16), torch.zeros(1, dtype=torch.int32),
        )  # fmt: skip
        x, w = torch.empty(m, k, dtype=dtype), torch.empty(n, k, dtype=dtype)
        ops.run_linear(x, w, *bank, arch=80, table=table, block_m=64 if table is not None else 0)
        return taken.pop()

    for shape in ((8192, 640, 640, 16), (8192, 640, 5120, 16), (2048, 1280, 1280, 128)):
        assert path(*shape)[0] == dispatch.dispatch(dispatch.Layer("", *shape[:3]), shape[3], 80).path
    assert path(2, 1280, 1280, 16)[0] == "addmm"  # the time embedding
    assert path(8192, 640, 640, 16, dtype=torch.float32)[0] == "addmm"
    assert path(8192, 633, 640, 16)[0] == "addmm"
    assert path(154, 640, 640, 16, table=block_table([0, -1], 77, 64))[0] in ("onepass", "split")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("table", [None, block_table([1, -1], 75, 64)], ids=["one adapter", "two images"])
def test_dispatched_layer_is_within_the_bound(table, arch):
    """What CUDA tensors would run, tile and all, on a transposed view as attention's reshapes leave it."""
    x = torch.randn(32, 150).half().T
    bank = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in PARTS.items()}
    bank["scale"] = PARTS["scale"]
    given = {"x": x, "w": torch.randn(64, 32).half(), **bank, "residual": torch.randn(64, 150).half().T}
    found = ops.run_linear(**given, arch=arch, table=table, block_m=64)
    exact, bound = bounds.lowrank_linear(**given, table=table)
    assert bounds.excess(found, exact, bound) <= 1.0


def test_importing_the_package_needs_neither_torch_nor_triton(tmp_path):
    code = "import sys, stepforge.kernels; assert not {'torch', 'triton', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.slow
def test_operators_run_on_a_cpu_without_triton(tmp_path):
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, stepforge.kernels as kernels\n"
        "bank = kernels.pack([[[kernels.Pair(torch.randn(4, 8), torch.randn(6, 4))]]])\n"
        "args = torch.randn(5, 8), torch.randn(6, 8), bank.a, bank.b, bank.scale, bank.ranks\n"
        "assert kernels.geglu(kernels.lowrank_linear(*args)).shape == (5, 3)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path)


def test_public_names_exist():
    assert set(kernels.__all__) == set(kernels.HOMES)
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)
    with pytest.raises(AttributeError, match="lowrank_linear"):
        kernels.lowrank_liner  # noqa: B018
