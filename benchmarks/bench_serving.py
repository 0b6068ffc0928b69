"""A server under load: images a second and latency, beside a plain diffusers server loop on the same machine in the same run.

    python benchmarks/bench_serving.py out/emoji.bundle examples/emoji/model \
        --adapter poster=examples/emoji/adapters/poster/pytorch_lora_weights.safetensors \
        --adapter thermal=examples/emoji/adapters/thermal \
        --json benchmarks/results/serving.json --plot benchmarks/results/serving.png

Two servers, processes of their own behind loopback HTTP, answer the same requests in turn, one while the other is idle. Three
rows come of it:

stepforge       the requests as they are: the peer's pictures within rounding.
planned         stepforge, asked for the same pictures with the plan of `--plan` in place of full guidance at every step.
diffusers loop  peer_server.py in the faster of fp32 and bf16, which is measured first.

mix     the requests: `plain` is 20 steps, guidance 3, captions and seeds differ; `mixed` has 12, 20 or 28 steps, guidance 3
        or 7.5, and where --adapter is given one of the adapters, or none, at strength 1.
closed  N callers, each with one request under way, until a round of the same requests is answered; the three alternate.
        times: images a second over the peer's of the same round; median, least and most.
open    Poisson arrivals at a rate, whatever the server does; latency counts from the arrival, so that a queue shows.

quality of all pictures of the rounds: top-1, the share that emoji_quality.py recognises (of those without an adapter, which
repaints them), beside the peer's share of the same requests; PSNR (dB) and distance (runtime/tune/distance.py) to the peer's.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import itertools
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from emoji_quality import choose, nearest_emoji
from harness import machine
from PIL import Image

from stepforge.runtime.backends import available_threads
from stepforge.runtime.tune.distance import distance

HERE = Path(__file__).resolve().parent
STEPFORGE = (sys.executable, "-m", "stepforge.runtime")
PATIENCE = 300.0  # seconds that a caller waits for an answer
PEER = "diffusers loop"
DTYPES = ("fp32", "bf16")
ROWS = ("stepforge", "planned", PEER)
PLAN = "w;deepcache(3)"  # 0.008 from the full plan's pictures (benchmarks/results/tuned_quality.json)
CAPTIONS = [picture.caption for picture in choose(257)[0]]
EMOJI = {picture.caption: picture.emoji for picture in choose(257)[0]}
Body = dict[str, Any]


def bodies(mix: str, adapters: list[str], seed: int) -> Iterator[Body]:
    """Requests without end, the same for the same seed."""
    chance = random.Random(seed)
    while True:
        body: Body = {"prompt": chance.choice(CAPTIONS), "seed": chance.randrange(1 << 31), "steps": 20}
        body["guidance"] = 3.0
        if mix == "mixed":
            body["steps"] = chance.choice((12, 20, 28))
            body["guidance"] = chance.choice((3.0, 7.5))
            if adapters and (name := chance.choice((None, *adapters))):
                body["adapters"] = {name: 1.0}
        yield body


def planned(body: Body, plan: str) -> Body:
    guidance, _, reuse = plan.partition(";")
    weight = f"{body['guidance']:g}"
    return {**body, "guidance": re.sub(r"^w$|(?<=\()w(?=,)", weight, guidance), "reuse": reuse}


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


@dataclass(frozen=True, slots=True)
class Round:
    """The answers to one round's requests, in their order."""

    answers: list[Answer]
    latencies: list[float]  # seconds
    seconds: float  # until the last answer

    @property
    def rate(self) -> float:
        return len(self.answers) / self.seconds


def closed(server: Server, asked: list[Body], callers: int) -> Round:
    """All requests, by callers that each wait for their answer before they ask again. Raises SystemExit for a refusal."""

    def call(body: Body) -> tuple[Answer, float]:
        started = time.monotonic()
        return server.ask(body), time.monotonic() - started

    begun = time.monotonic()
    with ThreadPoolExecutor(callers) as pool:
        found = list(pool.map(call, asked))
    seconds = time.monotonic() - begun
    if refused := [answer for answer, _ in found if answer.status != 200]:
        raise SystemExit(f"{refused[0].status}: {refused[0].data[:300]!r}")
    return Round([answer for answer, _ in found], [latency for _, latency in found], seconds)


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


