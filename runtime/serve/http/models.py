"""The models of a server: engines by name, loaded while it already answers health checks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stepforge.runtime.checks import shown
from stepforge.runtime.engine import Engine
from stepforge.runtime.serve.http.errors import ApiError, unavailable

log = logging.getLogger(__name__)

OWNER = "stepforge"


@dataclass(slots=True)
class Model:
    """One bundle's engine. loader: opens it, on a thread."""

    name: str
    loader: Callable[[], Engine]
    engine: Engine | None = None
    created: int = 0
    load_seconds: float = 0.0

    def card(self) -> dict[str, Any]:
        """An entry of `/v1/models`, with what a page needs to know of the model under one key more."""
        entry: dict[str, Any] = {"id": self.name, "object": "model", "created": self.created, "owned_by": OWNER}
        if self.engine is None:
            return entry
        bundle = self.engine.bundle
        entry["stepforge"] = {
            "family": bundle.card.family,
            "width": bundle.card.width,
            "height": bundle.card.height,
            "size_multiple": bundle.card.size_multiple,
            "controls": list(bundle.controls),
            "upscalers": list(bundle.stages),
            "presets": list(bundle.presets),
            "adapters": list(self.engine.adapters.list()),
            "adapter_rank": self.engine.adapters.rank,
            "digest": bundle.digest,
        }
        return entry


@dataclass(slots=True)
class Models:
    """By name. aliases: further names. phase: "starting", "ready" or "draining"."""

    models: Mapping[str, Model]
    aliases: Mapping[str, str]
    phase: str = "starting"
    failure: BaseException | None = None  # why no engine could be loaded

    async def load(self) -> None:
        """Open all engines, one after the other. Raises what the first that fails does."""
        for model in self.models.values():
            started = time.perf_counter()
            engine = await asyncio.to_thread(model.loader)
            if self.phase == "draining":  # the end came first
                await asyncio.to_thread(engine.close)
                return
            model.engine = engine
            model.created, model.load_seconds = int(time.time()), time.perf_counter() - started
            log.info("model loaded", extra={"facts": {"model": model.name, "seconds": round(model.load_seconds, 3)}})
        if self.phase == "starting":
            self.phase = "ready"

    @property
    def state(self) -> str:
        """The phase, or "failed" where an engine has ended by itself: only a new process mends that."""
        ended = self.phase == "ready" and any(engine.is_closed for engine in self.engines())
        return "failed" if ended else self.phase

    def check_open(self) -> None:
        """Raises ApiError while no new work is taken."""
        if (state := self.state) != "ready":
            raise unavailable(state)

    def find(self, name: str | None) -> tuple[Model, Engine]:
        """`named`, for calls that no door has let in yet. Raises ApiError while no new work is taken."""
        self.check_open()
        return self.named(name)

    def named(self, name: str | None) -> tuple[Model, Engine]:
        """A model that has been loaded; without a name the first. Raises ApiError."""
        chosen = next(iter(self.models)) if name is None else self.aliases.get(name, name)
        model = self.models.get(chosen)
        if model is None or model.engine is None:
            known = ", ".join((*self.models, *self.aliases))
            raise ApiError(404, f"there is no model {shown(name)}; there is {known}", "model_not_found", param="model")
        return model, model.engine

    def engines(self) -> list[Engine]:
        return [model.engine for model in self.models.values() if model.engine is not None]
