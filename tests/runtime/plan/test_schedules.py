"""Noise schedules against diffusers' tables and scipy; cards survive JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import scipy.stats

from stepforge.export.oracle import in_float64
from stepforge.runtime.bundle.scheduler import BETA_SCHEDULES, SchedulerCard
from stepforge.runtime.errors import BundleError
from stepforge.runtime.plan.sampling.schedules import alphas_cumprod, beta_quantile, spaced, times_of


@pytest.mark.parametrize("zero_snr", [False, True], ids=["", "zero_snr"])
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_alphas_cumprod(name: str, zero_snr: bool):
    card = SchedulerCard(sampler="ddim", beta_schedule=name, rescale_betas_zero_snr=zero_snr)
    with in_float64(diffusers.DDIMScheduler):
        exact = diffusers.DDIMScheduler(beta_schedule=name, rescale_betas_zero_snr=zero_snr).alphas_cumprod.numpy()
    # the reference makes betas of the rescaled ᾱ and multiplies them up again
    np.testing.assert_allclose(alphas_cumprod(card), exact, rtol=1e-10, atol=1e-15)
    stored = diffusers.DDIMScheduler(beta_schedule=name, rescale_betas_zero_snr=zero_snr).alphas_cumprod.numpy()
    # float32, 1000 factors: 1 − beta is rounded by 3e-8 each, which the cosine's 0.999 makes 3e-5 of what is left
    np.testing.assert_allclose(alphas_cumprod(card), stored, rtol=1e-4, atol=2e-7)
    assert bool(alphas_cumprod(card)[-1] == 0.0) is zero_snr


@pytest.mark.parametrize("steps", [1, 2, 7, 61, 103, 999, 1000])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_spacing(spacing: str, steps: int):
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    ours = np.round(spaced(spacing, steps, 1000))
    # at 61, 103, .. steps numpy's arange gives diffusers one timestep too many, of -1
    np.testing.assert_array_equal(ours, scheduler.timesteps.numpy()[:steps])
    assert len(ours) == steps
    assert (np.diff(ours) < 0).all()


def test_beta_quantile():
    q = np.linspace(0.0, 1.0, 201)
    np.testing.assert_allclose(beta_quantile(q, 0.6), scipy.stats.beta.ppf(q, 0.6, 0.6), rtol=1e-12, atol=1e-15)


def test_times_of_sigmas_in_and_beyond_the_table():
    table = np.array([0.1, 0.4, 1.6])
    np.testing.assert_allclose(times_of(np.array([9.0, 1.6, 0.8, 0.2, 0.1, 0.0]), table), [2, 2, 1.5, 0.5, 0, 0])


def test_json_round_trip():
    for card in (
        SchedulerCard(sampler="pndm", beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1),
        SchedulerCard(sampler="euler", num_train_timesteps=2, trained_betas=(0.1, 0.2)),
    ):
        assert SchedulerCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card
    values = SchedulerCard(sampler="ddim").to_dict()
    with pytest.raises(BundleError, match="missing or unknown fields: shifd, shift"):
        SchedulerCard.from_dict({key.replace("shift", "shifd"): value for key, value in values.items()})
    with pytest.raises(BundleError, match="wrong kind"):
        SchedulerCard.from_dict({**values, "beta_start": "0.1"})
    with pytest.raises(BundleError, match="scheduler card is 7; an object is expected"):
        SchedulerCard.from_dict(7)
    with pytest.raises(BundleError, match="sampler is 'eular'"):
        SchedulerCard.from_dict({**values, "sampler": "eular"})


def test_imports_neither_torch_nor_scipy():
    code = (
        "import sys, stepforge.runtime.plan.sampling.samplers\n"
        "sys.exit(bool({'torch', 'scipy', 'diffusers'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
