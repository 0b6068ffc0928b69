"""What an operator decides of a server: limits, times, who may call."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from stepforge.runtime.checks import real, shown, whole
from stepforge.runtime.errors import RequestError

DAY = 86_400.0  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Limits are checked before what they bound is allocated. Raises RequestError for values that make no sense."""

    max_body: int = 32 << 20  # bytes of one body
    max_memory: int = 1 << 30  # bytes of all bodies and finished images in memory together
    body_seconds: float = 120.0  # for a whole body to arrive
    stall_seconds: float = 30.0  # between two pieces of it
    max_prompt: int = 4000  # characters
    max_images: int = 10  # a request's `n`
    max_pixels: int = 1 << 22  # of one picture, behind all stages
    max_steps: int = 150  # of the base model and of each stage
    max_inputs: int = 8  # pictures in one body
    max_adapters: int = 64  # loaded in one engine
    queue_limit: int = 32  # waiting requests of one engine; one more is answered with 429
    deadline: float = 600.0  # seconds for one request, waiting included
    drain: float = 60.0  # for requests under way after SIGTERM
    grace: float = 0.0  # for which a draining server still answers new calls with 503, while nothing runs
    adapter_folder: Path | None = None  # where clients' adapters are looked for
    hosts: frozenset[str] | None = None  # names that a Host header may have; None: any
    page: bool = True  # the demo page at /
    log_prompts: bool = False
    aliases: dict[str, str] = field(default_factory=dict)  # further names of models

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_body", 1 << 10, 1 << 30),
            ("max_memory", self.max_body, 1 << 36),
            ("max_prompt", 1, 20_000),
            ("max_images", 1, 64),
            ("max_pixels", 64, 1 << 24),
            ("max_steps", 1, 1000),
            ("queue_limit", 1, 1 << 16),
        ):
            whole(name, getattr(self, name), low, high)
        for name in ("body_seconds", "stall_seconds", "deadline", "drain", "grace"):
            seconds = real(getattr(self, name))
            if seconds is None or not 0 <= seconds <= DAY:
                raise RequestError(f"{name} is {shown(getattr(self, name))}; give seconds, at most a day's")
        if not self.deadline:
            raise RequestError("deadline is 0; no request could be drawn")
