"""Whole steps in the TensorRT backend, against a stand-in (stub.py): what the host computes step by step."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import stub

from stepforge import Control, Request, load
from stepforge.runtime.backends.tensorrt import loop
from stepforge.runtime.bundle import read

pytestmark = pytest.mark.slow  # the quick lane has three minutes

ASK = {"prompt": "cat", "steps": 3, "sampler": "ddim", "guidance": 3.0, "width": 32, "height": 32}


def hint(seed):
    return np.random.RandomState(seed).randint(0, 256, (64, 64, 3), np.uint8)


@pytest.fixture
def counted(monkeypatch):
    found = []
    for name in ("put", "step", "get"):
        plain = getattr(loop.TensorRtLoop, name)

        def call(self, *arguments, name=name, plain=plain):
            found.append(name)
            return plain(self, *arguments)

        monkeypatch.setattr(loop.TensorRtLoop, name, call)
    return found


def test_a_loop_draws_what_the_host_draws(tiny_sd1_control_bundle, tmp_path, monkeypatch, counted):
    """ControlNets on some rows, on none, two of them, and one twice; fresh noise; more rows than a plan holds, so that calls
    run in parts; more images and steps than there is room for at first."""
    stub.install(monkeypatch, tmp_path)
    monkeypatch.setattr(loop, "PLACES", 1)
    monkeypatch.setattr(loop, "STEPS", 2)
    bundle = read(tiny_sd1_control_bundle)
    nets = sorted(bundle.controls)
    first, last = nets[0], nets[-1]
    requests = [
        Request(**ASK, controls=(Control(name=first, image=hint(1)),)),
        Request(**{**ASK, "steps": 5, "sampler": "dpmpp_2m"}, controls=(Control(name=first, image=hint(2), scale=0.5),
                                                                        Control(name=last, image=hint(3)))),
        Request(**{**ASK, "sampler": "euler_a"}, seed=3),
        Request(**ASK, controls=(Control(name=last, image=hint(4), guess_mode=True),)),
        Request(**ASK, controls=tuple(Control(name=first, image=hint(5 + i), start=i / 2) for i in range(2))),
    ]  # fmt: skip
    stub.build(bundle, rows=("1..2", "3..4"), size="32")
    with load(tiny_sd1_control_bundle, backend="onnxruntime", precision="fp32") as engine:
        wanted = [engine.generate(request).latents for request in requests]
    with load(tiny_sd1_control_bundle, backend="tensorrt-rtx", precision="fp32") as engine:
        assert np.linalg.norm(engine.generate(requests[0]).latents - wanted[0]) <= 1e-5 * np.linalg.norm(wanted[0])
    assert not counted, "without the step's plans the host computes"
    stub.build_step(tmp_path)
    with load(tiny_sd1_control_bundle, backend="tensorrt-rtx", precision="fp32") as engine:
        alone = [engine.generate(request).latents for request in requests]
        together = [result.latents for result in engine.generate(requests)]
        plain = engine.generate(Request(**{**ASK, "sampler": "euler_a"}, seed=3)).latents
    assert set(counted) == {"put", "step", "get"}
    for at, want in enumerate(wanted):
        for found in (alone[at], together[at], *([plain] if at == 2 else [])):
            assert np.linalg.norm(found - want) <= 1e-5 * np.linalg.norm(want), at
