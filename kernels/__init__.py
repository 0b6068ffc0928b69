"""Device code: Triton kernels, their references, and which of them runs where.

Importing this package needs neither torch nor triton; its names load when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

HOMES = {
    "geglu": "ops",
    "group_norm": "ops",
    "guide_update": "ops",
    "lowrank_conv": "ops",
    "lowrank_geglu": "ops",
    "image_sum": "ops",
    "layer_norm": "ops",
    "lowrank_linear": "ops",
    "widen": "ops",
    "block_table": "packing",
    "pack": "packing",
    "Pair": "packing",
    "explain": "dispatch.choose",
}

__all__ = sorted(HOMES, key=lambda name: (name[0].islower(), name))


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"stepforge.kernels has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"stepforge.kernels.{HOMES[name]}"), name)
