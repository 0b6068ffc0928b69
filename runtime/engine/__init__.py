"""The engine: continuous batching of requests that each run their own plan."""

from stepforge.runtime.engine.engine import MAX_ROWS, Engine

__all__ = ["MAX_ROWS", "Engine"]
