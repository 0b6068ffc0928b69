"""What becomes of a diffusers scheduler_config.json, and what is refused."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from typing import Any

import diffusers
import pytest

from stepforge.export.models.scheduler import CLASSES, EXAMINED, FORMULAS, read_scheduler, scheduler_card
from stepforge.export.oracle import follow
from stepforge.runtime.errors import BundleError, CheckpointError, RequestError
from stepforge.runtime.plan.sampling.sample import sample_steps

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
    """What a class fills in where a config is silent is what the card says; no class of diffusers is unknown."""
    options: dict[str, Any] = {"PNDMScheduler": {"skip_prk_steps": True}}.get(name, {})
    if name.startswith(("DDIM", "DDPM")):
        options = {"clip_sample": False}
    config = json.loads(getattr(diffusers, name)(**options).to_json_string())
    full = scheduler_card(config, EXAMINED)
    silent = scheduler_card({"_class_name": name, **options}, EXAMINED)
    assert replace(full, timestep_spacing=None, set_alpha_to_one=None) == silent
    assert full.sampler == FORMULAS.get(name, name)
    assert (full.table is None) == (name in FORMULAS)


def test_options_of_a_config():
    config = {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True, "algorithm_type": "dpmsolver++"}
    assert scheduler_card({**config, "solver_order": 3}).sampler == "dpmpp_3m"
    assert scheduler_card({**config, "algorithm_type": "sde-dpmsolver++"}).sampler == "dpmpp_2m_sde"
    assert scheduler_card({**config, "euler_at_final": True}).schedule == "karras"
    flow = scheduler_card({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    assert (flow.prediction_type, flow.shift) == ("flow", 3.0)
    # options that the class does not read change nothing
    unread = {"clip_sample": True, "thresholding": True, "new_option": 1}
    assert scheduler_card({**SD15, **unread}) == scheduler_card(SD15)


COMPILED = [
    ("DDPMScheduler", {"variance_type": "fixed_large", "clip_sample": False}),
    ("DEISMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"solver_type": "heun"}),
    ("DPMSolverMultistepScheduler", {"lower_order_final": False}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "sigma_min": 0.03}),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
    ("LCMScheduler", {"original_inference_steps": 100}),
    ("LCMScheduler", {"timestep_scaling": 1.0}),
    ("PNDMScheduler", {"skip_prk_steps": False}),
    ("PNDMScheduler", {"skip_prk_steps": True, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    ("UniPCMultistepScheduler", {"solver_order": 3}),
    ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.02}),
    ("EDMEulerScheduler", {"sigma_data": 1.0, "sigma_max": 120.0, "prediction_type": "v_prediction"}),  # CosXL
]


@pytest.mark.parametrize(("name", "options"), COMPILED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_has_no_formula_is_compiled(name: str, options: dict[str, Any]):
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", **options}
    card = scheduler_card({"_class_name": name, **config}, EXAMINED)
    assert card.sampler == name
    rows, init_noise = sample_steps(card, steps=20)
    scheduler = getattr(diffusers, name).from_config(config)
    trace = follow(scheduler, 20, None, {})
    assert init_noise == trace.latents[0, 0]
    assert tuple(row.t for row in rows) == trace.t
    scheduler.set_timesteps(20)
    assert [row.t for row in rows] == scheduler.timesteps.float().tolist()
    if name.startswith("EDM"):
        with pytest.raises(RequestError, match="predicts edm; name no sampler"):
            sample_steps(card, sampler="euler", steps=20)
    elif name != "FlowMatchEulerDiscreteScheduler" and not card.rescale_betas_zero_snr:
        assert sample_steps(card, sampler="ddim", steps=20)
    with pytest.raises(RequestError, match="takes steps only, not spacing"):
        sample_steps(card, steps=20, spacing="leading")
    with pytest.raises(RequestError, match=r"compiled for .*, not for 21; the nearest is 20"):
        sample_steps(card, steps=21)


def test_betas_that_only_diffusers_knows():
    config = {"_class_name": "DDPMScheduler", "clip_sample": False, "beta_schedule": "sigmoid"}
    card = scheduler_card(config)
    assert (card.sampler, len(card.trained_betas or ())) == ("ddpm", 1000)
    rows, _ = sample_steps(card, steps=8)
    trace = follow(diffusers.DDPMScheduler.from_config(config), 8, None, {})
    assert [row.noise for row in rows] == pytest.approx([*trace.latents.diagonal(8)[1:]], rel=1e-9, abs=1e-9)


PIPELINES = (
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusionInpaintPipeline",
    "StableDiffusionXLInpaintPipeline", "StableDiffusionUpscalePipeline", "StableDiffusionLatentUpscalePipeline",
    "IFPipeline", "IFSuperResolutionPipeline",
)  # fmt: skip


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_what_a_pipeline_corrects(pipeline: str):
    """As the constructor of diffusers' pipeline leaves the config of its scheduler."""
    kind = getattr(diffusers, pipeline)
    options = inspect.signature(kind.__init__).parameters.keys() - {"self", "scheduler"}
    given_none = {"requires_safety_checker": False, "add_watermarker": False}
    parts = {key: given_none.get(key) for key in options if key != "max_noise_level"}
    for config in (
        {**SD15, "steps_offset": 0},
        {key: value for key, value in SD15.items() if key not in ("steps_offset", "clip_sample", "skip_prk_steps")},
        {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},  # clips and counts from 0 by default
        {**SD15, "clip_sample": True, "skip_prk_steps": False},
        SDXL,
        {"_class_name": "EDMEulerScheduler"},
    ):
        name = config["_class_name"]
        given, assumed, corrected = read_scheduler(config, ["diffusers", name], pipeline)
        before = dict(getattr(diffusers, name).from_config(config).config)
        wanted = dict(kind(**parts, scheduler=getattr(diffusers, name).from_config(config)).scheduler.config)
        ours = dict(getattr(diffusers, name).from_config(given).config)
        keys = [key for key in wanted if not key.startswith("_")]
        assert {key: ours.get(key) for key in keys} == {key: wanted[key] for key in keys}
        changed = [key for key in keys if before.get(key) != wanted[key]]
        assert sorted(line.split()[1] for line in corrected) == sorted(changed)
        assert bool(assumed) == ("prediction_type" not in config)


