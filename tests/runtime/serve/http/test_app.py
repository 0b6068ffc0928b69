"""The application: what it answers, and that it answers nothing else."""

import asyncio
import functools
import hashlib
import json
import logging
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from stepforge import Engine
from stepforge.runtime.backends.fake import Fake, fake_bundle
from stepforge.runtime.serve.http.images.drawing import PIXEL
from stepforge.runtime.serve.http.images.fields import EDITS, GENERATIONS, OURS
from stepforge.runtime.serve.http.logs import Json
from stepforge.runtime.serve.http.schema import STATUSES

ALICE, ROOT = "alice-0123456789abcdef", "root-0123456789abcdef"
KEYS = [f"sha256:{hashlib.sha256(ALICE.encode()).hexdigest()} alice", f"{ROOT} root admin", "", "# a comment"]


def code(answer, status):
    """Code of an error, whose envelope is whole."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert "x-request-id" in answer.headers
    ((name, error),) = answer.json().items()
    assert name == "error"
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    assert not re.search(
        r"""(^|[\s'":])/(?!v1/|openapi.json|etc/passwd)""", error["message"]
    )  # no path of the server's
    return error["code"]


def test_images_are_the_engines_own(serving, files):
    running = serving()
    answer = running.draw(n=2, seed=5, guidance="linear(1..9)", negative_prompt="y", sampler="euler")
    assert answer.status_code == 200
    body = answer.json()
    with Engine(fake_bundle(64), Fake(fake_bundle(64))) as engine:
        result = engine.generate(
            "x", width=64, height=64, steps=4, images=2, seed=5, guidance="linear(1..9)", negative="y", sampler="euler"
        )
    for ours, theirs in zip(files.of(answer), result.images, strict=True):
        assert np.array_equal(ours, np.asarray(theirs))
    assert body["size"] == "64x64"
    assert body["output_format"] == "png"
    assert abs(body["created"] - time.time()) < 60
    assert body["stepforge"]["seeds"] == [5, 6]
    assert body["stepforge"]["request_id"] == answer.headers["x-request-id"]
    # without a seed each call draws another picture
    first, second = (files.of(running.draw())[0] for _ in range(2))
    assert not np.array_equal(first, second)


BAD_FIELDS = [
        ({"prompt": None}, "prompt"), ({"prompt": 3}, "prompt"), ({"prompt": "x" * 4001}, "4001 characters"),
        ({"prompt": "a\x00b"}, "NUL"), ({"negative_prompt": ["x"]}, "negative"), ({"n": 0}, "n is 0"), ({"n": 11}, "n is 11"),
        ({"n": 2.0}, "n is 2.0"), ({"n": True}, "n is True"), ({"n": "2"}, "n is '2'"), ({"size": "64X64"}, "size"),
        ({"size": "63x64"}, "multiple"), ({"size": "99999x99999"}, "width"), ({"size": "4096x4096"}, "16777216"),
        ({"width": 64}, "size"), ({"steps": 0}, "steps"), ({"steps": 151}, "150"), ({"quality": "best"}, "quality"),
        ({"steps": None, "timesteps": list(range(999, 800, -1))}, "timesteps"), ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"guidance": "7.5@"}, "guidance"), ({"guidance": [1, 2]}, "guidance"), ({"sampler": "eulre"}, "sampler"),
        ({"response_format": "url"}, "response_format"), ({"background": "transparent"}, "background"),
        ({"output_format": "gif"}, "output_format"), ({"output_compression": 50}, "output_compression"),
        ({"partial_images": 4}, "partial_images"), ({"stream": "yes"}, "stream"), ({"user": "u" * 600}, "user"),
        ({"style": "gothic"}, "style"), ({"svg": True}, "svg"), ({"stepz": 5}, "do you mean steps"), ({"images": 2}, "images"),
        ({"init": {"image": "/etc/passwd"}}, "edits"), ({"image": "/etc/passwd"}, "image"), ({"deadline": 601}, "deadline"),
        ({"deadline": 0}, "deadline"), ({"priority": 11}, "priority"), ({"adapters": {"a": 1}}, "no adapter named 'a'"),
        ({"adapters": ["a"]}, "adapters"), ({"preset": "none"}, "preset"),
        ({"controls": [{"name": "a"}]}, "controls[0][image]"),
        ({"controls": ["a"]}, "controls[0]"), ({"upscale": "x9"}, "x9"), ({"upscale": [{"name": "x2", "steps": 999}]}, "steps"),
        ({"upscale": ["x4", "x4", "x4"]}, "pixels"), ({"negative": "a", "negative_prompt": "b"}, "negative"),
]  # fmt: skip


