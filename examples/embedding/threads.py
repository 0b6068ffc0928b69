"""One engine for many threads: `python examples/embedding/threads.py [BUNDLE]` writes out/threads/.

Every call of the engine may come from any thread. Their requests share network calls; a result does not depend on its company.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from pathlib import Path

import stepforge

OUT = Path("out/threads")
bundle = sys.argv[1] if len(sys.argv) > 1 else "fake"


def serve(engine: stepforge.Engine, tasks: queue.SimpleQueue[tuple[str, int] | None]) -> None:
    """A thread of the application: one task after another, each within ten seconds."""
    while (task := tasks.get()) is not None:
        name, seed = task
        try:
            result = engine.generate("a cat", seed=seed, steps=10, deadline=10)  # waits for room in the queue
        except stepforge.StepforgeError as error:  # one line, fit to be shown; the others go on
            print(f"{name}: {error}")
        else:
            result.save(OUT / f"{name}.png", overwrite=True)


with stepforge.load(bundle, queue_limit=16) as engine:
    engine.warm_up("a cat")
    tasks: queue.SimpleQueue[tuple[str, int] | None] = queue.SimpleQueue()
    threads = [threading.Thread(target=serve, args=(engine, tasks)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for seed in range(8):
        tasks.put((f"task-{seed}", seed))

    # futures, for a thread that does not want to wait: first in the queue, refused at once if that is full
    try:
        urgent = engine.submit("a dog", steps=10, priority=5, deadline=5)
        urgent.result().save(OUT / "urgent.png", overwrite=True)
    except stepforge.QueueFull:
        print("busy, try again later")

    # a user who goes away: the work stops at the next step
    gone = engine.submit("a horse", steps=1000)
    time.sleep(0.01)
    gone.cancel()

    for _ in threads:
        tasks.put(None)
    for thread in threads:
        thread.join()
    print(engine.stats())
    engine.close(drain=True, timeout=30)
