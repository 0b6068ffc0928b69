"""A Celery worker: `BUNDLE=out/emoji.bundle celery -A celery_worker worker --pool prefork --concurrency 1`.

Celery forks its workers. The engine's threads do not live on in a child, so each child loads an engine of its own: an engine
that was loaded at import, in the parent, refuses every request with a reason. Prefer `--pool threads` with one engine for all
tasks of a machine: their requests then share network calls.
"""

import os
from typing import Any

from celery import Celery
from celery.signals import worker_process_init, worker_process_shutdown

import stepforge

app = Celery("images", broker=os.environ["BROKER"], backend=os.environ["RESULTS"])
app.conf.broker_transport_options = {"visibility_timeout": 6 * 3600}  # longer than any task, or it runs twice
app.conf.worker_proc_alive_timeout = (
    600.0  # seconds that a child may take to load; Celery's own 4 would end it half-way
)
app.conf.worker_prefetch_multiplier = 1  # the queue is the broker's, where other workers can take from it

engine: stepforge.Engine | None = None


@worker_process_init.connect
def load(**_: Any) -> None:
    """In the child, behind the fork."""
    global engine
    engine = stepforge.load(os.environ.get("BUNDLE", "fake"))
    engine.warm_up()


@worker_process_shutdown.connect
def close(**_: Any) -> None:
    if engine is not None:
        engine.close(drain=True, timeout=20)


@app.task(acks_late=True)  # again if the worker dies: the same request writes the same file
def draw(prompt: str, seed: int, path: str) -> list[str]:
    assert engine is not None
    result = engine.generate(prompt, seed=seed, steps=20, deadline=300)
    return [str(file) for file in result.save(path, overwrite=True)]
