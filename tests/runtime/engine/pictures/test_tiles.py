"""Tiling against the whole: the identity, weights that add up to 1, diffusers' own tiles."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepforge.runtime.engine.pictures.tiles import Ratio, Tile, as_diffusers, even, starts, weights


def grown(x, ratio):
    """Positions of x, each `up` times; or the first of each `down`."""
    return x.repeat(ratio.up, 1).repeat(ratio.up, 2)[:, :: ratio.down, :: ratio.down]


@given(st.data())
def test_tiling_the_identity_is_the_identity(data):
    ratio = data.draw(st.sampled_from([Ratio(), Ratio(up=4), Ratio(down=8), Ratio(up=8)]))
    multiple = ratio.down * data.draw(st.integers(1, 3))
    height, width = (multiple * data.draw(st.integers(1, 40)) for _ in "hw")
    tile = Tile(*(multiple * data.draw(st.integers(1, 20)) for _ in "hw"), 0)
    tile = Tile(tile.height, tile.width, data.draw(st.integers(0, min(tile.height, tile.width) - 1)))
    x = np.random.default_rng(0).standard_normal((2, height, width)).astype(np.float32)
    seen = []

    def run(part):
        seen.append(part.shape)
        return grown(part, ratio)

    np.testing.assert_allclose(even(run, x, tile, ratio, multiple), grown(x, ratio), rtol=0, atol=2e-6)
    assert set(seen) == {(2, min(tile.height, height), min(tile.width, width))}  # one size: one compiled shape


@given(st.integers(1, 400), st.integers(1, 100), st.integers(0, 99), st.integers(1, 8))
def test_tiles_cover_an_axis_and_overlap_as_asked(units, tile, overlap, multiple):
    length, tile, overlap = units * multiple, tile * multiple, min(overlap, tile - 1) * multiple
    begins = starts(length, tile, overlap, multiple)
    assert begins[0] == 0
    assert all(begin % multiple == 0 for begin in begins)
    assert begins[-1] + tile == length or len(begins) == 1
    assert all(b - a <= tile - overlap for a, b in itertools.pairwise(begins))
    total = np.zeros(length)
    for begin, weight in zip(begins, weights(length, tile, begins), strict=True):
        assert (weight >= 0).all()
        total[begin : begin + len(weight)] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_edges_of_tiles_count_for_nothing():
    """A network that is wrong in the outer quarter of an overlap is not seen to be."""

    def run(part):
        part = part.copy()
        part[:, :, 16 - 2 :] = 100 if part[0, 0, 0] == 0 else part[:, :, 14:]
        return part

    x = np.broadcast_to(np.arange(24, dtype=np.float32), (1, 16, 24))
    np.testing.assert_array_equal(even(run, x, Tile(16, 16, 8), Ratio()), x)


@pytest.fixture(scope="module")
def vae():
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    found = AutoencoderKL(
        block_out_channels=(8, 16, 16), layers_per_block=1, latent_channels=4, sample_size=64, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    return found.eval().requires_grad_(False)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 40), (25, 13), (37, 33)])
def test_diffusers_tiles_are_diffusers(vae, height, width):
    """(25, ...): tiles of 16, 13 and 1 rows of latents. Tolerance: float32 sums of two blends in another order."""
    import torch

    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, height, width, generator=generator)
    pixels = torch.rand(1, 3, 4 * height, 4 * width, generator=generator)
    calls = []

    def decoder(z):
        calls.append(z.shape)
        return vae.decoder(vae.post_quant_conv(torch.from_numpy(z[None])))[0].numpy()

    def encoder(x):
        return vae.quant_conv(vae.encoder(torch.from_numpy(x[None])))[0].numpy()

    vae.enable_tiling()
    decoded, moments = vae.decode(latents).sample[0], vae._encode(pixels)[0]
    vae.disable_tiling()
    found = as_diffusers(decoder, latents[0].numpy(), 16, Ratio(up=4))
    np.testing.assert_allclose(found, decoded.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        as_diffusers(encoder, pixels[0].numpy(), 64, Ratio(down=4)), moments.numpy(), rtol=0, atol=1e-6
    )
    assert len(calls) > 1 or max(height, width) <= 16
