"""What a forked child does with the engines of its parent: nothing, not even to destroy them."""

from __future__ import annotations

import ctypes
import os
import weakref

_INHERITED: weakref.WeakSet[object] = weakref.WeakSet()


def keep_in_children(engine: object) -> None:
    """An engine whose networks are never destroyed in a forked child: a session of ONNX Runtime would wait there for its
    threads, which only the parent has."""
    _INHERITED.add(engine)


def _keep() -> None:
    for engine in list(_INHERITED):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_keep)
