"""Prometheus metrics of one server; labels have few values: never a prompt, a seed, a request id or an adapter's name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stepforge.runtime.request import Result

if TYPE_CHECKING:
    from stepforge.runtime.serve.http.service import Service

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
LAG_PERIOD = 1.0  # seconds between two looks at the event loop
OUTCOMES = {  # status -> outcome; others by their hundreds
    408: "disconnected", 429: "rejected", 499: "disconnected", 503: "rejected", 504: "deadline",
}  # fmt: skip


class Metrics:
    """What is counted while calls end; what the engines know is asked for at each scrape."""

    def __init__(self, service: Service) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_Engines(service))
        self.requests = Counter(
            "stepforge_requests", "HTTP calls that have ended", ("route", "outcome"), registry=registry
        )
        self.rejected = Counter("stepforge_rejected", "Calls that were refused", ("reason",), registry=registry)
        self.duration = Histogram(
            "stepforge_request_duration_seconds", "HTTP calls, first byte to last", ("route",), buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.images = Counter("stepforge_images", "Images that were sent", ("model",), registry=registry)
        self.queue = Histogram(
            "stepforge_queue_wait_seconds", "Requests from submission to start", ("model",), buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.step = Histogram(
            "stepforge_step_duration_seconds", "A request's share of a denoising step, mean of its steps",
            ("model", "stage"), buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.lag = Gauge("stepforge_event_loop_lag_seconds", "Lateness of a timer", registry=registry)

    def ended(self, route: str, status: int, seconds: float, code: str | None) -> None:
        """A call has ended. route: as declared, "none" for what is no route."""
        outcome = OUTCOMES.get(status) or {2: "ok", 3: "ok", 4: "invalid"}.get(status // 100, "failed")
        self.requests.labels(route, outcome).inc()
        self.duration.labels(route).observe(seconds)
        if code is not None and status in (401, 403, 408, 413, 415, 429, 503):
            self.rejected.labels(code).inc()

    def drawn(self, model: str, result: Result) -> None:
        self.images.labels(model).inc(len(result.images))
        seconds = result.stats.seconds
        if "queue" in seconds:
            self.queue.labels(model).observe(seconds["queue"])
        for stage, plan in (("", result.plan), *result.stages):
            spent = seconds.get(f"{stage}/denoise" if stage else "denoise", 0.0)
            if spent and plan.steps:
                self.step.labels(model, stage or "base").observe(spent / (len(plan.steps) * len(result.images)))

    def text(self) -> bytes:
        return generate_latest(self.registry)

    async def watch(self) -> None:
        """Measure how late the event loop is, for ever."""
        while True:
            before = time.perf_counter()
            await asyncio.sleep(LAG_PERIOD)
            self.lag.set(max(0.0, time.perf_counter() - before - LAG_PERIOD))


class _Engines(Collector):
    """Numbers of the engines and of the server, as they are at the scrape."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        service = self._service
        yield GaugeMetricFamily("stepforge_ready", "1 while requests are taken", float(service.models.state == "ready"))
        yield GaugeMetricFamily("stepforge_http_under_way", "Calls for images under way", float(service.under_way))
        yield GaugeMetricFamily(
            "stepforge_held_bytes", "Bodies and images of clients in memory", float(service.held.bytes)
        )
        label = ("model",)
        loads = GaugeMetricFamily("stepforge_engine_load_seconds", "Time that loading took", labels=label)
        adapters = GaugeMetricFamily("stepforge_adapters_loaded", "Adapters by name", labels=label)
        waiting = GaugeMetricFamily("stepforge_requests_waiting", "Requests in the queue", labels=label)
        running = GaugeMetricFamily(
            "stepforge_images_running", "Images between their first and last step", labels=label
        )
        calls = CounterMetricFamily("stepforge_network_calls", "Denoiser calls", labels=label)
        rows = CounterMetricFamily("stepforge_network_rows", "Rows of network calls", labels=("model", "network"))
        failures = CounterMetricFamily("stepforge_failures", "Requests that failed", labels=("model", "reason"))
        for model in service.models.models.values():
            if model.engine is None:
                continue
            loads.add_metric((model.name,), model.load_seconds)
            adapters.add_metric((model.name,), len(model.engine.adapters.list()))
            stats = model.engine.stats()
            waiting.add_metric((model.name,), stats.waiting)
            running.add_metric((model.name,), stats.running)
            calls.add_metric((model.name,), stats.calls)
            for network, count in stats.rows.items():
                rows.add_metric((model.name, network), count)
            for reason, count in stats.failures.items():
                failures.add_metric((model.name, reason), count)
        yield from (loads, adapters, waiting, running, calls, rows, failures)
