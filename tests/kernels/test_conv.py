"""Adapters of convolutions against fp64, every element within its bound."""

from __future__ import annotations

import pytest
import torch

from stepforge.kernels import bounds, conv, ops, reference
from stepforge.kernels.dispatch.tiles import Tile, padded_rank
from stepforge.kernels.packing import Pair, block_table, pack

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
TILE = Tile(32, 32, 32, warps=4, stages=2)


def layer(size, channels, width, rank, *, dtype=HALF, side=3, stride=1, pad=1, adapters=1, images=2):
    height, wide = size
    r = padded_rank(rank)
    out = [(s + 2 * pad - side) // stride + 1 for s in size]
    a = torch.randn(adapters, r, side, side, channels) / (channels**0.5 * side)
    b = torch.randn(adapters, width, r)
    a[:, rank:] = torch.nan
    b[..., rank:] = torch.nan
    return {
        "y": torch.randn(images, *out, width).to(dtype),
        "x": torch.randn(images, height, wide, channels).to(dtype),
        "a": a.to(dtype),
        "b": b.to(dtype),
        "scale": torch.rand(adapters, 1, r // 16) + 0.5,
        "ranks": torch.full((adapters,), rank, dtype=torch.int32),
        "stride": stride,
        "pad": pad,
    }


CASES = {  # size, channels, width, rank, side, stride, pad
    "square": ((6, 6), 16, 32, 8, 3, 1, 1),
    "odd sizes": ((5, 7), 20, 31, 4, 3, 1, 1),
    "stride 2, as downsamplers": ((8, 6), 16, 16, 16, 3, 2, 1),
    "more channels than a block": ((3, 3), 72, 24, 32, 3, 1, 1),
    "4 channels": ((4, 9), 4, 40, 3, 3, 1, 1),
    "1x1": ((5, 5), 24, 24, 8, 1, 1, 0),
    "one pixel": ((1, 1), 16, 16, 8, 3, 1, 1),
}


def check(given, table=None):
    result = conv.lowrank_conv(**given, tile=TILE, table=table)
    exact, bound = bounds.lowrank_conv(**given, table=table)
    assert result.dtype == given["y"].dtype
    assert bounds.excess(result, exact, bound) <= 1.0


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_within_the_bound(case, dtype):
    size, channels, width, rank, side, stride, pad = CASES[case]
    check(layer(size, channels, width, rank, dtype=dtype, side=side, stride=stride, pad=pad))


def test_images_on_different_adapters():
    given = layer((5, 6), 16, 24, 8, adapters=2, images=3)
    table = block_table([1, -1, 0], 30, TILE.block_m)
    check(given, table)
    result = conv.lowrank_conv(**given, tile=TILE, table=table)
    assert torch.equal(result[1], given["y"][1])  # to the bit


def test_reference_is_two_convolutions():
    """PEFT's form: a k×k convolution to r channels, a 1×1 convolution, times the strength, added."""
    down, up = torch.randn(4, 6, 3, 3), torch.randn(10, 4)
    packed = pack([[[Pair(down, up, 0.75)]]])
    x, y = torch.randn(2, 6, 5, 5), torch.randn(2, 10, 5, 5)
    low = torch.nn.functional.conv2d(x, down, padding=1)
    expected = y + 0.75 * torch.nn.functional.conv2d(low, up[..., None, None])
    found = ops.lowrank_conv(y, x, packed.a, packed.b, packed.scale, packed.ranks)
    assert (found - expected).abs().max() < 1e-4
    assert found.shape == y.shape
    channels_last = reference.lowrank_conv(
        y.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1), packed.a, packed.b, packed.scale, packed.ranks
    )
    assert torch.equal(channels_last.permute(0, 3, 1, 2), found)


def test_sizes_that_do_not_fit_are_refused():
    given = layer((6, 6), 16, 32, 8)
    given["pad"] = 0
    with pytest.raises(ValueError, match="is not 6x6"):
        conv.lowrank_conv(**given, tile=TILE)
