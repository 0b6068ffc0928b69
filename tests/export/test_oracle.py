"""The basis-vector oracle: schedulers that stepforge has no formula for, windows, and what is refused."""

from __future__ import annotations

import importlib
import itertools
import math

import diffusers
import numpy as np
import pytest
import torch

from stepforge.export.oracle import expansion, from_diffusers
from stepforge.runtime.bundle.scheduler import SchedulerCard
from stepforge.runtime.errors import CheckpointError
from stepforge.runtime.plan import expand
from stepforge.runtime.plan.sampling.sample import sample_steps

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# class: options, longest windows over latents and predictions at 12 steps
SCHEDULERS = {
    "DDIMScheduler": ({"clip_sample": False, **BETAS}, (1, 1)),
    "DDPMScheduler": ({"clip_sample": False, **BETAS}, (1, 1)),
    "EulerDiscreteScheduler": (BETAS, (1, 1)),
    "EulerAncestralDiscreteScheduler": (BETAS, (1, 1)),
    "LCMScheduler": ({}, (1, 1)),
    "TCDScheduler": ({}, (1, 1)),
    "HeunDiscreteScheduler": ({**BETAS, "num_train_timesteps": 200}, (1, 2)),
    "KDPM2DiscreteScheduler": ({**BETAS, "num_train_timesteps": 200}, (1, 2)),
    "KDPM2AncestralDiscreteScheduler": ({**BETAS, "num_train_timesteps": 200}, (1, 2)),
    "DEISMultistepScheduler": (BETAS, (1, 2)),
    "DPMSolverSinglestepScheduler": (BETAS, (1, 2)),
    "LMSDiscreteScheduler": ({**BETAS, "num_train_timesteps": 200}, (1, 4)),
    "PNDMScheduler": ({"skip_prk_steps": True, **BETAS}, (1, 5)),
    "DPMSolverMultistepScheduler": (BETAS, (2, 2)),
    "UniPCMultistepScheduler": (BETAS, (3, 3)),
    "SASolverScheduler": (BETAS, (3, 3)),
    "EDMEulerScheduler": ({}, (1, 1)),
    "EDMDPMSolverMultistepScheduler": ({}, (2, 2)),
    "FlowMatchEulerDiscreteScheduler": ({}, (1, 1)),
    "FlowMatchHeunDiscreteScheduler": ({}, (1, 2)),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rows_give_the_expansion(name: str):
    options, windows = SCHEDULERS[name]
    scheduler = getattr(diffusers, name)(**options)
    wanted = expansion(scheduler, 12)
    rows, init_noise = from_diffusers(scheduler, 12)
    found = expand(rows, init_noise)
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        size = max(map(abs, theirs.values()))
        for key in ours.keys() | theirs.keys():
            # a window may miss 1e-9 of a latent, and later ones build on it
            assert ours.get(key, 0.0) == pytest.approx(theirs.get(key, 0.0), abs=1e-7 * size)
    assert (max(len(row.keep) for row in rows), max(len(row.gain) for row in rows)) == windows


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DEISMultistepScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_estimates_of_the_clean_latent(name: str):
    """A network that knows the clean latent: every estimate is that latent."""
    rows, _ = from_diffusers(getattr(diffusers, name)(**SCHEDULERS[name][0]), 6)
    clean, noise = 0.7, -1.3
    for row in rows:
        if "Flow" in name:
            sigma = 1.0 if math.isinf(row.sigma) else row.sigma / (1 + row.sigma)
            latent, prediction = (1 - sigma) * clean + sigma * noise, noise - clean
        else:
            alpha = 1.0 if name.startswith("Euler") else 1 / math.hypot(row.sigma, 1.0)
            latent, prediction = alpha * (clean + row.sigma * noise), noise
        assert row.denoised[0] * latent + row.denoised[1] * prediction == pytest.approx(clean)


def test_rows_equal_those_of_the_formula():
    card = SchedulerCard(sampler="dpmpp_2m", **BETAS)
    found, _ = from_diffusers(diffusers.DPMSolverMultistepScheduler(**BETAS), 9)
    wanted, _ = sample_steps(card, steps=9)
    for ours, theirs in zip((found[0], *found[2:]), (wanted[0], *wanted[2:]), strict=True):  # x_0 is in x_1 and p_0
        assert (ours.t, ours.noise, ours.scale_in) == (theirs.t, theirs.noise, theirs.scale_in)
        for field in ("sigma", "keep", "gain", "denoised"):
            assert getattr(ours, field) == pytest.approx(getattr(theirs, field), rel=1e-9, abs=1e-12)


def test_arguments_of_set_timesteps_and_of_step():
    scheduler = diffusers.DDIMScheduler(clip_sample=False, **BETAS)
    assert all(row.noise == 0 for row in from_diffusers(scheduler, 5)[0])
    assert all(row.noise > 0 for row in from_diffusers(scheduler, 5, step_options={"eta": 1.0})[0][:-1])
    rows, init_noise = from_diffusers(diffusers.EulerDiscreteScheduler(**BETAS), sigmas=[9.0, 2.0, 0.5, 0.0])
    assert [row.sigma for row in rows] == pytest.approx([9.0, 2.0, 0.5])
    assert init_noise == pytest.approx(9.0)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.DDIMScheduler(**BETAS), "not linear"),
        (diffusers.DDPMScheduler(thresholding=True, **BETAS), "not linear"),
        (diffusers.UniPCMultistepScheduler(thresholding=True, **BETAS), "not linear"),
        (
            diffusers.DDIMScheduler(clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
            "finite",
        ),
        (diffusers.LCMScheduler(original_inference_steps=4), "cannot run these steps"),
    ],
    ids=["clip", "threshold", "threshold-unipc", "zero-snr", "steps"],
)
def test_refusals(scheduler, message: str):
    with pytest.raises(CheckpointError, match=message):
        from_diffusers(scheduler, 7)


