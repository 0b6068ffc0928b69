"""Gaussian noise that equals torch's CPU generator, without torch.

torch draws float32 normals in two ways (ATen/native/cpu/DistributionTemplates.h, ATen/core/DistributionsHelper.h):
sixteen or more values come from 24-bit uniforms in blocks of 16; fewer come one at a time from 53-bit uniforms, and the
second value of each such pair is kept for the next call. Both read one MT19937 stream, as NumPy's RandomState does.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from stepforge.runtime.errors import RequestError

MAX_SEED = 2**64 - 1
BLOCK = 16  # values that torch's vectorised Box-Muller makes at once


class Generator:
    """The stream of `torch.Generator("cpu").manual_seed(seed)`; the CPU uses seed mod 2^32, as torch does.

    Values are within 2e-6 of torch's, not bit-equal: torch's vectorised log, sin and cos differ from NumPy's by a few
    units in the last place. Not thread-safe: one generator belongs to one image.
    """

    def __init__(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
            raise RequestError(f"seed is {seed!r}; it must be a whole number from 0 to {MAX_SEED}")
        self._mt19937 = np.random.RandomState(seed & 0xFFFFFFFF)
        self._spare: float | None = None  # second value of the last scalar pair

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The next `torch.randn(shape, generator=..., dtype=torch.float32)`."""
        size = math.prod(shape)
        if size >= BLOCK:
            return self._blocks(size).reshape(shape)
        return np.array([self._scalar() for _ in range(size)], np.float32).reshape(shape)

    def _bits(self, size: int) -> NDArray[np.uint32]:
        return self._mt19937.randint(0, 2**32, size=size, dtype=np.uint32)

    def _blocks(self, size: int) -> NDArray[np.float32]:
        bits = self._bits(size)
        whole = size - size % BLOCK
        values = np.empty(size, np.float32)
        values[:whole] = _box_muller(bits[:whole])
        if size % BLOCK:  # torch redraws the last 16 values from fresh bits
            values[-BLOCK:] = _box_muller(self._bits(BLOCK))
        return values

    def _scalar(self) -> float:
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        theta = 2.0 * math.pi * self._uniform()
        radius = math.sqrt(-2.0 * math.log1p(-self._uniform()))
        self._spare = radius * math.sin(theta)
        return radius * math.cos(theta)

    def _uniform(self) -> float:
        """53 bits of a 64-bit draw, in [0, 1). The first 32-bit word is the high one."""
        high, low = (int(word) for word in self._bits(2))
        return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53


def _box_muller(bits: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Normals from uniform bits, [16·n] to [16·n]: in each block the first 8 give radii, the last 8 angles.

    float32 throughout: torch computes so, and float64 agrees with it less often (34 % bit-equal against 86 %).
    """
    uniform = (bits & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)
    first, second = np.moveaxis(uniform.reshape(-1, 2, BLOCK // 2), 1, 0)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - first))
    theta = np.float32(2.0 * math.pi) * second
    return np.stack((radius * np.cos(theta), radius * np.sin(theta)), axis=1).reshape(-1)
