"""A server in this process: the fake model, which draws what its steps say, behind the whole application."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from starlette.testclient import TestClient

from stepforge.runtime.backends.fake import Fake, fake_bundle
from stepforge.runtime.bundle import UNET, Bank, Module
from stepforge.runtime.engine import Engine
from stepforge.runtime.serve.http.app import create_app
from stepforge.runtime.serve.http.keys import Keys
from stepforge.runtime.serve.http.models import Model, Models
from stepforge.runtime.serve.http.service import Service
from stepforge.runtime.serve.http.settings import Settings

SMALL = {"size": "64x64", "steps": 4}


class Gated(Fake):
    """Denoises while its gate is open."""

    def __init__(self, bundle: Any) -> None:
        super().__init__(bundle)
        self.gate = threading.Event()
        self.gate.set()
        self.calls = 0

    def open(self, component: Any, banks: Any = None) -> Any:
        graph = super().open(component, banks)

        def run(inputs: Any) -> Any:
            self.calls += component.role == "denoiser"
            assert self.gate.wait(30)
            return graph(inputs)

        return run if component.role == "denoiser" else graph


def fake_with_banks() -> Any:
    """The fake bundle with a LoRA bank over one layer, which its denoiser does not read."""
    bundle = fake_bundle(64)
    layer = replace(
        bundle.components[UNET], modules=(Module("a", "linear", (8, 8), False),), bank=Bank(3, 4, {"a": ("a",)})
    )
    return replace(bundle, components={**bundle.components, UNET: layer})


class Running:
    """A service and a client of it. backends: of its models, by name."""

    def __init__(self, client: TestClient, service: Service, backends: dict[str, Gated]) -> None:
        self.client, self.service, self.backends = client, service, backends

    def post(self, path: str = "generations", **options: Any) -> Any:
        return self.client.post(f"/v1/images/{path}", **options)

    def draw(self, path: str = "generations", **fields: Any) -> Any:
        """An answer to JSON, of a small picture unless it says otherwise."""
        return self.post(path, json={"prompt": "x", **({} if path == "edits" else SMALL), **fields})


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Start a service: `serving(queue_limit=1)`; names: of its models; keys: lines of a key file."""
    with ExitStack() as stack:

        def start(*, names: tuple[str, ...] = ("fake",), keys: list[str] | None = None, **settings: Any) -> Running:
            chosen = Settings(**settings)
            bundle = fake_with_banks()
            backends = {name: Gated(bundle) for name in names}

            def loader(name: str) -> Callable[[], Engine]:
                return lambda: Engine(bundle, backends[name], queue_limit=chosen.queue_limit)

            models = Models({name: Model(name, loader(name)) for name in names}, chosen.aliases)
            file = tmp_path / "keys"
            if keys is not None:
                file.write_text("\n".join(keys))
            service = Service(models, chosen, None if keys is None else Keys(file))
            client = stack.enter_context(
                TestClient(create_app(service), base_url="http://localhost", raise_server_exceptions=False)
            )
            assert client.get("/health/ready").status_code == 503
            client.portal.call(models.load)
            stack.callback(lambda: [engine.close() for engine in models.engines()])
            stack.callback(lambda: [backend.gate.set() for backend in backends.values()])
            return Running(client, service, backends)

        yield start


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Path:
    """Two LoRA files that fit the fake bundle, one that does not, and links out of the folder."""
    folder = tmp_path / "adapters"
    folder.mkdir()
    for name, width in (("good", 8), ("other", 8), ("wide", 16)):
        pair = {
            "unet.a.lora_A.weight": np.ones((2, width), np.float32),
            "unet.a.lora_B.weight": np.ones((8, 2), np.float32),
        }
        save_file(pair, folder / f"{name}.safetensors")
    (folder / "peft").mkdir()
    save_file(pair, folder / "peft" / "adapter_model.safetensors")
    (folder / "leads-out").mkdir()
    save_file(pair, tmp_path / "secret.safetensors")
    (folder / "leads-out" / "adapter_model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "notes.txt").write_text("no adapter")
    return folder


class Files:
    """Files of pictures, and pictures of answers."""

    @staticmethod
    def png(
        size: tuple[int, int] = (64, 64), mode: str = "RGB", fill: Any = 128, box: Any = None, kind: str = "PNG"
    ) -> bytes:
        """box: a rectangle that is white, or opaque."""
        image = Image.new(mode, size, fill)
        if box is not None:
            image.paste(255 if mode == "L" else (255,) * len(mode), box)
        buffer = io.BytesIO()
        image.save(buffer, kind)
        return buffer.getvalue()

    @staticmethod
    def url(data: bytes, kind: str = "png") -> str:
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

    @staticmethod
    def opened(text: str) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(text)))

    @classmethod
    def of(cls, answer: Any) -> list[np.ndarray]:
        """The pictures of an answer, [h, w, 3]."""
        return [np.asarray(cls.opened(entry["b64_json"])) for entry in answer.json()["data"]]


@pytest.fixture(scope="session")
def files() -> type[Files]:
    return Files
