"""Hostile HTTP requests: what `gen_http.py` sends, as bytes."""

from __future__ import annotations

import base64
import io
import json
import random
from dataclasses import dataclass
from typing import Any

from mutate import NAMES, flipped, json_text, mutated, nudged
from PIL import Image

KEY = "0123456789abcdef0123"
STALL = 0.3  # seconds that the server lets a client stall


@dataclass(frozen=True, slots=True)
class Case:
    """Bytes in pieces, with a pause of `pause` seconds behind each. end: shut the sending side, as a client that is cut."""

    pieces: tuple[bytes, ...]
    pause: float = 0.0
    end: bool = False

    def __repr__(self) -> str:
        data = b"".join(self.pieces)
        return f"{len(data)} bytes in {len(self.pieces)}, pause {self.pause:g}, end {self.end}: {data[:1200]!r}"


def png(rng: random.Random, *, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    size = (rng.choice((1, 8, 64, 65)), rng.choice((1, 8, 64, 65)))
    Image.new(mode, size, rng.choice((0, 1, 128))).save(
        file, rng.choice(("PNG", "PNG", "WEBP", "JPEG") if mode == "RGB" else ("PNG",))
    )
    return file.getvalue()


def bomb(rng: random.Random) -> bytes:
    """A PNG whose header says how large it is, and little behind it."""
    data = bytearray(png(rng, mode="L"))
    data[16:24] = rng.choice((b"\0\0\xff\xff\0\0\xff\xff", b"\x7f\xff\xff\xff\x7f\xff\xff\xff", b"\0\0\0\0\0\0\0\1"))
    return bytes(data)


def image(rng: random.Random) -> bytes:
    match rng.randrange(8):
        case 0:
            return bomb(rng)
        case 1:
            return flipped(png(rng), rng)
        case 2:
            return rng.choice(
                (
                    b"",
                    b"GIF89a" + b"\0" * 40,
                    b"<svg xmlns='http://www.w3.org/2000/svg'/>",
                    b"BM" + b"\0" * 60,
                    b"%PDF-1.4",
                )
            )
        case 3:
            return png(rng, mode=rng.choice(("L", "LA", "RGBA", "P", "1", "I;16", "CMYK")[:6]))
        case _:
            return png(rng)


def data_url(rng: random.Random) -> str:
    text = base64.b64encode(image(rng)).decode()
    match rng.randrange(10):
        case 0:
            return rng.choice((
                "http://127.0.0.1:9/x.png", "https://localhost/x", "file:///etc/passwd", "/etc/passwd", "../outside/secret",
                "ftp://x/y", "data:,x", "data:text/html;base64,PGI+", "data:image/svg+xml;base64,AAAA", "gopher://127.0.0.1/",
            ))  # fmt: skip
        case 1:
            return (
                "data:image/png;base64,"
                + text[: rng.randrange(len(text) + 1)]
                + rng.choice(("", "=", "====", "*", " ", "\n"))
            )
        case 2:
            return "data:image/png;base64," + "A" * rng.choice((1, 4, 100_000, 900_000))
    return f"data:image/{rng.choice(('png', 'jpeg', 'webp', 'PNG', 'gif'))};base64,{text}"


def fields(rng: random.Random, *, edit: bool) -> dict[str, Any]:
    """A body that the server takes, of which a case changes one to three values."""
    found: dict[str, Any] = {"prompt": "a cat", "steps": rng.choice((1, 2)), "n": 1, "seed": rng.randrange(100)}
    more: dict[str, Any] = {
        "negative_prompt": "dog", "size": "64x64", "guidance": rng.choice((3, [3.0, 1.0], "linear(1..3)", "3@0-0.5,1@0.5-1")),
        "adapters": {"style": 1.0}, "upscale": [{"name": "nearest"}], "model": "fake", "quality": "low", "user": "me",
        "output_format": "webp", "output_compression": 80, "response_format": "b64_json", "sampler": "euler", "eta": 0.5,
        "controls": [{"name": "canny", "image": data_url(rng), "scale": [1.0, 0.5], "start": 0.0, "end": 1.0}],
        "stream": True, "partial_images": 1, "sigmas": [10.0, 1.0, 0.0], "priority": 0, "deadline": 5.0, "progress": True,
    }  # fmt: skip
    for name in rng.sample(sorted(more), rng.randrange(5)):
        found[name] = more[name]
    if edit:
        found["image"] = data_url(rng)
        if rng.random() < 0.3:
            found["mask"] = data_url(rng)
        if rng.random() < 0.5:
            found["strength"] = 0.6
    return found


def request(
    rng: random.Random | None,
    path: str,
    body: bytes,
    kind: str,
    *,
    method: str = "POST",
    more: tuple[tuple[str, str], ...] = (),
) -> bytes:
    """rng: now and then the key is wrong."""
    headers = [("Host", "localhost"), ("Content-Type", kind), ("Authorization", f"Bearer {KEY}"), *more]
    if rng is not None and rng.random() < 0.03:
        headers[2] = (
            "Authorization",
            rng.choice(("Bearer", "Bearer x", "Basic eDp5", "bearer \u00e9", "Bearer " + "k" * 5000)),
        )
    lines = [
        f"{method} {path} HTTP/1.1",
        *(f"{name}: {value}" for name, value in headers),
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body


def endpoint(rng: random.Random) -> tuple[str, bool]:
    edit = rng.random() < 0.4
    return f"/v1/images/{'edits' if edit else 'generations'}", edit


def as_json(rng: random.Random) -> Case:
    path, edit = endpoint(rng)
    value = fields(rng, edit=edit)
    change = rng.choices((mutated, nudged, lambda same, _: same), (5, 3, 2))[0]
    value = change(value, rng)
    data = json_text(value, rng) if rng.random() < 0.4 else json.dumps(value).encode(errors="surrogatepass")
    return Case((request(rng, path, data, "application/json"),))


def as_form(rng: random.Random) -> Case:
    """multipart/form-data, the way clients write it and otherwise."""
    path, edit = endpoint(rng)
    boundary = rng.choice(("b", "----x", "b" * 70, "b" * 3000, "'\"", "\u00e9", " ")) if rng.random() < 0.2 else "bound"
    parts = []
    value = fields(rng, edit=edit)
    value = rng.choices((mutated, nudged, lambda same, _: same), (4, 3, 3))[0](value, rng)
    pairs: list[tuple[str, Any]] = []
    for name, given in value.items() if isinstance(value, dict) else ():
        if isinstance(given, list):
            pairs += [(f"{name}[]", one) for one in given[:50]]
        elif isinstance(given, dict):
            pairs += [(f"{name}[{key}]", one) for key, one in given.items()]
        else:
            pairs.append((name, given))
    if rng.random() < 0.1:
        pairs += [
            (rng.choice(("a", "a[]", "a[b][c][d][e][f]", "adapters[" + "x" * 300 + "]", "a[99999999999]")), 1)
        ] * rng.choice((1, 600, 2000))
    for name, given in pairs:
        if name.startswith(("image", "mask")):
            filename = rng.choice(("x.png", "../../x.png", "/etc/passwd", "x\\y", "a" * 3000, *NAMES[:8]))
            more, data = (
                f'; filename="{filename}"\r\nContent-Type: {rng.choice(("image/png", "text/html", "x" * 300))}',
                image(rng),
            )
        else:
            more, data = "", (given if isinstance(given, str) else json.dumps(given)).encode(errors="replace")
        parts.append(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode(errors="replace")
            + data
        )
    body = b"\r\n".join([*parts, f"--{boundary}--\r\n".encode()])
    match rng.randrange(12):
        case 0:
            body = flipped(body, rng)
        case 1:
            body = (
                b"x" * rng.choice((10, 300_000)) + b"\r\n" + body + b"y" * rng.choice((10, 300_000))
            )  # CVE-2026-40347
        case 2:
            body = body.replace(
                b"Content-Disposition", b"X-Part: " + b"h" * 20_000 + b"\r\nContent-Disposition", 1
            )  # CVE-2026-42561
        case 3:
            body = body[: rng.randrange(len(body) + 1)]
    kind = f"multipart/form-data; boundary={boundary}"
    if rng.random() < 0.05:
        kind = rng.choice(
            (
                "multipart/form-data",
                "multipart/form-data; boundary=",
                "multipart/mixed; boundary=bound",
                kind + "; charset=utf-99",
            )
        )
    return Case((request(rng, path, body, kind),))


PATHS = (
    "/", "/page.js", "/page.css", "/health/live", "/health/ready", "/metrics", "/v1/models", "/v1/models/fake", "/v1/adapters",
    "/openapi.json", "/docs", "/redoc", "/favicon.ico", "/v1/images/variations", "/v1/images/generations", "/v1/adapters/style",
)  # fmt: skip
ESCAPES = (
    "../outside/secret", "..%2foutside%2fsecret", "%2e%2e/%2e%2e/etc/passwd", "..%5c..%5cx", "%00", "%0a%0dx", "%c0%ae%c0%ae/",
    "%ff%fe", "//etc/passwd", "a" * 6000, "%252e%252e%252f", ";/../..", "?x=" + "y" * 6000, "#", "%u002e", "\u2024\u2024/",
)  # fmt: skip


def as_path(rng: random.Random) -> Case:
    """Any path by any method; names of models and adapters that are none."""
    path = rng.choice(PATHS)
    if rng.random() < 0.6:
        path = rng.choice(("/v1/models/", "/v1/adapters/", "/", path + "/", "/v1/")) + rng.choice(ESCAPES)
    method = rng.choice(
        ("GET", "GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "get", "X" * 20)
    )
    more = [
        rng.choice((
            ("Range", "bytes=" + ",".join(f"{i}-" for i in range(rng.choice((1, 500))))),  # CVE-2025-62727
            ("Accept-Encoding", "gzip, br"), ("X-Forwarded-Host", "evil"), ("Origin", "https://evil.example"),
            ("X-Request-Id", rng.choice(("ok", "a b", "\x01", "x" * 65))), ("Sec-Fetch-Site", "cross-site"),
            ("Upgrade", "websocket"), ("Expect", "100-continue"),
            ("Cookie", "a=" + "b" * 3000), ("Content-Encoding", "gzip"), ("X-HTTP-Method-Override", "DELETE"),
        ))
    ]  # fmt: skip
    body = (
        b"" if method in ("GET", "HEAD") else json_text(mutated({"name": "style", "file": rng.choice(NAMES)}, rng), rng)
    )
    return Case((request(rng, path, body, "application/json", method=method, more=tuple(more)),))


def as_frames(rng: random.Random) -> Case:
    """HTTP's own framing: hosts, lengths, chunks, headers without end."""
    body = json.dumps({"prompt": "x", "steps": 1}).encode()
    headers = {
        "Host": "localhost",
        "Content-Type": "application/json",
        "Authorization": f"Bearer {KEY}",
        "Content-Length": str(len(body)),
    }
    target, pieces = "/v1/images/generations", (body,)
    match rng.randrange(9):
        case 0:  # CVE-2026-48710: a Host that moves the path of request.url
            headers["Host"] = rng.choice((
                "localhost/health/live?", "x/health/live#", "a@b/health/ready?x=", "[::1", "", "a b", "x:99999", "\u00e9",
                "evil, localhost", "localhost:80:80", "h" * 9000,
            ))  # fmt: skip
            headers["Authorization"] = rng.choice((headers["Authorization"], "Bearer no"))
        case 1:
            headers["Content-Length"] = rng.choice(
                ("-1", "+5", "1e3", "0x10", "99999999999999999999", "9" * 400, " 5", "5, 5", "", "\u0663")
            )
        case 2:  # CVE-2025-23310: many tiny chunks
            del headers["Content-Length"]
            headers["Transfer-Encoding"] = rng.choice(
                ("chunked", "chunked", "chunked, chunked", "gzip, chunked", "identity", "xchunked")
            )
            padded = body + b" " * rng.choice((0, 3000))
            pieces = (b"".join(b"1\r\n" + bytes([byte]) + b"\r\n" for byte in padded) + b"0\r\n\r\n",)
        case 3:
            del headers["Content-Length"]
            headers["Transfer-Encoding"] = "chunked"
            pieces = (
                rng.choice(
                    (
                        b"ffffffffffffffff\r\nx",
                        b"-1\r\nx\r\n",
                        b"zz\r\n",
                        b"5;ext=" + b"e" * 5000 + b"\r\nhello\r\n0\r\n\r\n",
                        b"0\r\nTrailer: x\r\n\r\n",
                    )
                ),
            )
        case 4:  # a body larger than the limit, in chunks that do not say so
            del headers["Content-Length"]
            headers["Transfer-Encoding"] = "chunked"
            pieces = (*(b"8000\r\n" + b" " * 0x8000 + b"\r\n" for _ in range(40)), b"0\r\n\r\n")
        case 5:
            headers["X-Big"] = "h" * rng.choice((1000, 60_000, 200_000))
        case 6:
            headers |= {f"X-{i}": "v" for i in range(rng.choice((50, 3000)))}
        case 7:
            headers["Content-Type"] = rng.choice(
                (
                    "",
                    "text/plain",
                    "application/xml",
                    "application/x-pickle",
                    "application/json; charset=utf-16",
                    "x" * 4000,
                )
            )
        case 8:
            target = rng.choice(
                (
                    "http://evil/v1/images/generations",
                    "*",
                    "//v1/images/generations",
                    "/v1/images/generations/",
                    "v1",
                    "/\x7f",
                )
            )
    head = f"POST {target} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    data = head.encode("latin-1", "replace")
    if rng.random() < 0.1:
        data = flipped(data, rng)
    return Case((data, *pieces), end=rng.random() < 0.1)


def as_slow(rng: random.Random) -> Case:
    """A body that stalls, trickles, or is cut."""
    whole = request(rng, "/v1/images/generations", json.dumps({"prompt": "x", "steps": 1}).encode(), "application/json")
    head, body = whole.split(b"\r\n\r\n", 1)
    match rng.randrange(3):
        case 0:
            return Case((head + b"\r\n\r\n", body[:5]), pause=2 * STALL)
        case 1:
            return Case((head + b"\r\n\r\n", *(bytes([byte]) for byte in body)), pause=0.06)
        case _:
            return Case((whole[: rng.randrange(len(whole))],), end=True)
