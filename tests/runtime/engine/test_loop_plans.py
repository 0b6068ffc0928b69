"""Plans with adapters, guiders and reuse whose whole steps run in the backend, against the same steps on the host."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from stepforge import Request, load
from stepforge.runtime.backends.torch import guide
from stepforge.runtime.backends.torch import loop as torch_loop
from stepforge.runtime.plan.guiders import Guider

ASK = {"prompt": "a cat", "steps": 4, "guidance": 3.0, "width": 32, "height": 32}
TIERS = pytest.mark.parametrize("backend", ["torch", pytest.param("torch-exact", marks=pytest.mark.slow)])
# fp32 sums in another order: 16 roundings of 6e-8 a step
CLOSE = 1e-5


def close(a, b):
    return np.linalg.norm(a - b) <= CLOSE * np.linalg.norm(b)


def adapter(path, seed=2):
    """A file for a layer that reads the image, and for one that reads the prompt."""
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
    layers = {"attn1.to_q": 32, "attn2.to_k": 32}
    random = np.random.RandomState(seed)
    sizes = {
        f"{block}.{layer}.lora_{letter}.weight": size
        for layer, width in layers.items()
        for letter, size in {"A": (4, width), "B": (width, 4)}.items()
    }
    save_file({name: random.standard_normal(size).astype(np.float32) for name, size in sizes.items()}, path)
    return path


@pytest.mark.slow
def test_adapters_by_step(tiny_sd1_banks, tmp_path, monkeypatch, on_host):
    adapter(tmp_path / "a.safetensors")
    requests = [
        Request(**ASK, sampler="ddim", adapters={"a": 0.7}, adapter_schedule=[0.0, 1.0, 0.5, -1.0]),
        Request(**ASK),
        Request(**ASK, adapters={"a": 1.5}),
    ]
    found = []
    for _ in range(2):
        with load(tiny_sd1_banks, backend="torch", precision="fp32") as engine:
            engine.adapters.load("a", tmp_path / "a.safetensors")
            found.append([result.latents for result in engine.generate(requests)])
        on_host(monkeypatch)
    assert all(close(a, b) for a, b in zip(*found, strict=True))
    assert not close(found[0][0], found[0][1])


REUSING = [
    Request(**{**ASK, "steps": 8}, sampler="ddim", reuse="deepcache(3)", seed=1),
    Request(**{**ASK, "steps": 8, "guidance": "5@0-0.5,1@0.5-1"}, sampler="dpmpp_2m", reuse="tgate(0.4)", seed=2),
    Request(
        **{**ASK, "steps": 9, "guidance": "5@0-0.3,1@0.3-1"}, sampler="euler_a", reuse="deepcache(2)+tgate(0.5)", seed=3
    ),
    Request(**{**ASK, "steps": 7}, seed=4),
    Request(**{**ASK, "steps": 6, "guidance": 1.0}, reuse="tgate(0.5)", seed=5),
]


@pytest.fixture(scope="module")
def reusing(tiny_sd1_control_bundle, on_host):
    """Results of `REUSING` in one batch, without a loop."""
    with pytest.MonkeyPatch.context() as patch:
        on_host(patch)
        with load(tiny_sd1_control_bundle, backend="torch-exact", precision="fp32") as engine:
            return engine.generate(REUSING)


@TIERS
def test_what_is_kept_stays_in_the_loop(tiny_sd1_control_bundle, backend, reusing, counted, monkeypatch):
    """DeepCache, T-GATE, both, the mean of two rows where guidance ends, and none, in one batch; room for them grows."""
    with load(tiny_sd1_control_bundle, backend=backend, precision="fp32") as engine:
        results = engine.generate(REUSING)
    assert sum(entry[0] == "put" for entry in counted) == len(REUSING)
    for a, b in zip(results, reusing, strict=True):
        assert close(a.latents, b.latents), a.request
        assert a.stats.rows == b.stats.rows


GUIDED = [
    Request(**ASK, guider="rescale(0.7)", seed=1),
    Request(**ASK, guider="zero_star(zero=2)+rescale(0.3)", sampler="ddim", seed=2),
    Request(**{**ASK, "guidance": "7@0-0.5,1@0.5-1"}, guider="apg(momentum=-0.5, norm=3, eta=0.2)", seed=3),
    Request(**{**ASK, "guidance": 9.0}, guider="dynamic(p=0.8, max=1.2)", sampler="euler_a", seed=4),
    Request(**{**ASK, "guidance": [0.0, 9.0, 4.0, 1.0]}, guider="apg+rescale(0.5)+dynamic", sampler="ddim", seed=5),
    Request(**ASK, sampler="heun", guider="zero_star(zero=1)+dynamic(p=0.7, max=4)", seed=6),
    Request(**ASK, seed=7),
]


@TIERS
def test_guiders_in_a_loop(tiny_sd1_bundle, backend, counted, monkeypatch, on_host):
    """Every part, alone and together, where one row ran and where none counts, beside plain guidance."""
    found = []
    for _ in range(2):
        with load(tiny_sd1_bundle, backend=backend, precision="fp32", max_rows=14) as engine:
            found.append(engine.generate(GUIDED))
        on_host(monkeypatch)
    assert sum(entry[0] == "put" for entry in counted) == len(GUIDED)
    for a, b in zip(*found, strict=True):
        assert close(a.latents, b.latents), a.request
        assert a.stats.rows == b.stats.rows
    plain = [replace(request, guider="cfg") for request in GUIDED[:-1]]
    with load(tiny_sd1_bundle, backend=backend, precision="fp32") as engine:
        for a, b in zip(engine.generate(plain), found[0], strict=False):
            assert not close(a.latents, b.latents), a.request


def test_a_guider_takes_nothing_of_its_neighbours():
    """Rows that did not run may be a neighbour's, which may not be finite."""
    prediction, x = torch.randn(3, 8), torch.randn(2, 8)
    prediction[0] = torch.nan
    own = torch.tensor([guide.numbers(Guider.parse(text)) for text in ("apg+rescale+dynamic", "zero_star")])
    asked = frozenset({"zero_star", "apg", "rescale", "dynamic"})
    sources, weights = torch.tensor([[1, 0], [0, 2]], dtype=torch.int32), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    p, change = guide.guided(asked, prediction, sources, weights, own, x, torch.zeros(2, 2).double(), torch.zeros(2, 8))
    assert torch.equal(p, prediction[1:])
    assert torch.equal(change, torch.zeros(2, 8))


