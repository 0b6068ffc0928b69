"""The server over real graphs: many clients at once, each with its own adapters, ControlNet and form of body."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import save_file
from starlette.testclient import TestClient

from stepforge import load
from stepforge.runtime.bundle import UNET
from stepforge.runtime.serve.http.app import create_app
from stepforge.runtime.serve.http.models import Model, Models
from stepforge.runtime.serve.http.service import Service
from stepforge.runtime.serve.http.settings import Settings

SMALL = {"prompt": "a cat", "size": "32x32", "steps": 4, "seed": 1}
ROUNDS = 1


def random_lora(bundle, file, seed):
    """A rank-2 LoRA of some attention projections, strong enough to be seen."""
    random = np.random.default_rng(seed)
    tensors = {}
    for module in bundle.components[UNET].modules:
        if module.path.endswith("to_q") or module.path.endswith("to_v"):
            out, wide = module.shape
            tensors[f"unet.{module.path}.lora_A.weight"] = random.normal(0, 1, (2, wide)).astype(np.float32)
            tensors[f"unet.{module.path}.lora_B.weight"] = random.normal(0, 1, (out, 2)).astype(np.float32)
    save_file(tensors, file)


@pytest.mark.slow
def test_clients_at_once_get_what_each_gets_alone(tiny_sd1_control_bundle, tmp_path, files):
    """No adapter of one client shows in the images of another: four sets of adapters take turns in three slots of the banks."""
    models = Models(
        {"tiny": Model("tiny", lambda: load(tiny_sd1_control_bundle, backend="openvino", precision="fp32", threads=1))},
        {},
    )
    service = Service(models, Settings(adapter_folder=tmp_path))
    with TestClient(create_app(service), base_url="http://localhost") as client:
        client.portal.call(models.load)
        ((_, engine),) = [models.find(None)]
        for seed, name in enumerate("abc"):
            random_lora(engine.bundle, tmp_path / f"{name}.safetensors", seed)
            assert client.post("/v1/adapters", json={"file": name}).status_code == 200
        hint = files.png((64, 64), fill=0, box=(16, 16, 48, 48))
        control = {"name": "a", "image": files.url(hint), "scale": 2.0}
        bodies = [
            {}, {"adapters": {"a": 1}}, {"adapters": {"b": 1}}, {"adapters": {"c": 1}}, {"adapters": {"a": 1, "b": -0.5}},
            {"controls": [control]}, {"controls": [control], "adapters": {"c": 1}},
        ]  # fmt: skip

        def draw(fields):
            answer = client.post("/v1/images/generations", json={**SMALL, **fields})
            assert answer.status_code == 200, answer.text
            return files.of(answer)[0].astype(int)

        alone = [draw(fields) for fields in bodies]
        for index, one in enumerate(alone):
            for other in alone[:index]:
                assert np.abs(one - other).max() > 8  # so that a leak would show
        with ThreadPoolExecutor(len(bodies)) as pool:
            together = list(pool.map(draw, ROUNDS * bodies))
        for index, picture in enumerate(together):
            # rows of other images in a call change roundings, 1e-5 of the range (tests/runtime/engine), at most one level
            assert np.abs(picture - alone[index % len(bodies)]).max() <= 1
        # the same as a form, with the ControlNet's picture as an upload
        form = {name: (None, str(value)) for name, value in SMALL.items()}
        form |= {
            "controls[0][name]": (None, "a"),
            "controls[0][scale]": (None, "2.0"),
            "controls[0][image]": ("hint", hint),
        }
        answer = client.post("/v1/images/generations", files={**form, "adapters[c]": (None, "1")})
        assert np.abs(files.of(answer)[0].astype(int) - alone[-1]).max() <= 1
        until = time.monotonic() + 10
        while service.under_way and time.monotonic() < until:
            time.sleep(0.01)
        assert service.held.bytes == 0
        engine.close()
