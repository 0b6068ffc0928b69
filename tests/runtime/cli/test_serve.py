"""`stepforge serve`: what it refuses before it listens, and a bundle that cannot be opened."""

import socket
import subprocess
import sys

import pytest

from stepforge.runtime.cli.serving.serve import aliases, named
from stepforge.runtime.errors import RequestError

REFUSED = [
    (("fake", "--host", "0.0.0.0"), "--keys FILE, or --open"),
    (("fake", "fake"), "two models are named fake"),
    (("a b",), "NAME=BUNDLE"),
    (("fake", "--alias", "x=nope"), "--alias"),
    (("fake", "--keys", "missing"), "missing"),
    (("fake", "--ssl-certfile", "x"), "go together"),
    (("fake", "x=fake", "--adapter", "a.safetensors"), "one bundle"),
    (("fake", "--adapter", "a.safetensors:0.5"), "no strength"),
    (("fake", "--max-images", "65"), "max_images"),
    (("fake", "--queue-limit", "0"), "queue_limit"),
    (("fake", "--deadline", "nan"), "deadline is nan"),
    (("fake", "--deadline", "0"), "deadline is 0"),
    (("fake", "--max-memory", "5"), "max_memory is 5"),
    (("fake", "--max-rows", "1"), "--max-rows is 1"),
    (
        ("fake", "--ssl-certfile", "none.pem", "--ssl-keyfile", "a.safetensors"),
        "--ssl-certfile none.pem cannot be read",
    ),
    (
        ("fake", "--ssl-certfile", "a.safetensors", "--ssl-keyfile", "a.safetensors"),
        "are no PEM certificate and its key",
    ),
    (("fake", "--adapters", "missing"), "missing"),
    (("fake", "--allowed-host", "a.example:8443"), "has a port"),
    (("fake", "--port", "65536"), "less than or equal to 65535"),
]


def test_refused_in_one_line(refuse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.safetensors").touch()
    for arguments, said in REFUSED:
        assert said in refuse(2, "serve", *arguments)


def test_a_bundle_that_cannot_be_opened_ends_the_server(run, capsys, tmp_path):
    assert run("serve", tmp_path, "--port", "0") == 1
    assert "is not a bundle" in capsys.readouterr().err.splitlines()[-1]


def test_an_address_that_cannot_be_had(run, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert run("serve", "fake", "--port", taken.getsockname()[1]) == 1
    assert "cannot listen on 127.0.0.1, port" in capsys.readouterr().err.splitlines()[-1]


def test_the_extra_is_named():
    code = "import sys; sys.modules['uvicorn'] = None; from stepforge.runtime.cli.main import main; main(['serve', 'fake'])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (
        2,
        "stepforge: serve needs the package uvicorn; pip install 'stepforge[server]'\n",
    )


def test_names():
    assert named(["out/emoji.bundle", "x=other", "odd=name/b"]) == {
        "emoji": "out/emoji.bundle",
        "x": "other",
        "odd": "name/b",
    }
    assert aliases(["gpt-image-1=x"], {"x": ""}) == {"gpt-image-1": "x"}
    with pytest.raises(RequestError):
        aliases(["x=x"], {"x": ""})