@pytest.mark.slow
def test_recordings_keep_activations(tiny_sd1_control_bundle, reusing, recorded, monkeypatch):
    """One recording a variant and packed shape; room that grows voids those before, and kinds of steps are bounded."""
    monkeypatch.setattr(torch_loop, "MOST_KINDS", 3)
    with load(tiny_sd1_control_bundle, backend="torch", precision="fp32") as engine:
        results = [*engine.generate(REUSING[:2]), *engine.generate(REUSING[2:])]
    assert 0 < recorded.count("step") < sum(result.stats.calls for result in results)
    for a, b in zip(results, reusing, strict=True):
        assert close(a.latents, b.latents)


def test_what_adapters_make_of_prompts_is_made_when_they_change(
    tiny_sd1_banks, tmp_path, recorded, monkeypatch, on_host
):
    """Once for a request, once where a schedule changes the strength, once for the next request, once for another adapter in
    the slot; on the host in every call."""
    ask = {**ASK, "sampler": "ddim", "adapters": {"a": 0.7}}
    steady = Request(**ask)
    requests = [steady, steady, Request(**ask, adapter_schedule=[1.0, 1.0, 0.5, 0.5]), steady, steady]
    found, counts = [], []
    for _ in range(2):
        with load(tiny_sd1_banks, backend="torch", precision="fp32") as engine:
            engine.adapters.load("a", adapter(tmp_path / "a.safetensors"))
            for at, request in enumerate(requests):
                if at == 4:
                    engine.adapters.unload("a")
                    engine.adapters.load("a", adapter(tmp_path / "b.safetensors", 3))
                recorded.clear()
                found.append(engine.generate(request).latents)
                counts.append(recorded.count("once"))
        on_host(monkeypatch)
    assert counts == [1, 0, 1, 1, 1, *[4] * 5]
    assert all(close(a, b) for a, b in zip(found[:5], found[5:], strict=True))
    assert not close(found[3], found[4])
