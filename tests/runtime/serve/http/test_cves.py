"""Weaknesses of other servers, each tried on this one: every row of a list of CVEs that touches HTTP, by its number.

Raw bytes go to the server of the fuzz generator (tests/fuzz/gen_http.py), a whole one with an API key, on loopback.
"""

from __future__ import annotations

import base64
import io
import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parents[3] / "fuzz"))
import gen_http
from http_cases import KEY, STALL, Case, request

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
SMALL = {"prompt": "x", "steps": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("server")
    base = gen_http.start(folder)
    yield base
    base.server.should_exit = True
    for engine in base.server.service.models.engines():
        engine.close()


@pytest.fixture
def ask(base):
    def send(*pieces: bytes, pause: float = 0.0) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer to raw bytes."""
        answer = gen_http.ask(base.port, Case(pieces, pause))
        assert answer, "closed without an answer"
        head, _, body = answer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        return (
            int(first.split()[1]),
            {n.lower(): v.strip() for n, _, v in (line.partition(":") for line in lines)},
            body,
        )

    return send


def posted(fields: Any, path: str = GENERATIONS, **options: Any) -> bytes:
    return request(None, path, json.dumps(fields).encode(), "application/json", **options)


def form(*parts: tuple[str, bytes], before: bytes = b"", after: bytes = b"") -> bytes:
    body = b"".join(b"--b\r\n%s\r\n\r\n%s\r\n" % (head.encode("latin-1"), data) for head, data in parts)
    return request(None, GENERATIONS, before + body + b"--b--\r\n" + after, "multipart/form-data; boundary=b")


def field(name: str, more: str = "") -> str:
    return f'Content-Disposition: form-data; name="{name}"{more}'


def code(answer: tuple[int, dict[str, str], bytes], status: int) -> str:
    assert answer[0] == status, answer
    error = json.loads(answer[2])["error"]
    assert not gen_http.INSIDES.search(error["message"])
    return error["code"]


HOSTS = ["localhost/health/live?", "x/health/live#", "a@b/health/ready?x=", "[::1/health/live", "h" * 9000]


@pytest.mark.parametrize("host", HOSTS)
def test_cve_2026_48710_a_host_header_opens_no_path(ask, host):
    """BadHost: Starlette's request.url.path followed the Host header, and with it checks of the path."""
    body = json.dumps(SMALL)
    head = (
        f"POST {GENERATIONS} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    answer = ask(f"{head}\r\n\r\n{body}".encode())
    assert answer[0] in (400, 401)
    for path in ("/metrics", "/v1/models", "/openapi.json", "/v1/adapters", "/nope"):
        assert ask(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())[0] in (400, 401)


def test_cve_2025_62727_ranges_are_not_read(ask):
    """Quadratic time in the ranges of a file's request."""
    ranges = "bytes=" + ",".join(f"{i}-" for i in range(9000))
    status, headers, body = ask(request(None, "/page.js", b"", "", method="GET", more=(("Range", ranges),)))
    assert status == 200
    assert "content-range" not in headers
    assert len(body) == int(headers["content-length"])


def test_cve_2024_47874_and_2026_54282_forms_have_limits(ask):
    """Form fields without a limit, and limits that form() did not pass on."""
    assert code(ask(form(*[(field(f"f{i}"), b"x") for i in range(2000)])), 400) == "invalid_form"
    assert code(ask(form((field("prompt"), b"x" * (1 << 20)))), 413) == "request_too_large"
    assert code(ask(form((field("prompt"), b"x" * 500_000))), 400) == "invalid_value"


def test_cve_2024_53981_and_2026_40347_around_the_parts(ask):
    """Preamble and epilogue of a form, read byte by byte with a log line for each."""
    started = time.monotonic()
    assert ask(form((field("prompt"), b"x"), after=b"\r\n" * 200_000))[0] in (200, 400)
    assert ask(form((field("prompt"), b"x"), before=b"\r\n" * 200_000))[0] in (200, 400)
    assert time.monotonic() - started < 60


def test_cve_2026_42561_headers_of_parts_are_bounded(ask):
    for more in ("X-Big: " + "h" * 400_000, "\r\n".join(f"X-{i}: v" for i in range(20_000))):
        assert code(ask(form((f"{field('prompt')}\r\n{more}", b"x"))), 400) == "invalid_form"


def test_cve_2026_24486_names_of_uploads_are_not_paths(ask, base):
    """A part's filename was joined to a folder."""
    before = sorted(base.folder.parent.rglob("*"))
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    for name in ("../../escaped.png", "/tmp/escaped.png", "..\\escaped.png", "x\0.png"):
        upload = (field("image", f'; filename="{name}"') + "\r\nContent-Type: image/png", file.getvalue())
        data = form((field("prompt"), b"x"), (field("steps"), b"2"), upload).replace(
            GENERATIONS.encode(), EDITS.encode(), 1
        )
        answer = ask(data)
        assert answer[0] == 200 or (answer[0] == 400 and "\0" in name), answer
    assert sorted(base.folder.parent.rglob("*")) == before
    assert not Path("/tmp/escaped.png").exists()


def test_cve_2025_54121_uploads_do_not_block_others(ask, base):
    """A large upload's spooling blocked the event loop: here another client is answered between its pieces."""
    body = b" " * 700_000
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}"
    head += "\r\nContent-Type: multipart/form-data; boundary=b"
    with socket.create_connection(("127.0.0.1", base.port)) as slow:
        slow.sendall(f"{head}\r\nContent-Length: 800000\r\n\r\n".encode() + body)
        assert ask(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200


FETCHED = [
    "http://127.0.0.1:{port}/",
    "https://localhost:{port}/x.png",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://0x7f000001:{port}/",
]


def test_cve_2025_6242_and_2026_34753_no_address_is_fetched(ask):
    """Server-side requests through image addresses, redirects and DNS that changes its mind."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.2)
        for text in FETCHED:
            url = text.format(port=listener.getsockname()[1])
            for fields in (
                {**SMALL, "controls": [{"name": "a", "image": url}]},
                {**SMALL, "upscale": [{"name": "x2", "image": url}]},
            ):
                assert code(ask(posted(fields)), 400) == "invalid_image"
            assert code(ask(posted({**SMALL, "image": url}, EDITS)), 400) == "invalid_image"
            assert code(ask(posted({**SMALL, "images": [{"image_url": url}]}, EDITS)), 400) == "invalid_image"
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize(
    "fields",
    [{"n": 10**9}, {"n": 3}, {"steps": 10**6}, {"size": "16384x16384"}, {"width": 4096, "height": 4096},
     {"upscale": ["x4", "x4"]}, {"prompt": "x" * 3000}, {"upscale": ["nearest"] * 9}, {"sigmas": [9.0] * 500},
     {"controls": [{"name": "a"}] * 500}],
)  # fmt: skip
def test_cve_2026_34756_counts_are_bounded_before_anything_is_made(ask, base, fields):
    engine = base.server.service.models.engines()[0]
    before = engine.stats().images
    assert code(ask(posted({**SMALL, **fields})), 400) != "internal_error"
    assert engine.stats().images == before


def bomb(width: int, height: int) -> str:
    """A small PNG whose header says another size."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def test_cve_2026_40192_and_2026_22773_pictures_are_bounded_before_they_are_decoded(ask):
    urls = [bomb(65535, 65535), bomb(2**31 - 1, 2**31 - 1), bomb(0, 0)]
    for data in (
        b"SIMPLE  =                    T",
        b"GIF89a",
        b"BM",
        b"\x93NUMPY",
        b"PK\x03\x04",
        b"\x80\x04.",
    ):  # CVE-2025-62164
        urls += [
            f"data:image/{kind};base64," + base64.b64encode(data * 100).decode() for kind in ("png", "gif", "fits")
        ]
    for url in urls:
        assert code(ask(posted({**SMALL, "image": url}, EDITS)), 400) == "invalid_image"
    assert (
        code(ask(posted({**SMALL, "image": "data:image/png;base64," + "A" * 1_100_000}, EDITS)), 413)
        == "request_too_large"
    )


def test_cve_2025_23310_many_tiny_chunks(ask):
    body = json.dumps(SMALL).encode() + b" " * 20_000
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json"
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    assert ask(f"{head}\r\nTransfer-Encoding: chunked\r\n\r\n".encode(), chunks)[0] == 200


def test_cve_2025_23319_errors_tell_nothing_of_the_inside(ask, base):
    """Triton's errors told the name of a shared memory region. INSIDES is looked for in every message of this file."""
    service = base.server.service
    engine = service.models.engines()[0]
    submitted, engine.asubmit = engine.asubmit, None  # a fault of our own
    try:
        answer = ask(posted(SMALL))
    finally:
        engine.asubmit = submitted
    assert code(answer, 500) == "internal_error"
    assert b"NoneType" not in answer[2]


NAMES = [
    "..%2f..%2fsecret", "%2e%2e%2fsecret", "..\\secret", "good%00", "%ef%bc%8e%ef%bc%8e%2fsecret", "a" * 300, "%2fetc%2fpasswd",
    "<script>", "%3Cimg%20src=x%20onerror=alert(1)%3E", "..", "%252e%252e",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_cve_2026_24208_and_2026_56671_names_are_looked_up_not_joined(ask, name):
    """Path traversal in names of models, adapters and previews."""
    for method, path in (("GET", "/v1/models/"), ("DELETE", "/v1/adapters/"), ("GET", "/"), ("GET", "/page/")):
        answer = ask(request(None, path + name, b"", "", method=method))
        assert answer[0] in (400, 404, 405), answer
        if gen_http.PARSER not in answer[2]:
            assert answer[1]["content-type"] == "application/json"
            assert answer[1]["x-content-type-options"] == "nosniff"  # JSON that no browser takes for a page


def test_cve_2026_111984_no_other_site_and_no_markup(ask):
    """A1111: names as markup, and open CORS."""
    for origin in ("https://evil.example", "null"):
        for method in ("GET", "OPTIONS"):
            more = (("Origin", origin), ("Access-Control-Request-Method", "POST"))
            headers = ask(
                request(None, GENERATIONS if method == "OPTIONS" else "/v1/models", b"", "", method=method, more=more)
            )[1]
            assert not [name for name in headers if name.startswith("access-control")]
    answer = ask(posted({**SMALL, "model": "<img src=x>"}))
    assert code(answer, 404) == "model_not_found"
    assert answer[1]["content-type"] == "application/json"


def test_cve_2025_27520_nothing_is_unpickled(ask):
    """BentoML read pickles from bodies."""
    for kind in (
        "application/x-pickle",
        "application/vnd.bentoml+pickle",
        "application/octet-stream",
        "application/x-python",
    ):
        assert (
            code(ask(request(None, GENERATIONS, b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", kind)), 415)
            == "unsupported_media_type"
        )


def test_a_head_that_does_not_come_is_not_waited_for(base):
    """Slow clients below any request: uvicorn itself gives a head all time."""
    for head in (b"", b"GET /health/li", b"GET /health/live HTTP/1.1\r\nHost: x\r\nX-A: "):
        with socket.create_connection(("127.0.0.1", base.port), timeout=20 * STALL + 5) as connection:
            connection.sendall(head)
            assert connection.recv(100) == b""
    with socket.create_connection(("127.0.0.1", base.port), timeout=20 * STALL + 5) as connection:
        for _ in range(2):  # a second one on the same connection
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            found = b""
            while not found.endswith(b'{"status":"live"}'):
                found += connection.recv(4096)
        connection.sendall(b"GET /health/li")
        assert connection.recv(100) == b""


def test_what_is_drawn_after_all_that_is_right(ask, base):
    answer = ask(posted({**SMALL, "seed": 5, "size": "64x64"}))
    assert answer[0] == 200
    picture = Image.open(io.BytesIO(base64.b64decode(json.loads(answer[2])["data"][0]["b64_json"])))
    expected = base.server.service.models.engines()[0].generate("x", steps=1, seed=5, width=64, height=64).images[0]
    assert np.array_equal(np.asarray(picture), np.asarray(expected))
