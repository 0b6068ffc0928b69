"""OpenAI's image API on Ray Serve: each replica is the server of `stepforge serve` with an engine of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepforge.runtime.backends import check_names
from stepforge.runtime.checks import shown, whole
from stepforge.runtime.errors import RequestError
from stepforge.runtime.files import printable
from stepforge.runtime.serve.http.settings import Settings

if TYPE_CHECKING:
    from stepforge.runtime.engine import Engine

TALK = 4  # calls of health, models and metrics beside those for images
PATIENCE = 10.0  # seconds that Serve adds to the drain before it kills a replica
KINDS = {"str": str, "int": int, "float": float}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a deployment is given; paths are the nodes'. Raises RequestError for values that make no sense, BackendError for
    backends and precisions of no such name."""

    bundle: str  # path, or "fake"
    name: str = ""  # of the model; empty: the bundle's
    keys: str = ""  # file of API keys; empty: everybody is let in
    adapters: str = ""  # folder from which clients may load adapters
    backend: str = "auto"
    precision: str = "auto"
    threads: int = 1  # of a replica, Ray's num_cpus
    gpus: float = 0.0  # of a replica, Ray's num_gpus
    max_rows: int = 8
    queue_limit: int = 16  # requests that wait in a replica's engine
    max_queued: int = 16  # requests that wait in each of Serve's proxies for a replica
    retry_after: int = 5  # seconds, told with a 429
    deadline: float = 600.0  # seconds for one request
    drain: float = 60.0  # seconds for what is under way when a replica goes
    replicas: int = 1
    most_replicas: int = 0  # autoscaling up to so many; 0: none

    def __post_init__(self) -> None:
        for name, low in (("threads", 1), ("max_rows", 2), ("queue_limit", 1), ("max_queued", 1), ("replicas", 1)):
            whole(name, getattr(self, name), low, 1 << 16)
        for name in ("bundle", "keys", "adapters"):
            path = getattr(self, name)
            if path not in ("", "fake") and not Path(path).is_absolute():
                raise RequestError(
                    f"{name} is {printable(path)}; replicas have folders of their own, give a whole path"
                )
        whole("retry_after", self.retry_after, 1, 120)
        check_names(self.backend, self.precision)
        if not 0 <= self.gpus < 1e6:
            raise RequestError(f"gpus is {self.gpus:g}; give a number from 0")
        self.settings()
        if self.most_replicas and self.most_replicas < self.replicas:
            raise RequestError(f"most_replicas is {self.most_replicas}, less than replicas, which is {self.replicas}")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """From a configuration's values, texts of a command line among them. Raises RequestError."""
        known = {field.name: KINDS[str(field.type)] for field in fields(cls)}
        if unknown := [name for name in given if name not in known]:
            raise RequestError(f"a deployment has no {shown(unknown[0])}; it has {', '.join(known)}")
        if "bundle" not in given:
            raise RequestError("a deployment needs bundle=PATH")
        found: dict[str, Any] = {}
        for name, value in given.items():
            try:
                found[name] = known[name](value)
            except (TypeError, ValueError):
                raise RequestError(f"{name} is {shown(value)}; a number is needed") from None
        return cls(**found)

    def settings(self) -> Settings:
        """Of each replica's server. Raises RequestError."""
        return Settings(
            queue_limit=self.queue_limit, deadline=self.deadline, drain=self.drain, page=False,
            adapter_folder=Path(self.adapters) if self.adapters else None,
        )  # fmt: skip

    @property
    def ongoing(self) -> int:
        """Calls that a replica holds: as many as its engine runs and keeps waiting, so that Serve sends others elsewhere."""
        return self.queue_limit + self.max_rows // 2 + TALK


class Images:
    """One replica."""

    async def __init__(self, options: Options) -> None:  # type: ignore[misc]  # Serve awaits it
        from stepforge.runtime.load import open_bundle
        from stepforge.runtime.serve.http.keys import Keys
        from stepforge.runtime.serve.http.models import Model, Models
        from stepforge.runtime.serve.http.service import Service

        name = options.name or open_bundle(options.bundle, check=False).card.name
        keys = Keys(Path(options.keys)) if options.keys else None
        self._models = Models({name: Model(name, lambda: _opened(options))}, {})
        self._service = Service(self._models, options.settings(), keys)
        await self._models.load()

    def __serve_build_asgi_app__(self) -> Any:
        from stepforge.runtime.serve.http.app import create_app

        return create_app(self._service)

    def check_health(self) -> None:
        """Serve replaces a replica whose engine has failed as a whole."""
        if any(engine.is_closed for engine in self._models.engines()):
            raise RuntimeError("the engine is closed")

    def __del__(self) -> None:
        """Serve has waited for the calls under way."""
        for engine in self._models.engines():
            engine.close()


def app(args: Mapping[str, Any]) -> Any:
    """Builder of the application: `serve run stepforge.runtime.serve.ray:app bundle=/models/sd.bundle replicas=2`.

    args: fields of `Options`. Full queues answer 429 with Retry-After, Serve's own and the engine's alike.
    Raises RequestError.
    """
    from ray import serve
    from ray.serve.config import BackpressureConfig

    options = Options.of(args)
    scaling: dict[str, Any] = {"num_replicas": options.replicas}
    if options.most_replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": options.replicas,
                "max_replicas": options.most_replicas,
                "target_ongoing_requests": max(1, options.max_rows // 2),  # what one network call takes
            }
        }
    deployed = serve.deployment(
        name="stepforge",
        max_ongoing_requests=options.ongoing,
        max_queued_requests=options.max_queued,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=options.retry_after),
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=options.drain + PATIENCE,
        ray_actor_options={"num_cpus": options.threads, "num_gpus": options.gpus},
        **scaling,
    )
    return deployed(serve.ingress()(Images)).bind(options)


def _opened(options: Options) -> Engine:
    from stepforge.runtime.load import load

    return load(
        options.bundle, backend=options.backend, precision=options.precision, threads=options.threads,
        max_rows=options.max_rows, queue_limit=options.queue_limit,
    )  # fmt: skip
