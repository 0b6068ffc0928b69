"""A diffusers scheduler_config.json to what a bundle stores of it, and every option that is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from stepforge.runtime.bundle.scheduler import SCHEDULES, SchedulerCard, choose
from stepforge.runtime.errors import BundleError

# class of scheduler_config.json -> our sampler
CLASSES = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "deis",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "EulerDiscreteScheduler": "euler",
    "FlowMatchEulerDiscreteScheduler": "flow_euler",
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "kdpm2",
    "LCMScheduler": "lcm",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "pndm",
    "TCDScheduler": "tcd",
    "UniPCMultistepScheduler": "unipc",
}
DPM_SOLVERS = {("dpmsolver++", 2): "dpmpp_2m", ("dpmsolver++", 3): "dpmpp_3m", ("sde-dpmsolver++", 2): "dpmpp_2m_sde"}

# Defaults of classes whose configs are silent, other than beta 0.0001 to 0.02, "linear", no clipping.
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": True},
    "DDPMScheduler": {"clip_sample": True},
    "HeunDiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
    "KDPM2DiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
    "LCMScheduler": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "TCDScheduler": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
}

# Options that change the numbers, and the values for which ours are right.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "clip_sample": (False,),
    "disable_corrector": ([],),
    "final_sigmas_type": ("zero",),
    "interpolation_type": ("linear",),
    "invert_sigmas": (False,),
    "lambda_min_clipped": (-math.inf, "-Infinity", None),
    "lower_order_final": (True,),
    "original_inference_steps": (50,),
    "predict_x0": (True,),
    "shift_terminal": (None,),
    "sigma_max": (None,),
    "sigma_min": (None,),
    "solver_p": (None,),
    "stochastic_sampling": (False,),
    "thresholding": (False,),
    "timestep_scaling": (10.0,),
    "timestep_type": ("discrete",),
    "use_dynamic_shifting": (False,),
    "use_flow_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "variance_type": (None, "fixed_small", "fixed_small_log"),  # the two formulas give the same deviation
}
REQUIRED_OF_CLASS: dict[str, dict[str, tuple[Any, ...]]] = {
    "DEISMultistepScheduler": {"solver_order": (2,)},
    "DPMSolverMultistepScheduler": {"solver_type": ("midpoint", "bh1", "bh2", "logrho")},  # all become midpoint
    "PNDMScheduler": {"skip_prk_steps": (True,)},
    "UniPCMultistepScheduler": {"solver_order": (2,), "solver_type": ("bh2", "midpoint", "heun", "logrho")},
}
# Options without effect once REQUIRED holds (euler_at_final is implied by a final sigma of zero).
WITHOUT_EFFECT = {
    "base_image_seq_len", "base_shift", "clip_sample_range", "dynamic_thresholding_ratio", "euler_at_final",
    "flow_shift", "max_image_seq_len", "max_shift", "sample_max_value", "skip_prk_steps", "solver_type",
    "time_shift_type",
}  # fmt: skip


def scheduler_card(config: Mapping[str, Any]) -> SchedulerCard:
    """The card of a diffusers scheduler_config.json; refuses what would change the numbers and is not known."""
    name = config.get("_class_name")
    choose("scheduler class", name, tuple(CLASSES))
    given = {**CLASS_DEFAULTS.get(str(name), {}), **config}
    schedules = {f"use_{schedule}_sigmas": schedule for schedule in SCHEDULES[1:]}
    own = {field.name for field in fields(SchedulerCard)} - {"sampler", "schedule"}
    required = {**REQUIRED, **REQUIRED_OF_CLASS.get(str(name), {})}
    if name == "PNDMScheduler":
        given.setdefault("skip_prk_steps", False)
    known = own | required.keys() | schedules.keys() | WITHOUT_EFFECT | {"algorithm_type", "solver_order"}
    for key, value in given.items():
        if key in required and value not in required[key]:
            choose(f"{name}: {key}", value, required[key])
        if key not in known and not key.startswith("_"):
            raise BundleError(f"{name}: option {key!r} is unknown to stepforge")
    values = {key: given[key] for key in own if given.get(key) is not None}
    if "trained_betas" in values:
        values["trained_betas"] = tuple(float(beta) for beta in values["trained_betas"])
        values.setdefault("num_train_timesteps", len(values["trained_betas"]))
    sampler = CLASSES[str(name)]
    if name == "DPMSolverMultistepScheduler":
        solver = given.get("algorithm_type", "dpmsolver++"), given.get("solver_order", 2)
        choose(f"{name}: (algorithm_type, solver_order)", solver, tuple(DPM_SOLVERS))
        sampler = DPM_SOLVERS[solver]
    if sampler == "flow_euler":
        values["prediction_type"] = "flow"
    wanted = [schedule for key, schedule in schedules.items() if given.get(key)]
    return SchedulerCard(sampler=sampler, schedule=wanted[0] if wanted else "normal", **values)
