"""What others' batch runners and image readers were caught with, one line of a manifest each: refused by its line, nobody else
is stopped, no connection is made, and nothing is read or written outside."""

import io
import json
import pickle
import socket
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from stepforge.runtime.errors import RequestError
from stepforge.runtime.serve.manifest import Manifest


def png_that_claims(width: int, height: int) -> bytes:
    """Some bytes that decode to gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def picture(name: str, **more: object) -> list[dict]:
    """A job for each field that names a picture."""
    return [
        {"init": {"image": name, **more}},
        {"init": {"image": "good.png", "mask": name}},
        {"controls": {"name": "a", "image": name}},
        {"upscale": {"name": "nearest", "image": name}},
    ]


# fmt: off
ADVISORIES = {
    # SSRF through picture URLs: vLLM's batch runner and its fixes' bypasses, BentoML, Ray
    "CVE-2026-34753 CVE-2025-6242 CVE-2026-24779 CVE-2026-25960 CVE-2025-54381 CVE-2023-48023": [
        job
        for url in ("http://127.0.0.1:9/a.png", "http://[::1]/a.png", "//localhost/a.png", "file:///etc/hostname",
                    "ftp://127.0.0.1/a.png", "data:image/png;base64,iVBORw0KGgo=")
        for job in picture(url)
    ],
    # numbers that are allocated before they are checked: vLLM's `n`, Triton's overflows
    "CVE-2026-34756 CVE-2026-24173": [
        {"images": 10**9}, {"images": 65}, {"images": -1}, {"steps": 10**9}, {"steps": 2**63}, {"width": 2**31},
        {"width": 10**6, "height": 10**6}, {"height": -64}, {"seed": 2**64}, {"seed": -1}, {"guidance": [1.0] * 10**5},
        {"upscale": ["nearest"] * 8, "width": 512, "height": 512}, {"upscale": ["x4"] * 6, "width": 512, "height": 512},
        {"upscale": ["nearest"] * 1000}, {"adapters": {f"a{i}": 1.0 for i in range(1000)}}, {"timesteps": [1] * 10**5},
    ],
    # decoders: Pillow's FITS and GIF bombs, crafted pictures, serialised tensors
    "CVE-2026-40192 CVE-2026-42309 CVE-2022-45198 CVE-2026-22773 CVE-2025-62164": [
        job
        for name in ("bomb.png", "bomb.fits", "bomb.gif", "frames.webp", "cut.png", "tensor.npy", "tensor.pt", "empty.png")
        for job in picture(name)
    ],
    # names that become paths: ComfyUI and its extensions, Triton
    "CVE-2026-56671 CVE-2026-123790 CVE-2026-24208": [
        *({"id": name} for name in ("../x", "a/b", "a\\b", "%2e%2e", "\u2024\u2024", "a\0b", "-" * 101, "..", "\u202ex")),
        *picture("../secret.png"), *picture("link.png"), *picture("folder/../../secret.png"), *picture("good.png\0.txt"),
        *picture("loop.png"), *picture("."), *picture(""),
    ],
}
# fmt: on


def test_each_advisory_is_one_failed_line(batch, jobs, tmp_path, monkeypatch, files):
    def refuse(*_, **__):
        raise AssertionError("a connection")

    for name in ("connect", "connect_ex", "bind"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    folder = tmp_path / "in"
    folder.mkdir()
    good = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(good, "PNG")
    npy = io.BytesIO()
    np.save(npy, np.zeros(9))
    frames = io.BytesIO()
    two = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    two[0].save(frames, "WEBP", save_all=True, append_images=two[1:])
    gif = io.BytesIO()
    two[0].save(gif, "GIF")
    for name, data in {
        "good.png": good.getvalue(), "bomb.png": png_that_claims(100_000, 100_000), "cut.png": good.getvalue()[:40],
        "bomb.fits": b"SIMPLE  =                    T" + b" " * 2850, "bomb.gif": gif.getvalue(),
        "frames.webp": frames.getvalue(), "tensor.npy": npy.getvalue(), "tensor.pt": pickle.dumps({"a": 1}), "empty.png": b"",
        "../secret.png": good.getvalue(),
    }.items():  # fmt: skip
        (folder / name).write_bytes(data)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "loop.png").symlink_to("loop.png")
    rows = [(advisory, job) for advisory, each in ADVISORIES.items() for job in each]
    manifest = jobs({"prompt": "first"}, *({"prompt": "x", **job} for _, job in rows), {"prompt": "last"})
    moved = manifest.rename(folder / "jobs.jsonl")
    code, report, errors = batch(moved)
    assert code == 1
    failed = {json.loads(line)["line"]: json.loads(line) for line in (tmp_path / "out/failures.jsonl").open()}
    drawn = [job for line, job in enumerate(rows, 2) if line not in failed]
    assert not drawn
    assert (report["done"], report["failed"], report["left"]) == (2, len(rows), 0)
    assert all(line.isprintable() and len(line) < 1100 for line in errors)
    assert sorted(files(tmp_path / "out")) == [
        "00000000.png", f"{len(rows) + 1:08d}.png", "failures.jsonl", "images.jsonl",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["jobs.pkl", "jobs.npy", "jobs.jsonl.gz", "jobs", "jobs.json"])
def test_manifests_that_would_be_unpickled_or_unpacked_are_none(name, tmp_path):
    """BentoML CVE-2024-2912, CVE-2025-27520; ComfyUI CVE-2026-68771: data sets that run code when they are read."""
    (tmp_path / name).write_bytes(pickle.dumps([{"prompt": "x"}]))
    with pytest.raises(RequestError, match="is no manifest"):
        Manifest(tmp_path / name)