def test_bad_values_are_400_with_their_names(serving):
    running = serving()
    for fields, said in BAD_FIELDS:
        answer = running.draw(**fields)
        assert code(answer, 400)
        assert said in answer.json()["error"]["message"]
    for fields, name in (
        ({"n": 0}, "n"),
        ({"stream": 1}, "stream"),
        ({"size": "1x1"}, "size"),
        ({"progress": True}, "progress"),
    ):
        assert running.draw(**fields).json()["error"]["param"] == name
    assert not running.backends["fake"].calls


SOURCES = [
    "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/x.png", "data:image/svg+xml;base64,AAAA", "data:image/png;base64,A",
    "data:image/png;base64,AAAA", "data:text/plain;base64,AAAA", "", 5, {"file_id": "f"}, "picture.png",
    "data:image/png,AAAA",
]  # fmt: skip


def test_pictures_are_bytes_and_nothing_else(serving, tmp_path, monkeypatch, files):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picture.png").write_bytes(files.png())
    running = serving()
    good = files.url(files.png())
    for source in SOURCES:
        for answer in (
            running.draw(controls=[{"name": "c", "image": source}]),
            running.draw(upscale=[{"name": "x2", "image": source}]),
            running.draw("edits", image=source),
            running.draw("edits", images=[{"image_url": source}]),
            running.draw("edits", image=good, mask=source),
        ):
            assert code(answer, 400) == "invalid_image"


def part(header, text="x"):
    return f"--b\r\nContent-Disposition: form-data{header}\r\n\r\n{text}\r\n".encode()


BAD_JSON = [
    b'{"prompt": "x", "n": NaN}', b'{"prompt": "x", "n": Infinity}', b'{"prompt": "x", "guidance": 1e400}', b"[]", b"",
    b'{"prompt": "\\ud800"}', b'{"prompt": "x", "prompt": "y"}', b'{"prompt": "x"', b"[" * 100_000, b"\xff\xfe",
    b'{"n": ' + b"9" * 5000 + b"}", '{"prompt": "x"}'.encode("utf-16"),
]  # fmt: skip
FORM = "multipart/form-data; boundary=b"
BAD_FORMS = [
    (b"nothing", "multipart/form-data", "invalid_form"),
    (part("") + b"--b--", FORM, "invalid_form"),
    (part('; name="a[b"') + b"--b--", FORM, "invalid_form"),
    (part('; name="a[1][2][3][4][5]"') + b"--b--", FORM, "invalid_form"),
    (part('; name="a[99999]"') + b"--b--", FORM, "invalid_form"),
    (part('; name="n"', "{") + b"--b--", FORM, "invalid_value"),
    (2 * part('; name="prompt"') + b"--b--", FORM, "invalid_form"),
    (part('; name="prompt"') + part('; name="prompt[a]"') + b"--b--", FORM, "invalid_form"),
    (b"".join(part(f'; name="f{i}"') for i in range(501)) + b"--b--", FORM, "invalid_form"),
]


def test_bodies_that_cannot_be_read(serving):
    running = serving()
    for body in BAD_JSON:
        assert code(running.post(content=body, headers={"content-type": "application/json"}), 400) == "invalid_json"
    for body, kind, said in BAD_FORMS:
        assert code(running.post(content=body, headers={"content-type": kind}), 400) == said
    for kind in ("application/x-www-form-urlencoded", "text/plain", ""):
        answer = running.post(content=b'{"prompt": "x"}', headers={"content-type": kind})
        assert code(answer, 415) == "unsupported_media_type"


