"""Noise against torch's own CPU generator."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepforge.runtime.engine.noise import Generator
from stepforge.runtime.errors import RequestError

# four units in the last place of the largest |z| that 24-bit uniforms give, 5.77: torch's vectorised log, sin and cos
TOLERANCE = 2e-6

SEEDS = {"zero": 0, "one": 1, "2^32-1": 2**32 - 1, "2^32+5": 2**32 + 5, "2^63-1": 2**63 - 1, "2^64-1": 2**64 - 1}
SHAPES = {
    "empty": (0, 4),
    "scalar": (),
    "one": (1,),
    "below a block": (3, 5),
    "one block": (16,),
    "one more": (17,),
    "two blocks less one": (31,),
    "odd": (1, 3, 7, 5),
    "demo latent": (1, 4, 16, 16),
    "SD latent": (1, 4, 64, 64),
    "65,536": (65_536,),
}


def assert_equals_torch(seed, shapes):
    ours, theirs = Generator(seed), torch.Generator("cpu").manual_seed(seed)
    for shape in shapes:
        values = ours.normal(shape)
        expected = torch.randn(shape, generator=theirs, dtype=torch.float32).numpy()
        assert values.shape == expected.shape
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_first_call_equals_torch(shape, seed):
    assert_equals_torch(seed, [shape])


CALLS = {
    "an odd number of scalars, then scalars": [(3,), (1,), (4,)],
    "a spare normal survives a block call": [(1,), (16,), (1,), (1,)],
    "after a redrawn tail": [(17,), (5,), (33,), (16,)],
    "a denoising loop": [(1, 4, 16, 16)] * 20,
}


@pytest.mark.parametrize("shapes", CALLS.values(), ids=CALLS)
def test_state_carries_over(shapes):
    assert_equals_torch(42, shapes)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 100).map(lambda n: (n,)), max_size=8))
def test_any_calls_equal_torch(seed, shapes):
    assert_equals_torch(seed, shapes)


def test_values_are_bounded():
    """24-bit uniforms give radii of at most sqrt(−2 ln 2^−24)."""
    values = Generator(7).normal((1 << 20,))
    assert np.isfinite(values).all()
    assert np.abs(values).max() <= math.sqrt(48 * math.log(2)) + TOLERANCE


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "1", None, True])
def test_other_seeds_are_refused(seed):
    with pytest.raises(RequestError, match="from 0 to 18446744073709551615"):
        Generator(seed)
