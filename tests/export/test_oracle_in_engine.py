"""Rows that the oracle compiled from a diffusers scheduler run in the engine like rows of our own."""

import numpy as np
import pytest
from diffusers import DDIMScheduler, SASolverScheduler

from stepforge import Engine, Request
from stepforge.export.oracle import from_diffusers
from stepforge.runtime.backends.fake import Fake, fake_bundle

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
REQUEST = Request(prompt="x", sampler="ddim", steps=10, guidance=3.0)


@pytest.fixture
def engine():
    with Engine(fake_bundle(64), Fake(fake_bundle(64))) as engine:
        yield engine


def test_compiled_ddim_equals_our_ddim(engine):
    rows = from_diffusers(DDIMScheduler(**BETAS, clip_sample=False), 10)
    ours = engine.generate(REQUEST).latents
    theirs = engine.submit(REQUEST, rows=rows).result().latents
    assert np.abs(ours - theirs).max() <= 1e-5  # float32 latents of size 1, ten updates


def test_a_scheduler_without_a_formula_here_runs(engine):
    """SA-Solver draws noise and keeps three predictions; its images near those of DDIM on the same analytic model."""
    rows = from_diffusers(SASolverScheduler(**BETAS), 30)
    result = engine.submit(Request(prompt="x", steps=30, guidance=1.0), rows=rows).result()
    reference = engine.generate(Request(prompt="x", steps=200, sampler="ddim", guidance=1.0))
    assert max(len(step.gain) for step in result.plan.steps) == 3
    assert abs(result.latents.mean() - reference.latents.mean()) < 0.1
    assert abs(result.latents.std() - reference.latents.std()) < 0.1