def test_draws_that_are_not_one_a_step(monkeypatch: pytest.MonkeyPatch):
    module = importlib.import_module("diffusers.schedulers.scheduling_euler_ancestral_discrete")
    plain = diffusers.EulerAncestralDiscreteScheduler.step
    for wrong, message in (((3,), "another shape"), (None, "twice")):

        def step(self, model_output, timestep, sample, wrong=wrong, **options):
            module.randn_tensor(wrong or sample.shape)
            return plain(self, model_output, timestep, sample, **options)

        monkeypatch.setattr(diffusers.EulerAncestralDiscreteScheduler, "step", step)
        with pytest.raises(CheckpointError, match=message):
            from_diffusers(diffusers.EulerAncestralDiscreteScheduler(**BETAS), 3)


def test_leaves_diffusers_as_it_was():
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**BETAS)
    module = importlib.import_module(type(scheduler).__module__)
    before = module.np, module.torch, module.randn_tensor, torch.get_default_dtype()
    sigmas = scheduler.sigmas.clone()
    from_diffusers(scheduler, 4)
    with pytest.raises(CheckpointError):
        from_diffusers(scheduler, 4, step_options={"no_such_option": 1})
    assert before == (module.np, module.torch, module.randn_tensor, torch.get_default_dtype())
    assert before[0] is np
    assert torch.equal(scheduler.sigmas, sigmas)


def test_the_expansion_is_what_a_numeric_run_does():
    """float64 numbers through an unmodified scheduler, to what its float32 tables allow."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS)
    last = expansion(scheduler, 8)[-1]
    random = np.random.default_rng(0)
    inputs = {("x", 0): random.normal(size=(1, 4, 4, 4))}
    inputs |= {("p", k): random.normal(size=(1, 4, 4, 4)) for k in range(8)}
    scheduler.set_timesteps(8)
    latent = torch.tensor(inputs["x", 0])
    for k, t in zip(itertools.count(), scheduler.timesteps):
        latent = scheduler.step(torch.tensor(inputs["p", k]), t, latent).prev_sample
    wanted = sum(value * inputs[key] for key, value in last.items())
    np.testing.assert_allclose(latent.numpy(), wanted, rtol=1e-4, atol=1e-4)
