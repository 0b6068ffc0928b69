"""Hostile HTTP against the real server on the fake model: JSON, forms, images, headers, paths, framing, slow clients.

An answer is right if its status is none of a failure's, errors have OpenAI's envelope in one short line that tells nothing of
the server's insides, and the connection ends in time. What the server logs as an error counts as noise.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import re
import socket
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from http_cases import KEY, STALL, Case, as_form, as_frames, as_json, as_path, as_slow

from stepforge.runtime.backends.fake import Fake, fake_bundle
from stepforge.runtime.engine import Engine
from stepforge.runtime.serve.http.keys import Keys
from stepforge.runtime.serve.http.models import Model, Models
from stepforge.runtime.serve.http.server import Server
from stepforge.runtime.serve.http.service import Service
from stepforge.runtime.serve.http.settings import Settings

QUICK, SOAK = 400, 12_000
SECONDS = 15.0

LONGEST = 16_384  # bytes of an answer to what is refused: nothing of a size is echoed
INSIDES = re.compile(
    r"Traceback|site-packages|\.py\b|stepforge/|/tmp|/root|/home|0x[0-9a-f]{6,}|<[a-z_.]+ object", re.IGNORECASE
)
STATUSES = {200, 400, 401, 403, 404, 405, 408, 413, 415, 429}
# httptools, below the application: it answers what is no HTTP with a line of its own
PARSER = b"Invalid HTTP request received."


class Refused(Exception):
    """The server's answer was an error of the client's."""


ERRORS = (Refused,)


@dataclass(slots=True)
class Base:
    port: int
    folder: Path
    server: Server


def start(folder: Path) -> Base:
    (folder / "adapters").mkdir()
    (folder / "keys").write_text(f"{KEY} tester admin\n", encoding="utf-8")
    # they warn of what is no HTTP, of what is no form, and once of guidance below 1
    for name in ("uvicorn.error", "python_multipart", "stepforge.runtime.engine.engine"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # spooled files of a form that is refused are memory only, and go with it
    warnings.filterwarnings("ignore", message="Unclosed file", category=ResourceWarning)
    settings = Settings(
        max_body=1 << 20, body_seconds=1.0, stall_seconds=STALL, max_steps=8, max_images=2, max_pixels=1 << 18,
        max_prompt=2000, adapter_folder=folder / "adapters", deadline=10.0,
    )  # fmt: skip
    models = Models({"fake": Model("fake", lambda: Engine(bundle := fake_bundle(64), Fake(bundle)))}, {})
    service = Service(models, settings, Keys(folder / "keys"))
    server = Server(service, host="127.0.0.1", port=0)
    server.capture_signals = contextlib.nullcontext  # which are the main thread's
    threading.Thread(target=server.run, daemon=True).start()
    until = time.monotonic() + 60
    while not server.started or models.state != "ready":
        assert time.monotonic() < until, "the server did not start"
        time.sleep(0.02)
    return Base(server.servers[0].sockets[0].getsockname()[1], folder, server)


def case(rng: random.Random, base: Base) -> Case:
    make = rng.choices((as_json, as_form, as_path, as_frames, as_slow), (40, 25, 15, 18, 1))[0]
    return make(rng)


# Answers


def ask(port: int, one: Case, seconds: float = 12.0) -> bytes:
    """What the server sends until it has said all, or closes; nothing if it closes at once."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        try:
            for piece in one.pieces:
                connection.sendall(piece)
                if one.pause:
                    time.sleep(one.pause)
            if one.end:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # answered and closed in the middle of the body: what it said is read
        found = bytearray()
        try:
            bare = one.pieces[0].startswith(b"HEAD ")
            while not whole(found, bare) and (piece := connection.recv(1 << 16)):
                found += piece
        except ConnectionResetError:
            pass
        except TimeoutError:
            raise AssertionError(f"no end of the answer within {seconds} s: {bytes(found[:300])!r}") from None
    return bytes(found)


def whole(found: bytes | bytearray, bare: bool) -> bool:
    """Whether the answer has come to its end, as far as it says its length. bare: to HEAD, without a body."""
    head, gap, body = bytes(found).partition(b"\r\n\r\n")
    if not gap:
        return False
    if head.startswith(b"HTTP/1.1 100"):
        return whole(body, bare)
    if bare:
        return True
    length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    return len(body) >= int(length[1]) if length else body.endswith(b"0\r\n\r\n")


def check(one: Case, base: Base) -> None:
    answer = ask(base.port, one)
    if not answer:
        raise Refused("closed without an answer")
    if answer.startswith(b"HTTP/1.1 100"):
        answer = answer.partition(b"\r\n\r\n")[2]
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    assert status in STATUSES, answer[:2000]
    if status == 200:
        return
    if PARSER in body and status == 400:
        raise Refused("no HTTP")
    if length := re.search(rb"(?i)\r\ncontent-length: (\d+)", head):
        body = body[: int(length[1])]  # bytes behind the body are a request of their own, answered behind this
    assert len(answer) < LONGEST, f"{len(answer)} bytes"
    assert b"\r\nx-request-id: " in head.lower(), head
    if not body:
        raise Refused("without a body")
    assert b"\r\ncontent-type: application/json" in head.lower(), head
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert error["type"], error
    assert error["code"], error
    told = error["message"]
    assert not (leak := INSIDES.search(told)) or leak[0].encode() in b"".join(one.pieces), told
    assert str(base.folder) not in told, told
    if status in (429, 503):
        assert b"\r\nretry-after: " in head.lower(), head
    raise Refused(told)
