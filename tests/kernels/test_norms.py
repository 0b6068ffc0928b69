"""Group normalisation against fp64, every element within its bound, in both memory formats."""

from __future__ import annotations

import pytest
import torch

from stepforge.kernels import bounds, norms, reference

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
formats = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
CASES = {  # shape, groups
    "10 channels a group": ((1, 80, 6, 6), 8),
    "odd spatial": ((2, 12, 7, 5), 3),
    "group = channel": ((2, 8, 4, 4), 8),
    "one group": ((1, 20, 9, 3), 1),
    "one pixel": ((3, 16, 1, 1), 4),
}


def inputs(shape, dtype, layout, *, scaled):
    x = (torch.randn(shape) * 2 + 0.5).to(dtype).to(memory_format=layout)
    extra = {name: torch.randn(shape[:2]).to(dtype) for name in ("scale", "shift")} if scaled else {}
    return x, torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype), extra


@formats
@pytest.mark.parametrize("scaled", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "scaled"])
@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_within_the_bound(case, dtype, scaled, layout):
    shape, groups = CASES[case]
    x, weight, bias, extra = inputs(shape, dtype, layout, scaled=scaled)
    result = norms.group_norm_silu(x, weight, bias, groups, 1e-5, **extra, block=256, splits=2)
    exact, bound = bounds.group_norm_silu(x, weight, bias, groups, 1e-5, **extra)
    assert result.dtype == dtype
    assert result.stride() == x.stride()
    assert bounds.excess(result, exact, bound) <= 1.0


@formats
@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_large_mean(mean, layout):
    """Standard deviation 1 on a mean of 1000: E[x²] − E[x]² in fp32 would have an error as large as the variance."""
    x = (torch.randn(2, 24, 13, 9) + mean).to(memory_format=layout)
    weight, bias = torch.randn(24), torch.randn(24)
    result = norms.group_norm_silu(x, weight, bias, 4, 1e-5, block=256, silu=False)
    exact = reference.group_norm_silu(x.double(), weight.double(), bias.double(), 4, 1e-5, silu=False)
    # the mean itself has an error of half a unit of its last place or so, times |weight| ≤ 4 or so
    assert (result - exact).abs().max() < 16 * abs(mean) * 2.0**-24 + 1e-5


@formats
def test_splits_give_the_same_statistics(layout):
    x, weight, bias, _ = inputs((2, 20, 11, 7), FULL, layout, scaled=False)
    exact, bound = bounds.group_norm_silu(x, weight, bias, 4, 1e-5)
    for splits in (1, 3, 14):
        result = norms.group_norm_silu(x, weight, bias, 4, 1e-5, block=256, splits=splits)
        assert bounds.excess(result, exact, bound) <= 1.0
        again = norms.group_norm_silu(x, weight, bias, 4, 1e-5, block=256, splits=splits)
        assert torch.equal(result, again)


@formats
def test_images_do_not_meet(layout):
    """A batch gives the bits of its images alone, and NaN in one stays there."""
    x, weight, bias, _ = inputs((3, 20, 6, 5), HALF, layout, scaled=False)
    x[2] = torch.nan
    together = norms.group_norm_silu(x, weight, bias, 4, 1e-5, block=128, splits=2)
    for image in (0, 1):
        alone = x[image : image + 1].contiguous(memory_format=layout)
        assert torch.equal(norms.group_norm_silu(alone, weight, bias, 4, 1e-5, block=128, splits=2)[0], together[image])
    assert together[2].isnan().all()


def test_constant_input():
    """Variance 0: the bias alone."""
    x = torch.full((1, 8, 5, 5), 3.0)
    result = norms.group_norm_silu(x, torch.ones(8), torch.arange(8.0), 2, 1e-5, silu=False, block=16)
    assert torch.equal(result, torch.arange(8.0)[None, :, None, None].expand_as(x))


def test_refusals():
    x, weight = torch.randn(1, 8, 4, 4), torch.ones(8)
    with pytest.raises(ValueError, match="3 groups"):
        norms.group_norm_silu(x, weight, weight, 3)
    with pytest.raises(ValueError, match="come together"):
        norms.group_norm_silu(x, weight, weight, 2, scale=torch.ones(1, 8))
    with pytest.raises(ValueError, match="contiguous"):
        norms.group_norm_silu(x[:, :, ::2], weight, weight, 2)
