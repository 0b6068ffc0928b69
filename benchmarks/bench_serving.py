"""A server under load: images a second and latency, beside a plain diffusers server loop on the same machine in the same run.

    python benchmarks/bench_serving.py out/emoji.bundle examples/emoji/model \
        --adapter poster=examples/emoji/adapters/poster/pytorch_lora_weights.safetensors \
        --adapter thermal=examples/emoji/adapters/thermal \
        --json benchmarks/results/serving.json --plot benchmarks/results/serving.png

Both servers are processes of their own behind loopback HTTP, and answer the same requests in turn, load by load, while the
other one is idle. The peer (peer_server.py) runs in the faster of fp32 and bf16, which is measured first.

mix     the requests: `plain` is 20 steps, guidance 3, prompts and seeds differ; `mixed` has 12, 20 or 28 steps, guidance 3
        or 7.5, and where --adapter is given one of the adapters, or none, at strength 1.
closed  N callers, each with one request under way: what a server makes at most.
open    Poisson arrivals at a rate, whatever the server does; latency counts from the arrival, so that a queue shows.

quality: PSNR of both servers' pictures of the same requests, in dB; the lowest and the median.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import machine
from PIL import Image

HERE = Path(__file__).resolve().parent
PROMPTS = HERE.parent / "examples/emoji/prompts.txt"
STEPFORGE = (sys.executable, "-m", "stepforge.runtime")
PATIENCE = 300.0  # seconds that a caller waits for an answer
Body = dict[str, Any]


def bodies(mix: str, adapters: list[str], seed: int) -> Iterator[Body]:
    """Requests without end, the same for the same seed."""
    chance = random.Random(seed)
    prompts = PROMPTS.read_text(encoding="utf-8").split("\n")[:-1]
    while True:
        body: Body = {"prompt": chance.choice(prompts), "seed": chance.randrange(1 << 31), "steps": 20, "guidance": 3.0}
        if mix == "mixed":
            body["steps"] = chance.choice((12, 20, 28))
            body["guidance"] = chance.choice((3.0, 7.5))
            if adapters and (name := chance.choice((None, *adapters))):
                body["adapters"] = {name: 1.0}
        yield body


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    data: bytes  # the picture's file; of other statuses the body
    retry_after: str | None


class Server:
    """A server process, asked through loopback. log: where its standard error goes."""

    def __init__(self, command: Callable[[int], list[str]], log: Path | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        with open(os.devnull if log is None else log, "wb") as errors:
            self.process = subprocess.Popen(command(self.port), stderr=errors)
        end = time.monotonic() + PATIENCE
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server did not start: {' '.join(command(self.port))}")
            time.sleep(0.2)

    def _ready(self) -> bool:
        try:
            self.get("/health/ready")
        except OSError:
            return False
        return True

    def get(self, path: str) -> bytes:
        """Raises OSError for a status that is not 200."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as response:
            data: bytes = response.read()
        return data

    def ask(self, body: Body) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/images/generations", json.dumps(body), headers)
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        if response.status == 200:
            data = base64.b64decode(json.loads(data)["data"][0]["b64_json"])
        return Answer(response.status, data, response.headers.get("Retry-After"))

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def percentiles(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {f"p{p}": round(float(np.percentile(seconds, p)), 3) for p in (50, 95, 99)}


def closed(server: Server, asked: Iterator[Body], callers: int, seconds: float) -> dict[str, Any]:
    """Images a second of callers that each wait for their answer before they ask again."""
    lock, taken = threading.Lock(), []
    begun = time.monotonic()
    end = begun + seconds

    def call() -> None:
        while time.monotonic() < end:
            with lock:
                body = next(asked)
            started = time.monotonic()
            status = server.ask(body).status
            with lock:
                taken.append((status, started, time.monotonic()))

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = [(start, stop) for status, start, stop in taken if status == 200]
    # whole requests over the time until the last of them ended: nothing is cut at the edge
    rate = len(done) / (max(stop for _, stop in done) - begun)
    return {
        "callers": callers, "answers": len(done), "refused": len(taken) - len(done), "images_per_second": round(rate, 3),
        **percentiles([stop - start for start, stop in done]),
    }  # fmt: skip


def offered(server: Server, asked: Iterator[Body], rate: float, seconds: float, seed: int) -> dict[str, Any]:
    """Latencies under Poisson arrivals at `rate` a second."""
    chance, lock, taken = random.Random(seed), threading.Lock(), []

    def call(body: Body, due: float) -> None:
        answer = server.ask(body)
        with lock:
            taken.append((answer, time.monotonic() - due))

    threads = []
    begun = due = time.monotonic()
    while (due := due + chance.expovariate(rate)) < begun + seconds:
        time.sleep(max(0.0, due - time.monotonic()))
        threads.append(threading.Thread(target=call, args=(next(asked), due)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - begun
    done = [latency for answer, latency in taken if answer.status == 200]
    return {
        "rate": round(rate, 3), "arrivals": len(threads), "answers": len(done),
        "refused": sum(answer.status == 429 for answer, _ in taken), "images_per_second": round(len(done) / took, 3),
        **percentiles(done),
    }  # fmt: skip


def quality(ours: Server, peer: Server, asked: list[Body]) -> dict[str, float]:
    found = []
    for body in asked:
        pair = []
        for server in (ours, peer):
            answer = server.ask(body)
            if answer.status != 200:
                raise SystemExit(f"{answer.status}: {answer.data[:300]!r}")
            pair.append(np.asarray(Image.open(io.BytesIO(answer.data)).convert("RGB"), np.float64))
        error = float(np.mean((pair[0] - pair[1]) ** 2))
        found.append(10 * np.log10(255**2 / error) if error else 99.0)
    return {"pictures": len(found), "least_db": round(min(found), 1), "median_db": round(statistics.median(found), 1)}


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(report["mixes"]), figsize=(5.2 * len(report["mixes"]), 7), squeeze=False)
    for column, (mix, found) in enumerate(report["mixes"].items()):
        above, below = axes[:, column]
        for name, color in (("stepforge", "tab:blue"), ("diffusers loop", "tab:red")):
            rows = found[name]["open"]
            rates = [row["rate"] for row in rows]
            above.plot(rates, [row["images_per_second"] for row in rows], "o-", color=color, label=name)
            for percentile, style in (("p50", "-"), ("p95", "--"), ("p99", ":")):
                kept = [(row["rate"], row[percentile]) for row in rows if percentile in row]
                below.plot(*zip(*kept, strict=True), style, marker=".", color=color, label=f"{name} {percentile}")
        above.set(title=f"{mix} requests", ylabel="images/s", xlabel="arrivals/s")
        below.set(ylabel="seconds from arrival", xlabel="arrivals/s", yscale="log")
        for axis in (above, below):
            axis.legend(fontsize=7)
            axis.grid(alpha=0.3)
    figure.suptitle(report["machine"].split(",")[0] + f", {report['threads']} threads", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def faster(model: Path, adapters: list[str]) -> tuple[str, dict[str, float]]:
    """The peer's precision, and seconds of one request in both."""
    seconds = {}
    for dtype in ("fp32", "bf16"):
        server = Server(peer_command(model, dtype, adapters))
        try:
            asked = bodies("plain", [], 0)
            server.ask(next(asked))
            taken = []
            for _ in range(3):
                started = time.monotonic()
                server.ask(next(asked))
                taken.append(time.monotonic() - started)
        finally:
            server.close()
        seconds[dtype] = round(statistics.median(taken), 3)
    return min(seconds, key=lambda name: seconds[name]), seconds


def peer_command(model: Path, dtype: str, adapters: list[str]) -> Callable[[int], list[str]]:
    more = [word for adapter in adapters for word in ("--adapter", adapter)]
    script = str(HERE / "peer_server.py")
    return lambda port: [sys.executable, script, str(model), "--port", str(port), "--dtype", dtype, *more]


def our_command(bundle: Path, adapters: list[str], options: list[str]) -> Callable[[int], list[str]]:
    more = [word for adapter in adapters for word in ("--adapter", adapter)]
    return lambda port: [
        *STEPFORGE, "serve", str(bundle), "--port", str(port), *more, *options,
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("model", type=Path, help="diffusers' folder that the bundle was exported from")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--option", action="append", default=[], help="a word more for `stepforge serve`")
    parser.add_argument("--mix", action="append", choices=("plain", "mixed"))
    parser.add_argument("--seconds", type=float, default=12.0, help="of each load")
    parser.add_argument("--callers", type=int, nargs="*", default=(1, 8))
    parser.add_argument("--loads", type=float, nargs="*", default=(0.5, 0.9, 2.0, 4.0), help="× the peer's capacity")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()

    from stepforge.runtime.backends import available_threads

    dtype, seconds = faster(args.model, [])
    report: dict[str, Any] = {
        "machine": machine(), "threads": available_threads(), "peer_dtype": dtype, "peer_seconds": seconds,
        "options": args.option, "seconds": args.seconds, "mixes": {},
    }  # fmt: skip
    print(f"{report['machine']}\npeer: {seconds} s a request, {dtype} is taken", flush=True)
    names = [adapter.split("=", 1)[0] for adapter in args.adapter]
    for mix in args.mix or ("plain", "mixed"):
        adapters = args.adapter if mix == "mixed" else []
        servers = {
            "stepforge": Server(our_command(args.bundle, adapters, args.option)),
            "diffusers loop": Server(peer_command(args.model, dtype, adapters)),
        }
        try:
            report["mixes"][mix] = measure(servers, mix, names, args)
        finally:
            for server in servers.values():
                server.close()
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot(report, args.plot)


def measure(servers: dict[str, Server], mix: str, names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    first = bodies(mix, names, 1)
    found: dict[str, Any] = {"quality": quality(*servers.values(), [next(first) for _ in range(8)])}
    print(f"{mix}: {found['quality']}", flush=True)
    for name in servers:
        found[name] = {"closed": [], "open": []}

    def told(name: str, kind: str, row: dict[str, Any]) -> dict[str, Any]:
        print(f"  {name:14} {json.dumps(row)}", flush=True)
        found[name][kind].append(row)
        return row

    for callers in args.callers:
        for name, server in servers.items():
            told(name, "closed", closed(server, bodies(mix, names, callers), callers, args.seconds))
    best = {name: max(row["images_per_second"] for row in found[name]["closed"]) for name in servers}
    found["times"] = round(best["stepforge"] / best["diffusers loop"], 2)
    print(f"  {found['times']} × the peer's images a second", flush=True)
    for load in args.loads:
        for name, server in servers.items():
            rate = load * best["diffusers loop"]
            told(name, "open", offered(server, bodies(mix, names, 7), rate, args.seconds, 7))
    return found


if __name__ == "__main__":
    main()
