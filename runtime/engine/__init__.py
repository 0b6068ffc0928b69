"""The engine: continuous batching of requests that each run their own plan."""

from stepforge.runtime.engine.engine import MAX_PIXELS, MAX_ROWS, QUEUE_LIMIT, Engine, Outcome

__all__ = ["MAX_PIXELS", "MAX_ROWS", "QUEUE_LIMIT", "Engine", "Outcome"]