def test_null_is_no_value():
    """Of the options that are true or false it is false, as diffusers takes it; at other ones diffusers stops."""
    nothing = {"set_alpha_to_one": None, "beta_start": None, "clip_sample": None, "trained_betas": None}
    given, assumed, corrected = read_scheduler(
        {"_class_name": "LCMScheduler", **nothing}, ["diffusers", "LCMScheduler"], PIPELINES[1]
    )
    assert (given["set_alpha_to_one"], given["clip_sample"], given["beta_start"]) == (False, False, 0.00085)
    assert [line for line in assumed if "null" in line] == [
        "scheduler: beta_start 0.00085, LCMScheduler's default, because it is null"
    ]
    assert corrected == ()
    theirs = diffusers.LCMScheduler.from_config({**nothing, "beta_start": 0.00085})
    assert theirs.final_alpha_cumprod == diffusers.LCMScheduler.from_config(given).final_alpha_cumprod != 1.0
    assert scheduler_card(given).set_alpha_to_one is False


def test_the_class_is_that_of_the_index():
    given, assumed, corrected = read_scheduler(
        {**SD15, "new": 1}, ["diffusers", "EulerDiscreteScheduler"], PIPELINES[1]
    )
    assert scheduler_card(given).sampler == "euler"
    assert corrected == ("scheduler: EulerDiscreteScheduler, as model_index.json names it, instead of PNDMScheduler",)
    assert "without new, which EulerDiscreteScheduler of diffusers" in assumed[1]
    for entry in (None, ["mine", "EulerDiscreteScheduler"], ["diffusers"], "EulerDiscreteScheduler"):
        with pytest.raises(CheckpointError, match="'diffusers' and a class are expected"):
            read_scheduler(SD15, entry, PIPELINES[0])
    with pytest.raises(BundleError, match="scheduler class is 'IPNDMScheduler'; choose one of DDIM"):
        read_scheduler(SD15, ["diffusers", "IPNDMScheduler"], PIPELINES[0])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "VQDiffusionScheduler"}, "scheduler class is 'VQDiffusionScheduler'; choose one of DDIM"),
        ({}, "scheduler class is None"),
        ({"_class_name": "DPMSolverSDEScheduler"}, "draws noise that no seed decides"),
        ({"_class_name": "DPMSolverSinglestepScheduler", "thresholding": True}, "not linear"),
        ({"_class_name": "HeunDiscreteScheduler", "clip_sample": True}, "not linear"),
        ({**SD15, "prediction_type": "score"}, "prediction_type is 'score'; choose one of epsilon, v_prediction"),
        ({**SD15, "beta_schedule": "cubic"}, "cubic is not implemented"),
        ({**SD15, "timestep_spacing": "even"}, "timestep_spacing is 'even'; choose one of"),
        ({**SD15, "beta_start": 0.0}, "betas must lie between 0 and 1"),
        ({**SD15, "beta_start": "small"}, "PNDMScheduler has a value of the wrong kind"),
        ({**SD15, "num_train_timesteps": 10**9}, "from 1 to 100000 are possible"),
        ({**SD15, "trained_betas": [0.1, 0.2]}, "2 values for 1000 timesteps"),
        ({"_class_name": "DDPMScheduler", "clip_sample": False, "variance_type": "fixed_large_log"}, "not finite"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "Please choose `sigma_min`"),
        ({**SDXL, "use_karras_sigmas": True, "use_beta_sigmas": True}, "Only one of"),
        ({"_class_name": "EulerAncestralDiscreteScheduler", "prediction_type": "sample"}, "not implemented yet"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0.0}, "shift is 0.0; it must be positive"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_configs_that_are_refused(config: dict[str, Any], message: str):
    with pytest.raises((BundleError, CheckpointError)) as error:
        scheduler_card(config, EXAMINED)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
