"""What a step's own plans (export/engines/step.py) and the loop that runs them agree on."""

from __future__ import annotations

import hashlib

NUM_X, NUM_P = 3, 5  # latents and predictions of an image's state: the longest windows of all samplers
NAMES = ("select", "look", "spread", "update")
VERSION = 1  # changed with the graphs


def digest(name: str) -> str:
    """In place of a component's hash."""
    return hashlib.sha256(f"stepforge step {name} {VERSION}".encode()).hexdigest()
