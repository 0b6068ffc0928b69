"""Device code: Triton kernels, their references, and which of them runs where.

Importing this package needs neither torch nor triton; its names load when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

HOMES = {
    "geglu": "ops",
    "group_norm_silu": "ops",
    "guide_update": "ops",
    "lowrank_conv": "ops",
    "lowrank_geglu": "ops",
    "lowrank_linear": "ops",
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
