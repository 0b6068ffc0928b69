"""Steps that are not linear, thresholded, clipped and of learned variance, against diffusers' schedulers in float64."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
import torch

from stepforge.export.models.scheduler import scheduler_card
from stepforge.export.oracle import exact_copy, in_float64, noise_of
from stepforge.runtime.bundle.scheduler import SchedulerCard
from stepforge.runtime.errors import BundleError, CheckpointError
from stepforge.runtime.plan import Step
from stepforge.runtime.plan.sampling.limits import deviation, limited
from stepforge.runtime.plan.sampling.sample import sample_steps

IF = {  # DeepFloyd-IF's scheduler as diffusers' conversion script writes it, stage I
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "epsilon",
    "variance_type": "learned_range",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
}
SIZE = 3 * 4 * 4
# `limits.py` rounds its limit and its deviations to float32; nothing else differs from diffusers run in float64
TOLERANCE = 1e-6


def ours(steps: tuple[Step, ...], x: np.ndarray, raws: np.ndarray, values: np.ndarray, noise: np.ndarray):
    """Latents x_1..x_K of one image, from the raw outputs, variance channels and noise of each step; and the p_k."""
    xs, ps = [x], []
    for k, step in enumerate(steps):
        p = raws[k]
        if step.threshold is not None:
            p = limited(step.denoised[0] * xs[k] + step.denoised[1] * raws[k], step.threshold)
        ps.append(p)
        z = noise[k] if step.variance is None else noise[k] * deviation(values[k], step.variance)
        total = step.raw * raws[k] + step.noise * z
        total += sum(c * xs[k - i] for i, c in enumerate(step.keep))
        total += sum(c * ps[k - j] for j, c in enumerate(step.gain))
        xs.append(total)
    return xs[1:], ps


@pytest.mark.parametrize(
    ("name", "options", "prediction"),
    [
        ("DDPMScheduler", IF, "epsilon"),
        ("DDPMScheduler", {**IF, "sample_max_value": 1.0, "timestep_spacing": "trailing"}, "v_prediction"),
        ("DDPMScheduler", {**IF, "thresholding": False, "clip_sample": False}, "epsilon"),
        ("DDPMScheduler", {"clip_sample": True}, "sample"),
        ("DDPMScheduler", {"clip_sample": True, "thresholding": True, "sample_max_value": 3.0}, "epsilon"),
        ("DDIMScheduler", {"clip_sample": True}, "epsilon"),
        ("DDIMScheduler", {"thresholding": True, "sample_max_value": 2.0}, "v_prediction"),
        ("LCMScheduler", {"clip_sample": True}, "v_prediction"),
        ("DPMSolverMultistepScheduler", {"thresholding": True, "sample_max_value": 1.5}, "epsilon"),
        ("DPMSolverMultistepScheduler", {"thresholding": True, "solver_order": 3}, "v_prediction"),
        ("UniPCMultistepScheduler", {"thresholding": True, "sample_max_value": 2.0}, "epsilon"),
        ("DEISMultistepScheduler", {"thresholding": True, "sample_max_value": 2.0}, "v_prediction"),
    ],
)
def test_as_diffusers(name: str, options: dict, prediction: str):
    given = {**options, "prediction_type": prediction}
    plain = getattr(diffusers, name)(**given)
    card = scheduler_card({**plain.config, "_class_name": name})
    steps, init = sample_steps(card, steps=12)
    assert init == 1.0
    plain.set_timesteps(12)
    assert [step.t for step in steps] == [float(t) for t in plain.timesteps]
    exact = exact_copy(plain)
    rng = np.random.default_rng(1)
    x, raws = rng.normal(size=SIZE), rng.normal(size=(12, SIZE)) * 1.5
    values, noise = rng.uniform(-1.2, 1.2, size=(12, SIZE)), rng.normal(size=(12, SIZE))
    found, ps = ours(steps, x, raws, values, noise)

    def image(flat):
        return torch.tensor(flat.reshape(1, 3, 4, 4))

    learned = options.get("variance_type") == "learned_range"
    with in_float64(type(exact)):
        exact.set_timesteps(12)
        sample = image(x)
        for k, t in enumerate(plain.timesteps):
            output = torch.cat([image(raws[k]), image(values[k])], 1) if learned else image(raws[k])
            with noise_of(type(exact), image(noise[k])):
                out = exact.step(output, t, sample)
            sample = out.prev_sample
            wanted = sample.flatten().numpy()
            assert np.abs(found[k] - wanted).max() < TOLERANCE * np.abs(wanted).max(), k
            if steps[k].threshold and getattr(out, "pred_original_sample", None) is not None:
                assert np.abs(ps[k] - out.pred_original_sample.flatten().numpy()).max() < TOLERANCE
    # the cases are ones in which limits and variances show
    limits = options.get("thresholding", False) or card.clip_sample
    assert all((step.threshold is not None) == limits for step in steps)
    assert any(step.variance is not None for step in steps) == learned
    assert not limits or any(np.count_nonzero(np.abs(p) > 0.999) > 1 for p in ps)


def test_other_samplers_of_a_model_with_limits():
    """As `Scheduler.from_config(pipe.scheduler.config)`: a class without thresholding has none, and drops the variance."""
    card = scheduler_card({"_class_name": "DDPMScheduler", **IF})
    assert (card.sampler, card.threshold, card.learned_range) == ("ddpm", (0.95, 1.5), True)
    assert SchedulerCard.from_dict(card.to_dict()) == card
    for sampler, threshold in (("ddim", (0.95, 1.5)), ("euler", None), ("heun", None), ("unipc", (0.95, 1.5))):
        steps, _ = sample_steps(card, sampler=sampler, steps=4)
        assert all(step.threshold == threshold and step.variance is None for step in steps), sampler
    clipped = scheduler_card({"_class_name": "DDIMScheduler", "clip_sample": True})
    assert [sample_steps(clipped, sampler=s, steps=2)[0][0].threshold for s in ("ddim", "dpmpp_2m")] == [
        (1.0, 1.0),
        None,
    ]


def test_refused():
    with pytest.raises(CheckpointError, match="not linear"):
        scheduler_card({"_class_name": "DDIMScheduler", "clip_sample": True, "clip_sample_range": 2.0})
    for wrong in ({"sample_max_value": 0.5}, {"dynamic_thresholding_ratio": 2.0}):
        with pytest.raises(BundleError, match="threshold is"):
            scheduler_card({"_class_name": "DDPMScheduler", **IF, **wrong})


def test_limits_of_float32():
    clean = np.linspace(-3, 3, 301, dtype=np.float32)
    wanted = diffusers.DDPMScheduler(**IF)._threshold_sample(torch.tensor(clean).reshape(1, 1, 7, 43)).flatten()
    assert np.abs(limited(clean, (0.95, 1.5)) - wanted.numpy()).max() <= 1.2e-7
    assert limited(clean, (0.95, 1.0)).dtype == np.float32
    values = np.array([-1.0, 0.0, 1.0], np.float32)
    assert deviation(values, (math.log(0.04), math.log(0.01))) == pytest.approx([0.1, math.sqrt(0.02), 0.2], rel=1e-6)
