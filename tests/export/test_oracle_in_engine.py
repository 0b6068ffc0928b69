"""Steps that the oracle compiled run in the engine like steps of our own formulas, and as diffusers' loop runs them."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from stepforge import Engine, Request
from stepforge.export.build import export_bundle
from stepforge.export.models.scheduler import scheduler_card
from stepforge.export.oracle import from_diffusers
from stepforge.export.parity.verify import verify
from stepforge.runtime.backends.fake import Fake, fake_bundle
from stepforge.runtime.bundle import ComponentId, read
from stepforge.runtime.errors import BundleError, RequestError
from stepforge.runtime.plan.compile import describe

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
REQUEST = Request(prompt="x", sampler="ddim", steps=10, guidance=3.0)


@pytest.fixture
def engine():
    with Engine(fake_bundle(64), Fake(fake_bundle(64))) as engine:
        yield engine


def test_compiled_ddim_equals_our_ddim(engine):
    rows = from_diffusers(diffusers.DDIMScheduler(**BETAS, clip_sample=False), 10)
    ours = engine.generate(REQUEST).latents
    theirs = engine.submit(REQUEST, rows=rows).result().latents
    assert np.abs(ours - theirs).max() <= 1e-5  # float32 latents of size 1, ten updates


def network(latent: Any, t: Any) -> Any:
    """A fixed network that is not linear; t [rows]."""
    return np.tanh(latent) + np.float32(0.3) * np.sin(3 * latent + np.float32(t).reshape(-1, 1, 1, 1) / 200)


class Nonlinear(Fake):
    def open(self, component: ComponentId, banks: Any = None) -> Any:
        if component.role == "denoiser":
            return lambda inputs: {"prediction": network(inputs["sample"], inputs["timestep"]).astype(np.float32)}
        return super().open(component, banks)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SASolverScheduler", {}),  # draws noise in every step, also where it uses none
        ("KDPM2AncestralDiscreteScheduler", {}),  # two evaluations a step, noise in the second
        ("PNDMScheduler", {"skip_prk_steps": False}),  # Runge-Kutta steps: a window of thirteen predictions
        ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "zero"}),
        ("DDPMScheduler", {"variance_type": "fixed_large", "clip_sample": False}),
        ("EDMEulerScheduler", {"sigma_data": 1.0, "sigma_max": 120.0, "prediction_type": "v_prediction"}),
    ],
)
def test_a_models_own_sampler_draws_what_diffusers_draws(name: str, options: dict[str, Any]):
    """Latents of a seed, noise and all, by an unmodified scheduler and by the engine."""
    config = {"_class_name": name, **(BETAS if "EDM" not in name else {}), **options}
    bundle = replace(fake_bundle(64), scheduler=scheduler_card(config, (12,)))
    with Engine(bundle, Nonlinear(bundle)) as engine:
        result = engine.generate("x", steps=12, guidance=1.0, seed=5)
        with pytest.raises(RequestError, match="compiled for 12 steps, not for 13"):
            engine.generate("x", steps=13)
        guided = engine.plan("x", steps=12, guidance="interval(7.5, sigma=0.5..5)", adapter_schedule=0.5)
        first = {step.index: step.sigma for step in reversed(guided.steps)}  # decides for the whole step
        assert [step.guidance == 7.5 for step in guided.steps] == [
            0.5 < first[step.index] <= 5 for step in guided.steps
        ]
        assert 2 <= sum(step.guidance == 7.5 for step in guided.steps) < len(guided.steps)
        assert len(describe(guided)) == len(guided.steps)
    scheduler = getattr(diffusers, name).from_config(config)
    scheduler.set_timesteps(12)
    generator = torch.Generator().manual_seed(5)
    takes = {"generator": generator} if "PNDM" not in name else {}
    latent = torch.randn((1, 4, 8, 8), generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(latent, t)
        latent = scheduler.step(torch.from_numpy(network(seen.numpy(), float(t))), t, latent, **takes).prev_sample
    assert [step.t for step in result.plan.steps] == scheduler.timesteps.float().tolist()
    error = np.linalg.norm(result.latents[0] - latent[0].numpy()) / np.linalg.norm(latent.numpy())
    assert error < 2e-5  # float32 on both sides: 6e-8 an operation, times the network's slope of 2, over up to 24 steps


def test_constant_guidance_below_one_warns_once(engine, caplog):
    with caplog.at_level(logging.WARNING, logger="stepforge"):
        for w in (1.0, 7.5, [0.0] * 5 + [1.0] * 5):
            engine.generate(with_guidance(w))
        assert not caplog.records
        for w in (0.0, 0.5):
            engine.generate(with_guidance(w))
    (record,) = caplog.records
    assert record.getMessage().startswith("guidance 0 runs the unconditional row alone; diffusers runs the conditional")


def with_guidance(w: Any) -> Request:
    return Request(prompt="x", sampler="ddim", steps=10, guidance=w)


def with_scheduler(model: Path, out: Path, name: str, **options: Any) -> Path:
    """A copy of a model with another scheduler in its index, and options in the scheduler's config."""
    shutil.copytree(model, out)
    index = json.loads((out / "model_index.json").read_text())
    (out / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
    place = out / "scheduler" / "scheduler_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | options))
    return out


@pytest.mark.slow
@pytest.mark.long
def test_a_stage_with_such_a_sampler_is_exported(tiny_sd1: Path, tiny_x4: Path, tmp_path: Path):
    stage = with_scheduler(tiny_x4, tmp_path / "x4", "DPMSolverMultistepScheduler", solver_type="heun")
    out = tmp_path / "x4.bundle"
    export_bundle(tiny_sd1, out, upscalers={"x4": stage})
    card = read(out).stages["x4"].scheduler
    assert card is not None
    assert (card.sampler, len(card.table.counts)) == ("DPMSolverMultistepScheduler", 100)
    verdict = verify(
        out, tiny_sd1, upscalers={"x4": stage}, backends=("onnxruntime",), precisions=("fp32",), prompts=("a cat",), steps=4,
        store=False,
    )  # fmt: skip
    assert verdict["passed"], [check for check in verdict["checks"] if not check["passed"]]
    assert ("trajectory", "stage x4") in {(check["level"], check["name"]) for check in verdict["checks"]}
    (out / "sr/x4/scheduler/steps.json").unlink()
    with pytest.raises(BundleError, match=r"lacks sr/x4/scheduler/steps.json"):
        read(out)


@pytest.mark.slow
# SASolver's hundred step counts take diffusers 15 s of processor time; its windows and noise are compared above
@pytest.mark.parametrize("name", ["DDPMScheduler", pytest.param("SASolverScheduler", marks=pytest.mark.long)])
def test_a_model_with_such_a_sampler_is_exported(name: str, tiny_sd1: Path, tmp_path: Path):
    """Of another class than its config says, with what the pipeline corrects; verify runs diffusers' own pipeline."""
    options = {"variance_type": "fixed_large", "clip_sample": False} if name == "DDPMScheduler" else {}
    model = with_scheduler(tiny_sd1, tmp_path / "model", name, _class_name="PNDMScheduler", steps_offset=0, **options)
    out = tmp_path / "sa.bundle"
    bundle = export_bundle(model, out)
    assert sorted(read(out).scheduler.table.counts) == list(range(1, 101))
    assert read(out).scheduler.sampler == name
    assert [line.split()[1] for line in bundle.source["corrected"]] == [f"{name},", "steps_offset"]
    verdict = verify(out, model, backends=("openvino",), precisions=("fp32",), prompts=("a cat",), steps=6, store=False)
    assert verdict["passed"], verdict["summary"]
    (out / "scheduler" / "steps.json").unlink()
    with pytest.raises(BundleError, match=r"lacks scheduler/steps.json"):
        read(out)
