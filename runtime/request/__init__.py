"""What callers give to the engine and get from it: values only."""

from stepforge.runtime.request.control import Control
from stepforge.runtime.request.init import Init
from stepforge.runtime.request.micro import Micro
from stepforge.runtime.request.request import Request, canonical
from stepforge.runtime.request.result import Progress, Result, Stats
from stepforge.runtime.request.upscale import MAX_SEED, Upscale

__all__ = ["MAX_SEED", "Control", "Init", "Micro", "Progress", "Request", "Result", "Stats", "Upscale", "canonical"]