def quality(asked: list[Body], ours: list[Answer], peers: list[Answer]) -> dict[str, float]:
    mine, theirs = ([Image.open(io.BytesIO(answer.data)).convert("RGB") for answer in one] for one in (ours, peers))
    plain = [index for index, body in enumerate(asked) if "adapters" not in body]
    wanted = np.array([EMOJI[asked[index]["prompt"]] for index in plain])
    right, peers_right = (
        nearest_emoji(np.stack([np.asarray(pictures[index]) for index in plain]))[:, 0] == wanted
        for pictures in (mine, theirs)
    )
    psnr = []
    for a, b in zip(mine, theirs, strict=True):
        error = float(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))
        psnr.append(10 * np.log10(255**2 / error) if error else 99.0)
    return {
        "pictures": len(mine), "least_db": round(min(psnr), 1), "median_db": round(statistics.median(psnr), 1),
        "distance": round(statistics.mean(distance(a, b) for a, b in zip(mine, theirs, strict=True)), 4),
        "without_adapter": len(plain), "top1": round(100 * float(right.mean()), 1),
        "peer_top1": round(100 * float(peers_right.mean()), 1),
        "lost": int((peers_right & ~right).sum()), "won": int((right & ~peers_right).sum()),
    }  # fmt: skip


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    mixes = {mix: found for mix, found in report["mixes"].items() if any(found["open"].values())}
    if not mixes:
        return
    figure, axes = plt.subplots(2, len(mixes), figsize=(5.2 * len(mixes), 7), squeeze=False)
    for column, (mix, found) in enumerate(mixes.items()):
        above, below = axes[:, column]
        for name, color in zip(ROWS, ("tab:blue", "tab:green", "tab:red"), strict=True):
            rows = found["open"][name]
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
    for dtype in DTYPES:
        server = Server(peer_command(model, dtype, adapters))
        try:
            asked = bodies("plain", [], 0)
            server.ask(next(asked))
            taken = []
            for _ in range(2):
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
    parser.add_argument("--plan", default=PLAN, metavar="GUIDANCE;REUSE", help="of `planned`; w: the request's weight")
    parser.add_argument("--dtype", choices=DTYPES, help="of the peer, unmeasured")
    parser.add_argument(
        "--mix", action="append", choices=("plain", "mixed"), help="the others' rows in --json are kept"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=32, help="of a round, with the most callers")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each open load")
    parser.add_argument("--callers", type=int, nargs="*", default=(1, 8))
    parser.add_argument("--loads", type=float, nargs="*", default=(0.5, 0.9, 2.0, 4.0), help="× the peer's capacity")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()

    dtype, seconds = (args.dtype, {}) if args.dtype else faster(args.model, [])
    report: dict[str, Any] = {
        "machine": machine(), "threads": available_threads(), "peer_dtype": dtype, "peer_seconds": seconds,
        "options": args.option, "plan": args.plan, "mixes": {},
    }  # fmt: skip
    if args.mix and args.json and args.json.exists():
        report["mixes"] = json.loads(args.json.read_text(encoding="utf-8"))["mixes"]
    print(f"{report['machine']}\npeer: {dtype}; seconds a request: {seconds or 'not measured'}", flush=True)
    names = [adapter.split("=", 1)[0] for adapter in args.adapter]
    for mix in args.mix or ("plain", "mixed"):
        adapters = args.adapter if mix == "mixed" else []
        ours = Server(our_command(args.bundle, adapters, args.option))
        peer = Server(peer_command(args.model, dtype, adapters))
        try:
            report["mixes"][mix] = measure(dict(zip(ROWS, (ours, ours, peer), strict=True)), mix, names, args)
        finally:
            ours.close()
            peer.close()
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot(report, args.plot)


def measure(servers: dict[str, Server], mix: str, names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    asked = bodies(mix, names, 1)
    forms = {"planned": lambda body: planned(body, args.plan)}
    found: dict[str, Any] = {"seconds": args.seconds, "closed": {}, "quality": {}, "open": {name: [] for name in ROWS}}

    def of(name: str, requests: Iterable[Body]) -> Iterator[Body]:
        return map(forms.get(name, dict), requests)

    for name, server in servers.items():  # compiles what the loads use
        closed(server, list(of(name, itertools.islice(bodies(mix, names, 99), 6))), 6)
    for callers in args.callers:
        requests: list[list[Body]] = []
        rounds: dict[str, list[Round]] = {name: [] for name in ROWS}
        for _ in range(args.rounds):
            requests.append(list(itertools.islice(asked, max(2, args.requests * callers // max(args.callers)))))
            for name, server in servers.items():
                rounds[name].append(closed(server, list(of(name, requests[-1])), callers))
        found["closed"][callers] = {}
        for name in ROWS:
            times = [mine.rate / peers.rate for mine, peers in zip(rounds[name], rounds[PEER], strict=True)]
            found["closed"][callers][name] = row = {
                "images_per_second": [round(one.rate, 3) for one in rounds[name]],
                "times": [round(f(times), 2) for f in (statistics.median, min, max)],
                **percentiles([seconds for one in rounds[name] for seconds in one.latencies]),
            }  # fmt: skip
            print(f"  {mix}, {callers} callers, {name:14} {json.dumps(row)}", flush=True)
        every = {name: [answer for one in rounds[name] for answer in one.answers] for name in ROWS}
        if callers == max(args.callers):
            for name in ROWS[:-1]:
                found["quality"][name] = quality([body for one in requests for body in one], every[name], every[PEER])
                print(f"  {mix}, {name:14} {json.dumps(found['quality'][name])}", flush=True)
    capacity = max(statistics.median(rows[PEER]["images_per_second"]) for rows in found["closed"].values())
    for load in args.loads:
        for name, server in servers.items():
            row = offered(server, of(name, bodies(mix, names, 7)), load * capacity, args.seconds, 7)
            print(f"  {mix}, {name:14} {json.dumps(row)}", flush=True)
            found["open"][name].append(row)
    return found


if __name__ == "__main__":
    main()
