"""What the first step of an image is given."""

from __future__ import annotations

from stepforge.runtime.engine.noise import Generator
from stepforge.runtime.engine.state import Leg
from stepforge.runtime.engine.trajectory import Start


def from_noise(leg: Leg, shape: tuple[int, int, int], seed: int) -> Start:
    """Text to image: noise at the plan's first level. shape: of the latents, [C, h, w]."""
    generator = Generator(seed)
    return Start(leg.plan.init_noise * generator.normal(shape), generator)
