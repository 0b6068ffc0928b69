"""What becomes of a diffusers scheduler_config.json, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import diffusers
import pytest

from stepforge.export.models.scheduler import CLASSES, scheduler_card
from stepforge.runtime.errors import BundleError

# scheduler/scheduler_config.json of stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0
SD15: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SDXL: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def test_cards_of_stable_diffusion():
    card = scheduler_card(SD15)
    assert (card.sampler, card.schedule, card.prediction_type) == ("pndm", "normal", "epsilon")
    assert (card.timestep_spacing, card.steps_offset, card.set_alpha_to_one) == (None, 1, False)
    card = scheduler_card(SDXL)
    assert (card.sampler, card.beta_schedule, card.timestep_spacing) == ("euler", "scaled_linear", "leading")


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_of_every_class(name: str):
    """What a class fills in where a config is silent is what the card says."""
    options = {"PNDMScheduler": {"skip_prk_steps": True}, "DDIMScheduler": {"clip_sample": False}}
    options["DDPMScheduler"] = options["DDIMScheduler"]
    config = json.loads(getattr(diffusers, name)(**options.get(name, {})).to_json_string())
    full = scheduler_card(config)
    silent = scheduler_card({"_class_name": name, **options.get(name, {})})
    unsaid = {"timestep_spacing": None, "set_alpha_to_one": None}
    assert replace(full, **unsaid) == silent
    assert full.sampler == CLASSES[name]


def test_options_of_a_config():
    config = {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True, "algorithm_type": "dpmsolver++"}
    assert scheduler_card({**config, "solver_order": 3}).sampler == "dpmpp_3m"
    assert scheduler_card({**config, "algorithm_type": "sde-dpmsolver++"}).sampler == "dpmpp_2m_sde"
    assert scheduler_card({**config, "euler_at_final": True}).schedule == "karras"
    flow = scheduler_card({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    assert (flow.prediction_type, flow.shift) == ("flow", 3.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "SASolverScheduler"}, "scheduler class is 'SASolverScheduler'; choose one of DDIMScheduler"),
        ({}, "scheduler class is None"),
        ({**SD15, "clip_sample": True}, "clip_sample is True; choose one of False"),
        ({**SD15, "thresholding": True}, "thresholding is True; choose one of False"),
        ({**SD15, "skip_prk_steps": False}, "skip_prk_steps is False; choose one of True"),
        ({"_class_name": "PNDMScheduler"}, "skip_prk_steps is False"),
        ({"_class_name": "DDIMScheduler"}, "clip_sample is True"),
        ({**SD15, "prediction_type": "score"}, "prediction_type is 'score'; choose one of epsilon, v_prediction"),
        ({**SD15, "beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'; choose one of linear"),
        ({**SD15, "timestep_spacing": "even"}, "timestep_spacing is 'even'; choose one of"),
        ({**SD15, "new_option": 1}, "option 'new_option' is unknown"),
        ({**SD15, "beta_start": 0.0}, "betas must lie between 0 and 1"),
        ({**SD15, "trained_betas": [0.1, 0.2]}, "2 values for 1000 timesteps"),
        ({"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0]}, "disable_corrector is [0]"),
        ({**SDXL, "interpolation_type": "log_linear"}, "choose one of linear"),
        ({**SDXL, "final_sigmas_type": "sigma_min"}, "choose one of zero"),
        ({"_class_name": "DDPMScheduler", "clip_sample": False, "variance_type": "learned_range"}, "variance_type is"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "algorithm_type, solver_order"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_type": "heun"}, "solver_type is 'heun'"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas is True"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_order": 3}, "solver_order is 3; choose one of 2"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0.0}, "shift is 0.0; it must be positive"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_configs_that_are_refused(config: dict[str, Any], message: str):
    with pytest.raises(BundleError) as error:
        scheduler_card(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
