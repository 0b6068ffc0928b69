"""A server at three times its capacity, with clients that vanish and tenants with adapters of their own: what holds?

    python benchmarks/serving_load.py out/emoji.bundle \
        --adapter poster=examples/emoji/adapters/poster/pytorch_lora_weights.safetensors \
        --adapter thermal=examples/emoji/adapters/thermal --seconds 120 --json benchmarks/results/serving_load.json

    python benchmarks/serving_load.py fake --seconds 60

capacity   closed loop of 12 callers: images a second, and the server's memory behind it
overload   Poisson arrivals at 3 × that; one client in ten hangs up at a random moment. Every answer is 200, or 429 with a
           Retry-After of 1 to 60 s; the p99 of accepted requests stays under what a full house needs, twice; memory stays
tenants    requests with different adapters, one after the other, then all at once: the same pictures
after      nothing is under way, the log has no traceback, a request from before gives the same bytes

Exit code 1 if a promise was broken; the figures are printed and written all the same.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import random
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_serving import Body, Server, bodies, closed, our_command, percentiles
from harness import machine
from PIL import Image

QUEUE = 16  # --queue-limit; the server has as many again being read, drawn and sent
TIMES = 3.0
VANISH = 0.1  # share of clients that hang up
GROWTH = 48  # MB that the second half of the overload may add to the highest of the first half
SAME = 1  # levels of 255: a row's roundings may depend on how many rows share its call


class Watch:
    """Memory, threads and open files of a process, once a second."""

    def __init__(self, pid: int) -> None:
        self._pid, self._ended = pid, threading.Event()
        self.samples: list[tuple[float, int, int, int]] = []  # seconds, MB, threads, files
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        started = time.monotonic()
        while not self._ended.wait(1.0):
            lines = Path(f"/proc/{self._pid}/status").read_text(encoding="ascii").splitlines()
            status = dict(line.split(":", 1) for line in lines)
            files = sum(1 for _ in Path(f"/proc/{self._pid}/fd").iterdir())
            resident = int(status["VmRSS"].split()[0]) // 1024
            self.samples.append((time.monotonic() - started, resident, int(status["Threads"]), files))

    def report(self) -> dict[str, int]:
        half = len(self.samples) // 2
        first, second = self.samples[:half] or self.samples, self.samples[half:]
        return {
            "mb_first_half": max(sample[1] for sample in first), "mb_second_half": max(sample[1] for sample in second),
            "threads": max(sample[2] for sample in self.samples), "files": max(sample[3] for sample in self.samples),
        }  # fmt: skip


def vanish(server: Server, body: Body, after: float) -> None:
    """A client that hangs up, wherever its request is by then."""
    data = json.dumps(body).encode()
    head = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{head}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        time.sleep(after)


def overload(server: Server, rate: float, seconds: float, names: list[str], latency: float) -> dict[str, Any]:
    chance, asked, lock = random.Random(5), bodies("mixed", names, 5), threading.Lock()
    taken: list[tuple[int, str | None, float]] = []
    failures: list[str] = []

    def call(body: Body, due: float) -> None:
        try:
            answer = server.ask(body)
        except OSError as error:
            failures.append(repr(error))
            return
        with lock:
            taken.append((answer.status, answer.retry_after, time.monotonic() - due))

    threads = []
    vanished = 0
    begun = due = time.monotonic()
    while (due := due + chance.expovariate(rate)) < begun + seconds:
        time.sleep(max(0.0, due - time.monotonic()))
        if chance.random() < VANISH:
            vanished += 1
            thread = threading.Thread(target=vanish, args=(server, next(asked), chance.uniform(0.0, latency)))
        else:
            thread = threading.Thread(target=call, args=(next(asked), due))
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()
    took = time.monotonic() - begun
    done = [seconds for status, _, seconds in taken if status == 200]
    refused = [seconds for status, _, seconds in taken if status == 429]
    retries = [after for status, after, _ in taken if status == 429]
    return {
        "rate": round(rate, 2), "seconds": round(took, 1), "arrivals": len(threads), "vanished": vanished,
        "answers": len(done), "images_per_second": round(len(done) / took, 3), "accepted": percentiles(done),
        "refused": len(refused), "refused_seconds": percentiles(refused),
        "retry_after": sorted({after or "none" for after in retries}),
        "other_statuses": sorted({status for status, _, _ in taken} - {200, 429}), "failures": failures[:5],
    }  # fmt: skip


def tenants(server: Server, names: list[str], count: int) -> dict[str, Any]:
    """Largest difference between a tenant's picture alone and in company; a leak of an adapter is tens of levels."""
    asked = [
        {"prompt": "cat face on a blue background", "steps": 12, "guidance": 3.0, "seed": index // (len(names) + 1),
         "adapters": {name: 1.0} if (name := [None, *names][index % (len(names) + 1)]) else {}}
        for index in range(count)
    ]  # fmt: skip

    def picture(body: Body) -> np.ndarray:
        answer = server.ask(body)
        while answer.status == 429:
            time.sleep(0.2)
            answer = server.ask(body)
        return np.asarray(Image.open(io.BytesIO(answer.data)).convert("RGB"), np.int16)

    alone = [picture(body) for body in asked]
    together: list[Any] = [None] * count

    def put(index: int) -> None:
        together[index] = picture(asked[index])

    threads = [threading.Thread(target=put, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    differences = [int(np.abs(a - b).max()) for a, b in zip(alone, together, strict=True)]
    apart = [int(np.abs(alone[i] - alone[j]).max()) for i in range(len(names)) for j in range(i + 1, len(names) + 1)]
    return {
        "requests": count, "adapters": names, "equal_to_the_byte": sum(not d for d in differences),
        "largest_difference": max(differences), "least_difference_between_tenants": min(apart, default=0),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--option", action="append", default=[], help="a word more for `stepforge serve`")
    parser.add_argument("--capacity", type=int, default=36, help="requests that measure it")
    parser.add_argument("--seconds", type=float, default=120.0, help="of the overload")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    names = [adapter.split("=", 1)[0] for adapter in args.adapter]
    report: dict[str, Any] = {
        "machine": machine(),
        "bundle": args.bundle.name,
        "queue_limit": QUEUE,
        "options": args.option,
    }
    broken: list[str] = []

    def promise(holds: bool, text: str) -> None:
        if not holds:
            broken.append(text)

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        server = Server(our_command(args.bundle, args.adapter, ["--queue-limit", str(QUEUE), *args.option]), log)
        try:
            before = server.ask({"prompt": "a", "steps": 12, "seed": 3}).data
            held = closed(server, list(itertools.islice(bodies("mixed", names, 1), args.capacity)), 12)
            rate = held.rate
            report["capacity"] = capacity = {"images_per_second": round(rate, 3), **percentiles(held.latencies)}
            with Watch(server.process.pid) as watch:
                report["overload"] = found = overload(server, TIMES * rate, args.seconds, names, capacity["p50"])
            report["process"] = process = watch.report()
            # an accepted request waits for at most as many as the server lets in, and then runs
            report["bound_seconds"] = bound = round(2 * 2 * QUEUE / rate, 2)
            if names:
                report["tenants"] = shared = tenants(server, names, 12 * (len(names) + 1))
                promise(shared["largest_difference"] <= SAME, "a tenant's picture depends on its company")
                promise(shared["least_difference_between_tenants"] > 20, "adapters do nothing")
            metrics = server.get("/metrics").decode()
            promise("stepforge_http_under_way 0.0" in metrics, "something is under way after the load")
            promise(server.ask({"prompt": "a", "steps": 12, "seed": 3}).data == before, "the picture has changed")
            report["failures"] = [line for line in metrics.splitlines() if line.startswith("stepforge_failures_total")]
        finally:
            server.close()
        report["tracebacks"] = log.read_text(encoding="utf-8").count('"traceback"')
    promise(not found["other_statuses"] and not found["failures"], "an answer that is neither 200 nor 429")
    promise(found["refused"] > 0, "nothing was refused at three times the capacity")
    promise(
        all(after.isdigit() and 1 <= int(after) <= 60 for after in found["retry_after"]), "a 429 without Retry-After"
    )
    promise(found["accepted"]["p99"] <= bound, "p99 of accepted requests")
    promise(process["mb_second_half"] <= process["mb_first_half"] + GROWTH, "memory grows")
    promise(not report["tracebacks"], "a traceback in the log")
    report["broken"] = broken
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
