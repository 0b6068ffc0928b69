"""The compiled kernels on a GPU, at the shipped tiles: `TRITON_INTERPRET=0 pytest -m gpu tests/kernels`."""

from __future__ import annotations

import pytest
import torch
import triton

from stepforge.kernels import bounds, conv, gated, lowrank, norms, ops, reference, sums, wide
from stepforge.kernels.dispatch import tiles
from stepforge.kernels.launch import interpreted
from stepforge.kernels.packing import block_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
    pytest.mark.skipif(interpreted(), reason="the interpreter is on: set TRITON_INTERPRET=0"),
]
CORE = bounds.TENSOR_CORE_SUM
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def layer(m, k, n, rank, dtype, *, slices=1, adapters=1):
    r = tiles.padded_rank(rank)
    a = torch.randn(adapters, slices, r, k, device="cuda") / k**0.5
    b = torch.randn(adapters, n, r, device="cuda") / rank**0.5
    a[:, :, rank:] = torch.nan
    b[..., rank:] = torch.nan
    return {
        "x": torch.randn(m, k, device="cuda").to(dtype),
        "w": (torch.randn(n, k, device="cuda") / k**0.5).to(dtype),
        "a": a.to(dtype),
        "b": b.to(dtype),
        "scale": torch.rand(adapters, slices, r // 16, device="cuda") + 0.5,
        "ranks": torch.full((adapters,), rank, dtype=torch.int32, device="cuda"),
    }


def within(result, exact, bound):
    ratio = bounds.excess(result, exact, bound)
    assert ratio <= 1.0, f"off by {ratio:.2f} of the bound"


def arch():
    return ops.arch_of(torch.device("cuda", 0))


@DTYPES
@pytest.mark.parametrize("rank", [4, 16, 32, 64, 128])
@pytest.mark.parametrize("shape", [(8192, 320, 320), (154, 768, 640), (2048, 1280, 1280), (130, 656, 1008)], ids=str)
def test_both_paths(shape, rank, dtype):
    given = layer(*shape, rank, dtype)
    extra = {"bias": torch.randn(shape[2], device="cuda").to(dtype)}
    extra["residual"] = torch.randn(shape[0], shape[2], device="cuda").to(dtype)
    expected = bounds.lowrank_linear(**given, **extra, u=CORE)
    for block in tiles.block_rows(arch()):
        if tiles.padded_rank(rank) in tiles.ONEPASS_RANKS:
            tile = tiles.onepass_tile(arch(), tiles.padded_rank(rank), block)
            for nt in (1, 3):
                within(lowrank.onepass(**given, **extra, tile=tile, nt=nt), *expected)
        for parts in (1, 2):
            within(lowrank.split(**given, **extra, tile=tiles.expand_tile(arch(), block), parts=parts), *expected)


@DTYPES
def test_off_switch_is_exact(dtype):
    given = layer(2048, 640, 1920, 16, dtype, slices=3, adapters=2)
    tile = tiles.onepass_tile(arch(), 16, 64)
    base = lowrank.onepass(**given, tile=tile, low_rank=False)
    table = block_table([-1, 1], 1024, 64).cuda()
    mixed = lowrank.onepass(**given, tile=tile, nt=2, table=table)
    assert torch.equal(mixed[:1024], base[:1024])
    assert not torch.equal(mixed[1024:], base[1024:])
    given["a"].nan_to_num_(0.0)
    given["b"].nan_to_num_(0.0)
    given["scale"].zero_()
    assert torch.equal(lowrank.onepass(**given, tile=tile, nt=2), base)


@DTYPES
def test_operators_take_the_dispatched_path(dtype):
    for shape in ((8192, 640, 640), (2048, 1280, 3840), (2, 1280, 1280), (8192, 633, 640)):
        given = layer(*shape, 16, dtype)
        exact, bound = bounds.lowrank_linear(**given, u=CORE)
        found = ops.lowrank_linear(**given)
        # addmm rounds y and S once more
        within(found, exact, 3 * bound)


@DTYPES
def test_convolution(dtype):
    given = layer(1, 9 * 320, 320, 16, dtype)
    x = torch.randn(2, 32, 32, 320, device="cuda").to(dtype)
    y = torch.randn(2, 32, 32, 320, device="cuda").to(dtype)
    parts = {"a": given["a"].view(1, 16, 3, 3, 320), **{name: given[name] for name in ("b", "scale", "ranks")}}
    expected = bounds.lowrank_conv(y, x, **parts, u=CORE)
    within(conv.lowrank_conv(y, x, **parts, tile=tiles.expand_tile(arch(), 64)), *expected)


@DTYPES
@pytest.mark.parametrize("side", [64, 32, 16, 8])
@pytest.mark.parametrize("channels", [(320, 0), (640, 0), (1280, 1280), (640, 320)], ids=str)
def test_norm(channels, side, dtype):
    """Sums with everything in them, written and not; one launch and two."""
    first, second = channels
    whole = first + second

    def image(width):
        values = (torch.randn(2, width, side, side, device="cuda") + 8).to(dtype)
        return values.to(memory_format=torch.channels_last)

    x, residual, other = image(first), image(first), image(second) if second else None
    weight, bias = (torch.randn(whole, device="cuda").to(dtype) for _ in range(2))
    shift, extra = torch.randn(2, whole, device="cuda").to(dtype), torch.randn(first, device="cuda").to(dtype)
    for given in ({}, {"shift": shift, "residual": residual}, {"residual": residual, "extra": extra, "keep": True}):
        given = given | {"other": other}
        y, total = norms.group_norm(x, weight, bias, 32, 1e-5, **given)
        expected, kept = bounds.group_norm(x, weight, bias, 32, 1e-5, run=512, **given)
        within(y, *expected)
        if total is not None:
            within(total, *kept)
        again, _ = norms.group_norm(x, weight, bias, 32, 1e-5, **given)
        assert torch.equal(y, again)


@DTYPES
@pytest.mark.parametrize("shape", [(8192, 320), (2048, 640), (512, 1280), (130, 1280)], ids=str)
def test_layer_norm_and_widened_rows(shape, dtype):
    rows, width = shape
    x = torch.randn(shape, device="cuda").to(dtype) + 3
    weight, bias, pre = (torch.randn(width, device="cuda").to(dtype) for _ in range(3))
    within(wide.layer_norm(x, weight, bias, 1e-5, pre=pre), *bounds.layer_norm(x, weight, bias, 1e-5, pre=pre, run=512))
    for columns in (16, 32, 96, 128):
        a = (torch.randn(2, columns, width, device="cuda") / width**0.5).to(dtype)
        for given in ({}, {"norm": (weight, bias, 1e-5), "pre": pre}, {"gate": True}):
            own = torch.randn(rows, 2 * width, device="cuda").to(dtype) if given.get("gate") else x
            within(wide.widen(own, a, **given), *bounds.widen(own, a, **given, u=CORE))


@DTYPES
@pytest.mark.parametrize("shape", [(2, 320, 64, 64), (2, 1280, 8, 8)], ids=str)
def test_widened_group_norm(shape, dtype):
    """The norm's own bits among columns of S."""
    x, residual = (torch.randn(shape, device="cuda").to(dtype, memory_format=torch.channels_last) for _ in range(2))
    weight, bias = (torch.randn(shape[1], device="cuda").to(dtype) for _ in range(2))
    a = (torch.randn(2, 32, shape[1], device="cuda") / shape[1] ** 0.5).to(dtype)
    rows, total = wide.widen_norm(x, a, weight, bias, 32, 1e-6, residual=residual, keep=True)
    y, kept = norms.group_norm(x, weight, bias, 32, 1e-6, silu=False, residual=residual, keep=True)
    assert torch.equal(total, kept)
    value = y.permute(0, 2, 3, 1).flatten(0, 2)
    assert torch.equal(rows[:, : shape[1]], value)
    within(rows, *bounds.widen(value, a, u=CORE))


@DTYPES
def test_sum_of_images(dtype):
    x, residual = (
        torch.randn(2, 640, 32, 32, device="cuda").to(dtype).to(memory_format=torch.channels_last) for _ in range(2)
    )
    shift = torch.randn(640, device="cuda").to(dtype)
    for scale in (1, 2):
        within(sums.image_sum(x, residual, shift, scale=scale), *bounds.image_sum(x, residual, shift, scale=scale))


@DTYPES
def test_geglu(dtype):
    h = torch.randn(4096, 2560, device="cuda").to(dtype) * 3
    within(gated.geglu(h), *bounds.geglu(h))


@DTYPES
@pytest.mark.parametrize("rank", [4, 32, 64, 128])
@pytest.mark.parametrize("shape", [(8192, 320, 2560), (2048, 1280, 10240), (130, 656, 2016)], ids=str)
def test_geglu_in_the_epilogue(shape, rank, dtype):
    given = layer(*shape, rank, dtype, adapters=2)
    extra = {"bias": torch.randn(shape[2], device="cuda").to(dtype)}
    for block in tiles.block_rows(arch()):
        for table in (None, block_table([1, -1], shape[0] // 2, block).cuda()):
            expected = bounds.lowrank_geglu(**given, **extra, table=table, u=CORE)
            for parts in (1, 2):
                tile = tiles.expand_tile(arch(), block)
                found = gated.lowrank_geglu(**given, **extra, table=table, tile=tile, parts=parts)
                within(found, *expected)
    alone = gated.lowrank_geglu(**{**given, "ranks": torch.zeros_like(given["ranks"])}, **extra, tile=tile)
    assert torch.equal(found[shape[0] // 2 :], alone[shape[0] // 2 :])  # the half on adapter −1
    within(ops.lowrank_geglu(**given, **extra), *bounds.lowrank_geglu(**given, **extra, u=CORE))


def test_one_graph_replays_every_step():
    """Coefficients and step live on the device: a graph captured once gives what six different calls give."""
    images, steps, size, num_x = 2, 6, 4 * 64 * 64, 2
    given = [
        torch.randn(images * 2, size).half(), torch.randn(images, steps, 2), torch.randn(images, steps, 5) / 3,
        torch.rand(images, steps + 1), torch.zeros(images, dtype=torch.int32), torch.randn(images, 4, size),
        torch.randn(images, size), torch.zeros(images, size).half(), torch.tensor([1, 0], dtype=torch.int32),
        torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
    ]  # fmt: skip
    device = [tensor.cuda() for tensor in given]
    start = [tensor.clone() for tensor in device]
    ops.guide_update(*device, num_x=num_x)  # compiles
    for tensor, value in zip(device, start, strict=True):
        tensor.copy_(value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.guide_update(*device, num_x=num_x)
    for tensor, value in zip(device, start, strict=True):
        tensor.copy_(value)
    for _ in range(steps):
        graph.replay()
        given[5], given[7] = reference.guide_update(*given[:7], *given[8:], num_x)
        given[4] += 1
    assert device[4].tolist() == [steps, steps]
    assert torch.allclose(device[5].cpu(), given[5], rtol=1e-4, atol=1e-4)


def test_strengths_recompile_nothing(monkeypatch):
    given = layer(2048, 640, 640, 16, torch.float16)
    tile = tiles.onepass_tile(arch(), 16, 64)
    lowrank.onepass(**given, tile=tile)
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **kw: compiled.append(kw))
    results = []
    for strength in (1.0, 0.5, 1.0):
        given["scale"].fill_(strength)
        results.append(lowrank.onepass(**given, tile=tile))
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])
    assert not compiled