def test_paths_methods_and_headers(serving):
    client = serving(max_body=2048).client
    assert code(client.get("/nope"), 404) == "not_found"
    refused = client.get("/v1/images/generations")
    assert code(refused, 405) == "method_not_allowed"
    assert refused.headers["allow"] == "POST"
    assert code(client.get("/v1/models/nope"), 404) == "model_not_found"
    assert code(client.post("/v1/images/generations", json={"prompt": "x" * 3000}), 413) == "request_too_large"
    chunks = client.post(
        "/v1/images/generations", content=iter([b"x" * 1000] * 3), headers={"content-type": "application/json"}
    )
    assert code(chunks, 413) == "request_too_large"
    assert code(client.get("/v1/models", headers={"content-length": "many"}), 400) == "invalid_header"
    assert client.get("/v1/models", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = client.get("/v1/models", headers={"x-request-id": "no good"}).headers["x-request-id"]
    assert len(made) == 32
    assert (
        code(client.post("/v1/images/generations", json={}, headers={"sec-fetch-site": "cross-site"}), 403)
        == "cross_site"
    )


def test_hosts(serving):
    client = serving(hosts=frozenset({"localhost", "[::1]"})).client
    assert client.get("/v1/models", headers={"host": "LOCALHOST:80"}).status_code == 200
    assert client.get("/v1/models", headers={"host": "[::1]:80"}).status_code == 200
    for host in ("evil.example", "localhost.evil.example", "evil/health/live", ""):
        assert code(client.get("/v1/models", headers={"host": host}), 403) == "host_refused"
    assert client.get("/health/live", headers={"host": "10.0.0.7"}).status_code == 200  # a probe's


def test_models_by_name(serving):
    running = serving(names=("one", "two"), aliases={"gpt-image-1": "two"})
    listed = running.client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [entry["id"] for entry in listed["data"]] == ["one", "two"]
    assert {"id", "object", "created", "owned_by"} <= listed["data"][0].keys()
    assert running.client.get("/v1/models/two").json() == listed["data"][1]
    for asked, model in ((None, "one"), ("one", "one"), ("two", "two"), ("gpt-image-1", "two")):
        assert running.draw(model=asked).json()["stepforge"]["model"] == model
    answer = running.draw(model="gpt-image-2")
    assert code(answer, 404) == "model_not_found"
    assert "one, two, gpt-image-1" in answer.json()["error"]["message"]


def test_keys(serving, tmp_path, adapter_folder):
    running = serving(keys=KEYS, adapter_folder=adapter_folder, page=False)
    client = running.client
    body = {"prompt": "x", "size": "64x64", "steps": 2}
    doors = [
        "/v1/models",
        "/metrics",
        "/openapi.json",
        "/nope",
        "/",
        "/health",
        "/health/live/",
        "/health/../metrics",
        "//health/live",
    ]
    for path in doors:
        answer = client.get(path)
        assert code(answer, 401) == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/health/live", "/health/ready"):
        assert client.get(path).status_code == 200
    for header in (
        "Bearer nope",
        "Basic " + ALICE,
        ALICE,
        "Bearer ",
        "Bearer \xff\xfe",
        f"Bearer {ALICE}x",
        "Bearer " + "x" * 10_000,
    ):
        assert client.get("/v1/models", headers={"authorization": header.encode("latin-1")}).status_code == 401
    for headers in ({"authorization": f"Bearer {ALICE}"}, {"authorization": f"bearer {ROOT}"}, {"api-key": ALICE}):
        assert client.post("/v1/images/generations", json=body, headers=headers).status_code == 200
    alice, root = ({"authorization": f"Bearer {key}"} for key in (ALICE, ROOT))
    assert code(client.post("/v1/adapters", json={"file": "good"}, headers=alice), 403) == "admin_only"
    assert code(client.delete("/v1/adapters/good", headers=alice), 403) == "admin_only"
    assert code(client.post("/v1/images/generations", json={**body, "priority": 1}, headers=alice), 403) == "admin_only"
    assert client.post("/v1/images/generations", json={**body, "priority": 1}, headers=root).status_code == 200
    assert "available" not in client.get("/v1/adapters", headers=alice).json()
    assert client.post("/v1/adapters", json={"file": "good"}, headers=root).status_code == 200
    (tmp_path / "keys").write_text("another-0123456789abcdef")  # what SIGHUP does
    running.service.keys.reload()
    assert client.get("/v1/models", headers=alice).status_code == 401
    (tmp_path / "keys").write_text("short")
    running.service.keys.reload()
    assert client.get("/v1/models", headers={"api-key": "another-0123456789abcdef"}).status_code == 200


def test_adapters(serving, adapter_folder):
    running = serving(adapter_folder=adapter_folder, max_adapters=2)
    client = running.client
    found = ["good.safetensors", "other.safetensors", "peft", "wide.safetensors"]
    assert client.get("/v1/adapters").json()["available"] == found
    assert client.post("/v1/adapters", json={"file": "good"}).json() | {"sha256": ""} == {
        "id": "good", "object": "adapter", "model": "fake", "file": "good.safetensors", "sha256": "", "layers": 1, "refused": 0,
    }  # fmt: skip
    assert code(client.post("/v1/adapters", json={"file": "good"}), 400) == "adapter_refused"  # the name is taken
    assert (
        client.post("/v1/adapters", json={"file": "good.safetensors", "name": "b", "model": "fake"}).status_code == 200
    )
    assert code(client.post("/v1/adapters", json={"file": "other"}), 400) == "too_many_adapters"
    assert [entry["id"] for entry in client.get("/v1/adapters?model=fake").json()["data"]] == ["good", "b"]
    assert client.get("/v1/models/fake").json()["stepforge"]["adapters"] == ["good", "b"]
    assert running.draw(adapters={"good": 0.5, "b": -1}).status_code == 200
    form = {"prompt": (None, "x"), "size": (None, "64x64"), "adapters[good]": (None, "0.5")}
    assert running.post(files=form).status_code == 200
    assert client.delete("/v1/adapters/b").json()["deleted"] is True
    assert code(client.delete("/v1/adapters/b"), 404) == "adapter_not_found"
    assert code(running.draw(adapters={"b": 1}), 400) == "invalid_value"
    assert code(client.post("/v1/adapters", json={"file": "wide"}), 400) == "adapter_refused"
    for file in ("link", "link.safetensors", "leads-out", "notes.txt", "nope"):
        assert code(client.post("/v1/adapters", json={"file": file}), 404) == "adapter_not_found"
    for file in ("../secret", "/etc/passwd", "..", ".", "", "a/../good", "good\x00", "%2e%2e", 5, None, "g" * 200):
        assert code(client.post("/v1/adapters", json={"file": file}), 400) == "invalid_value"
    assert code(client.post("/v1/adapters", json={"file": "good", "path": "x"}), 400) == "unknown_parameter"
    assert code(client.post("/v1/adapters", json={"file": "good", "name": "<b>"}), 400) == "invalid_value"
    assert code(client.get("/v1/adapters?model=nope"), 404) == "model_not_found"
    assert code(serving().client.post("/v1/adapters", json={"file": "good"}), 403) == "adapters_disabled"


def test_edits(serving, files):
    running = serving()
    image = files.png(fill=(255, 0, 0))
    form = {"prompt": (None, "x"), "steps": (None, "4"), "seed": (None, "3"), "strength": (None, "0.5")}
    first = running.post("edits", files={**form, "image": ("../../x.png", image, "text/plain")})
    second = running.post("edits", files={**form, "image[]": ("upload", image)})
    third = running.draw("edits", steps=4, seed=3, strength=0.5, images=[{"image_url": files.url(image)}])
    fourth = running.draw("edits", steps=4, seed=3, strength=0.5, image=files.url(image))
    assert first.json()["stepforge"]["mode"] == "img2img"
    for other in (second, third, fourth):
        assert np.array_equal(files.of(first)[0], files.of(other)[0])
    assert files.of(first)[0].shape == (64, 64, 3)  # the image's own size
    # a mask: what is transparent is drawn anew; or what is white, as A1111 has it
    clear = files.png(mode="RGBA", fill=(0, 0, 0, 0), box=(0, 0, 32, 64))  # opaque left half
    white = files.png(mode="L", fill=0, box=(32, 0, 64, 64))
    base = {"steps": 4, "seed": 3, "image": files.url(image), "overlay": True}
    by_alpha = running.draw("edits", **base, mask={"image_url": files.url(clear)})
    by_white = running.draw("edits", **base, mask=files.url(white), mask_mode="white")
    assert by_alpha.json()["stepforge"]["mode"] == "inpaint"
    (picture,) = files.of(by_alpha)
    assert np.array_equal(picture, files.of(by_white)[0])
    assert (picture[:, :32] == (255, 0, 0)).all()
    assert not (picture[:, 32:] == (255, 0, 0)).all()
    assert code(running.draw("edits", **base, mask=files.url(white)), 400) == "invalid_image"  # no transparent part
    small = files.url(files.png((32, 32), "RGBA", (0, 0, 0, 0)))
    assert code(running.draw("edits", **base, mask=small), 400) == "invalid_image"
    assert (
        code(running.post("edits", files=[*form.items(), ("image[]", ("a", image)), ("image[]", ("b", image))]), 400)
        == "too_many_images"
    )
    assert code(running.draw("edits"), 400) == "missing_required_parameter"
    assert code(running.draw("edits", image=files.url(files.png((5000, 1)))), 400) == "invalid_image"
    assert code(running.draw("edits", image=files.url(files.png((4096, 2048), "1", 0))), 400) == "invalid_value"


def test_upscaling_and_formats(serving, files):
    running = serving()
    answer = running.draw(upscale=["nearest"], output_format="webp", output_compression=80)
    assert answer.json()["size"] == "128x128"
    assert files.opened(answer.json()["data"][0]["b64_json"]).format == "WEBP"
    given = running.draw(
        upscale=[{"name": "nearest", "image": files.url(files.png((32, 32), fill=(9, 8, 7)))}], size="auto"
    )
    assert (files.of(given)[0] == (9, 8, 7)).all()
    uploaded = running.post(
        files={
            "prompt": (None, ""),
            "upscale[][name]": (None, "nearest"),
            "upscale[][image]": ("u", files.png((32, 32), fill=(9, 8, 7))),
        }
    )
    assert np.array_equal(files.of(given)[0], files.of(uploaded)[0])
    assert running.draw(quality="low", steps=None).json()["stepforge"]["steps"] == 12
    assert running.draw(steps=None).json()["quality"] == "medium"


def events(answer):
    found = []
    for frame in answer.text.strip().split("\n\n"):
        kind, data = frame.split("\n")
        values = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {values['type']}"
        found.append(values)
    return found


def test_streams(serving, files):
    running = serving()
    whole = running.draw(n=2, seed=7, steps=12)
    answer = running.draw(n=2, seed=7, steps=12, stream=True, partial_images=2, progress=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer)
    done = [event for event in found if event["type"] == "image_generation.completed"]
    assert [event["stepforge"]["seed"] for event in done] == [7, 8]
    for event, picture in zip(done, files.of(whole), strict=True):
        assert np.array_equal(np.asarray(files.opened(event["b64_json"])), picture)
        assert event["size"] == "64x64"
    steps = [event["stepforge"] for event in found if event["type"] == "image_generation.progress"]
    assert [step["step"] for step in steps if step["image"] == 0] == list(range(1, 13))
    assert {step["steps"] for step in steps} == {12}
    partials = [event for event in found if event["type"] == "image_generation.partial_image"]
    assert len(partials) <= 4
    for event in partials:
        size = files.opened(event["b64_json"]).size
        assert event["size"] == f"{size[0]}x{size[1]}"
        assert event["stepforge"]["step"] == 4 * (event["partial_image_index"] + 1)
    plain = events(running.draw(stream=True))
    assert [event["type"] for event in plain] == ["image_generation.completed"]
    edit = running.draw("edits", image=files.url(files.png()), stream=True)
    assert [event["type"] for event in events(edit)] == ["image_edit.completed"]
    assert code(running.draw(stream=True, steps=0), 400)  # told by the status, before the stream


def test_full_queue_deadline_and_drain(serving):
    running = serving(queue_limit=1)
    gate = running.backends["fake"].gate
    gate.clear()
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(running.draw, n=2)
        wait_for(lambda: running.service.under_way == 1 and running.backends["fake"].calls)
        second = pool.submit(running.draw)
        wait_for(lambda: running.service.under_way == 2)
        full = running.draw()  # by the engine
        assert code(full, 429) == "queue_full"
        assert 1 <= int(full.headers["retry-after"]) <= 120
        running.service._most = 2
        assert code(running.draw(steps=0), 429) == "queue_full"  # before its body is read
        assert running.client.get("/health/ready").status_code == 200
        running.service.models.phase = "draining"
        late = running.draw()
        assert code(late, 503) == "draining"
        assert "retry-after" in late.headers
        assert running.client.get("/health/ready").status_code == 503
        assert running.client.get("/health/live").status_code == 200
        gate.set()
        assert first.result().status_code == second.result().status_code == 200
        running.service.models.phase = "ready"
        gate.clear()
        for options in ({}, {"stream": True}):
            timer = threading.Timer(0.3, gate.set)
            timer.start()
            answer = running.draw(deadline=0.05, steps=100, **options)
            timer.join()
            if options:
                assert events(answer)[-1]["error"]["code"] == "deadline_exceeded"
            else:
                assert code(answer, 504) == "deadline_exceeded"
                assert answer.headers["x-should-retry"] == "false"
            gate.clear()
        gate.set()


def wait_for(ready, seconds=20):
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_failures_tell_nothing_of_the_inside(serving, monkeypatch, caplog):
    running = serving()

    def fail(*_, **__):
        raise RuntimeError("/secret/path of the server")

    with monkeypatch.context() as patch:
        patch.setattr("stepforge.runtime.engine.denoise.Denoisers.__call__", fail)
        answer = running.draw()
        assert code(answer, 500) == "generation_failed"
        assert "secret" not in answer.text
        assert events(running.draw(stream=True))[0]["error"]["code"] == "generation_failed"
    assert running.draw().status_code == 200
    with monkeypatch.context() as patch:
        patch.setattr("stepforge.runtime.serve.http.images.drawing.read_fields", fail)
        answer = running.draw()
        assert code(answer, 500) == "internal_error"
        assert answer.headers["x-should-retry"] == "false"
        assert "secret" not in answer.text
    assert "/secret/path" in caplog.text  # the log knows


def test_bodies_and_images_share_a_memory_budget(serving):
    image = 64 * 64 * PIXEL
    running = serving(max_body=4096, max_memory=image + 4096)
    body = json.dumps({"prompt": "x", "size": "64x64", "steps": 2}) + " " * 3000
    headers = {"content-type": "application/json"}
    gate = running.backends["fake"].gate
    gate.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(running.post, content=body, headers=headers)
        wait_for(lambda: running.backends["fake"].calls)
        assert code(running.post(content=body, headers=headers), 429) == "busy"  # no room for its body
        assert code(running.draw(), 429) == "busy"  # ... for its image
        gate.set()
        assert first.result().status_code == 200
    assert running.post(content=body, headers=headers).status_code == 200
    assert running.service.held.bytes == 0


def test_logs_metrics_and_description(serving, caplog):
    caplog.set_level(logging.INFO, "stepforge")
    running = serving()
    running.draw(n=2, prompt="a secret\nprompt")
    running.draw(steps=0)
    running.client.get("/nope%0aforged")
    lines = [json.loads(Json().format(record)) for record in caplog.records if record.getMessage() == "request"]
    drawn, refused, lost = lines[-3:]
    assert (drawn["route"], drawn["status"], drawn["n"], drawn["model"]) == ("/v1/images/generations", 200, 2, "fake")
    assert drawn["parts"]["denoise"] >= 0
    assert (refused["status"], refused["error"]) == (400, "invalid_value")
    assert (lost["status"], lost["route"]) == (404, "none")
    assert "secret" not in "".join(map(json.dumps, lines))
    text = running.client.get("/metrics").text
    for line in (
        'stepforge_requests_total{outcome="ok",route="/v1/images/generations"} 1.0',
        'stepforge_requests_total{outcome="invalid",route="/v1/images/generations"} 1.0',
        'stepforge_images_total{model="fake"} 2.0', "stepforge_ready 1.0", 'stepforge_requests_waiting{model="fake"} 0.0',
        'stepforge_queue_wait_seconds_count{model="fake"} 1.0',
        'stepforge_step_duration_seconds_count{model="fake",stage="base"} 1.0',
    ):  # fmt: skip
        assert line in text
    described = running.client.get("/openapi.json").json()
    assert set(described["paths"]["/v1/images/edits"]["post"]["responses"]) == {"200", *map(str, STATUSES)}
    for route in ("/v1/adapters", "/health/ready", "/metrics"):
        assert route in described["paths"]
    page = (Path(__file__).parents[4] / "docs" / "serving.md").read_text(encoding="utf-8")
    for name in (*GENERATIONS, *EDITS, *OURS):
        assert f"`{name}`" in page or f"`{name}:" in page, name


def test_an_engine_that_ended_by_itself(serving):
    running = serving()
    running.service.models.engines()[0].close()
    assert code(running.draw(), 503) == "failed"
    for path in ("/health/live", "/health/ready"):  # to be started anew
        assert running.client.get(path).json() == {"status": "failed"}


def test_silent_streams_send_comments(serving, monkeypatch):
    monkeypatch.setattr("stepforge.runtime.serve.http.images.events.HEARTBEAT", 0.02)
    running = serving()
    gate = running.backends["fake"].gate
    gate.clear()
    timer = threading.Timer(0.2, gate.set)
    timer.start()
    text = running.draw(stream=True).text
    timer.join()
    assert text.startswith(": waiting\n\n: waiting\n\n")
    assert text.count("event: image_generation.completed\n") == 1


class Raw:
    """One call of an application as the messages of its client say; `send` never returns where it is stalled."""

    def __init__(self, messages, *, stalled=False):
        self.messages, self.stalled, self.sent = list(messages), stalled, []

    async def receive(self):
        if self.messages:
            return self.messages.pop(0)
        await asyncio.Event().wait()

    async def send(self, message):
        self.sent.append(message)
        if self.stalled and message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def __call__(self, app, **headers):
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {
            "type": "http", "method": "POST", "path": "/v1/images/generations", "raw_path": b"", "headers": raw,
            "root_path": "", "query_string": b"", "scheme": "http", "http_version": "1.1", "asgi": {"version": "3.0"},
        }  # fmt: skip
        await app(scope, self.receive, self.send)


def test_clients_that_stall(serving, caplog):
    """Bodies that do not come, answers that are not read: neither holds memory for longer than `stall_seconds`."""
    caplog.set_level(logging.INFO, "stepforge")
    running = serving(stall_seconds=0.2)
    body = json.dumps({"prompt": "x", "size": "64x64", "steps": 2}).encode()
    kind = {"content_type": "application/json"}
    piece = {"type": "http.request", "body": body[:9], "more_body": True}
    slow = Raw([piece])
    running.client.portal.call(functools.partial(slow, running.client.app, content_length=str(len(body)), **kind))
    start, *rest = slow.sent
    assert start["status"] == 408
    assert (b"connection", b"close") in start["headers"]
    assert json.loads(rest[0]["body"])["error"]["code"] == "body_timeout"
    deaf = Raw([{"type": "http.request", "body": body}], stalled=True)
    running.client.portal.call(functools.partial(deaf, running.client.app, content_length=str(len(body)), **kind))
    gone = Raw([piece, {"type": "http.disconnect"}])
    running.client.portal.call(functools.partial(gone, running.client.app, content_length=str(len(body)), **kind))
    assert not gone.sent
    statuses = [record.facts["status"] for record in caplog.records if record.getMessage() == "request"]
    assert statuses[-3:] == [408, 499, 499]
    assert running.service.under_way == running.service.held.bytes == 0
