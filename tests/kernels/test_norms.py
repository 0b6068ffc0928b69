"""Group normalisation of sums, and LayerNorm, against fp64: every element within its bound."""

from __future__ import annotations

import functools

import pytest
import torch

from stepforge.kernels import bounds, gated, norms, reference, sums, wide

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
LAST = torch.channels_last
CASES = {  # shape of x, channels of a second source, groups
    "10 channels a group": ((1, 80, 6, 6), 0, 8),
    "two sources, odd sides": ((2, 12, 7, 5), 6, 3),
    "group = channel": ((2, 8, 4, 4), 0, 8),
    "one pixel": ((3, 16, 1, 1), 0, 4),
}
WAYS = pytest.mark.parametrize("whole", [0, 1 << 20], ids=["two launches", "one"])


def given(shape, second, dtype):
    batch, first, height, width = shape
    image = {
        "x": torch.randn(shape) * 2 + 0.5,
        "other": torch.randn(batch, second, height, width) if second else None,
        "residual": torch.randn(shape),
    }
    values = {name: None if v is None else v.to(dtype).to(memory_format=LAST) for name, v in image.items()}
    channels = first + second
    values |= {"weight": torch.randn(channels).to(dtype), "bias": torch.randn(channels).to(dtype)}
    return values | {"shift": torch.randn(batch, channels).to(dtype), "extra": torch.randn(first).to(dtype)}


def check(values, groups, whole, **options):
    first = [values[name] for name in ("x", "weight", "bias")]
    sources = {name: values[name] for name in ("other", "residual", "shift", "extra") if name in values}
    y, total = norms.group_norm(*first, groups, 1e-5, **sources, whole=whole, block=256, splits=2, **options)
    expected, kept = bounds.group_norm(*first, groups, 1e-5, **sources, **options)
    assert bounds.excess(y, *expected) <= 1.0
    assert y.is_contiguous(memory_format=LAST)
    assert total is None or bounds.excess(total, *kept) <= 1.0
    return y


@WAYS
@pytest.mark.parametrize(
    "dtype", [HALF, BRAIN, pytest.param(FULL, marks=[pytest.mark.slow, pytest.mark.long])], ids=str
)
@pytest.mark.parametrize("case", CASES)
def test_sums_within_the_bound(case, dtype, whole):
    shape, second, groups = CASES[case]
    values = given(shape, second, dtype)
    check(values, groups, whole, keep=True)
    check({**values, "extra": None, "shift": values["shift"][:1], "residual": None}, groups, whole, silu=False)


@WAYS
@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_large_mean(mean, whole):
    """Standard deviation 1 on a mean of 1000: E[x²] − E[x]² in fp32 would have an error as large as the variance."""
    x = (torch.randn(2, 24, 13, 9) + mean).to(memory_format=LAST)
    weight, bias = torch.randn(24), torch.randn(24)
    result, _ = norms.group_norm(x, weight, bias, 4, 1e-5, block=256, silu=False, whole=whole)
    exact, _ = reference.group_norm(x.double(), weight.double(), bias.double(), 4, 1e-5, silu=False)
    # the mean itself has an error of half a unit of its last place or so, times |weight| ≤ 4 or so
    assert (result - exact).abs().max() < 16 * abs(mean) * 2.0**-24 + 1e-5


@WAYS
def test_images_do_not_meet(whole):
    """A batch gives the bits of its images alone, NaN in one stays there, and runs repeat."""
    values = given((3, 20, 6, 5), 0, HALF)
    values["x"][2] = torch.nan
    weight, bias = values["weight"], values["bias"]
    together, _ = norms.group_norm(values["x"], weight, bias, 4, 1e-5, block=128, splits=2, whole=whole)
    for image in (0, 1):
        alone = values["x"][image : image + 1].contiguous(memory_format=LAST)
        result, _ = norms.group_norm(alone, weight, bias, 4, 1e-5, block=128, splits=2, whole=whole)
        assert torch.equal(result[0], together[image])
    assert together[2].isnan().all()


def test_pixels_may_lie_apart():
    """Widened convolutions hand on the first channels of more."""
    store = torch.randn(2, 5, 6, 40).half()
    store[..., 24:] = torch.nan
    x = store[..., :24].permute(0, 3, 1, 2)
    weight, bias = torch.randn(24).half(), torch.randn(24).half()
    dense, _ = norms.group_norm(x.contiguous(memory_format=LAST), weight, bias, 4, 1e-5, block=256, whole=0)
    assert torch.equal(norms.group_norm(x, weight, bias, 4, 1e-5, block=256, whole=0)[0], dense)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL], ids=str)
