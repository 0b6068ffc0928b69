"""The engine: continuous batching of requests that each run their own plan."""

from stepforge.runtime.engine.engine import MAX_PIXELS, MAX_ROWS, QUEUE_LIMIT, Engine
from stepforge.runtime.engine.jobs.intake import Outcome
from stepforge.runtime.engine.jobs.statistics import EngineStats

__all__ = ["MAX_PIXELS", "MAX_ROWS", "QUEUE_LIMIT", "Engine", "EngineStats", "Outcome"]