def test_layer_norm(dtype):
    x = torch.randn(33, 150).to(dtype) + 3
    weight, bias, pre = (torch.randn(150).to(dtype) for _ in range(3))
    for added in (None, pre):
        result = wide.layer_norm(x, weight, bias, 1e-5, pre=added)
        assert bounds.excess(result, *bounds.layer_norm(x, weight, bias, 1e-5, pre=added, run=512)) <= 1.0


@pytest.mark.parametrize("dtype", [HALF, FULL], ids=str)
def test_widened_rows(dtype):
    """Columns of S behind each row, made in place; the A of each image is its own."""
    weight, bias, pre = (torch.randn(150).to(dtype) for _ in range(3))
    a = (torch.randn(3, 24, 150) / 12).to(dtype)
    for options in ({}, {"pre": pre}, {"norm": (weight, bias, 1e-5), "pre": pre}, {"gate": True}):
        x = torch.randn(42, 300 if options.get("gate") else 150).to(dtype)
        assert bounds.excess(wide.widen(x, a, **options), *bounds.widen(x, a, **options)) <= 1.0


@pytest.mark.parametrize("whole", [0, 1 << 14], ids=["parts", "whole"])
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_widened_group_norm(dtype, whole, monkeypatch):
    """The norm's own bits and sum, written among columns of S, which are the widened rows'."""
    monkeypatch.setattr(wide.norms, "group_norm", functools.partial(norms.group_norm, block=256, whole=whole))
    x, residual = (torch.randn(2, 24, 5, 6).to(dtype).to(memory_format=LAST) for _ in range(2))
    weight, bias = torch.randn(24).to(dtype), torch.randn(24).to(dtype)
    a = (torch.randn(2, 16, 24) / 5).to(dtype)
    rows, total = wide.widen_norm(x, a, weight, bias, 4, 1e-5, residual=residual, keep=True)
    y, kept = wide.norms.group_norm(x, weight, bias, 4, 1e-5, silu=False, residual=residual, keep=True)
    assert torch.equal(total, kept)
    assert torch.equal(rows, wide.widen(y.permute(0, 2, 3, 1).flatten(0, 2), a))
    exact, bound = bounds.widen(y.permute(0, 2, 3, 1).flatten(0, 2), a)
    assert bounds.excess(rows, exact, bound) <= 1.0


def test_geglu_writes_rows_that_lie_apart():
    h, store = torch.randn(9, 80).half(), torch.full((9, 64), 7.0).half()
    gated.geglu(h, out=store[:, :40])
    assert torch.equal(store[:, :40], gated.geglu(h))
    assert (store[:, 40:] == 7).all()


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_sum_of_images(dtype):
    x, residual = (torch.randn(2, 24, 5, 7).to(dtype).to(memory_format=LAST) for _ in range(2))
    shift = torch.randn(24).to(dtype)
    for scale in (1, 2):
        result = sums.image_sum(x, residual, shift, scale=scale)
        assert bounds.excess(result, *bounds.image_sum(x, residual, shift, scale=scale)) <= 1.0


def test_constant_input():
    """Variance 0: the bias alone."""
    x = torch.full((1, 8, 5, 5), 3.0).to(memory_format=LAST)
    result, _ = norms.group_norm(x, torch.ones(8), torch.arange(8.0), 2, 1e-5, silu=False, block=16, whole=0)
    assert torch.equal(result, torch.arange(8.0)[None, :, None, None].expand_as(x))


def test_refusals():
    x, weight = torch.randn(1, 8, 4, 4).to(memory_format=LAST), torch.ones(8)
    with pytest.raises(ValueError, match="3 groups"):
        norms.group_norm(x, weight, weight, 3, 1e-5)
    with pytest.raises(ValueError, match="keep asks for"):
        norms.group_norm(x, weight, weight, 2, 1e-5, extra=weight)
    with pytest.raises(ValueError, match="channels last"):
        norms.group_norm(x.contiguous(), weight, weight, 2, 1e-5)
    with pytest.raises(ValueError, match="exclude each other"):
        wide.widen(torch.randn(4, 8), torch.randn(1, 2, 8), norm=(weight, weight, 1e-5), gate=True)
