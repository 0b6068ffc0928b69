"""A model's scheduler as diffusers' pipelines run it, and what a bundle keeps of it.

Where `plan/sampling` has the formula of the class with these options, the bundle keeps the card alone. Otherwise the
steps are compiled by the oracle, for each count of COUNTS, as long as diffusers runs them linearly.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import diffusers

from stepforge.export.oracle import exact_copy, one_line, silent, step_table
from stepforge.runtime.bundle.scheduler import BETA_SCHEDULES, SCHEDULES, SchedulerCard, choose
from stepforge.runtime.errors import BundleError, CheckpointError
from stepforge.runtime.files import printable
from stepforge.runtime.plan.sampling.samplers import SAMPLERS

COUNTS = range(1, 101)  # step counts that are compiled
EXAMINED = (20, 4, 1)  # counts that are compiled before any weight is read, to refuse early

# class -> our sampler, for the options below
FORMULAS = {
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
EDM = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
CLASSES = tuple(
    sorted(
        {
            *FORMULAS, *EDM, *FLOW, "DDIMParallelScheduler", "DDPMParallelScheduler", "DPMSolverSinglestepScheduler",
            "KDPM2AncestralDiscreteScheduler", "SASolverScheduler",
        }
    )
)  # fmt: skip
DPM_SOLVERS = {("dpmsolver++", 2): "dpmpp_2m", ("dpmsolver++", 3): "dpmpp_3m", ("sde-dpmsolver++", 2): "dpmpp_2m_sde"}

# Options that change the numbers, and the values for which our formulas are right.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "clip_sample": (False, True),
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
    "thresholding": (False, True),
    "timestep_scaling": (10.0,),
    "timestep_type": ("discrete",),
    "use_dynamic_shifting": (False,),
    "use_flow_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "variance_type": (
        None,
        "fixed_small",
        "fixed_small_log",
        "learned_range",
    ),  # the fixed ones give the same deviation
}
REQUIRED_OF_CLASS: dict[str, dict[str, tuple[Any, ...]]] = {
    "DEISMultistepScheduler": {"solver_order": (2,)},
    "DPMSolverMultistepScheduler": {"solver_type": ("midpoint", "bh1", "bh2", "logrho")},  # all become midpoint
    "PNDMScheduler": {"skip_prk_steps": (True,)},
    "UniPCMultistepScheduler": {"solver_order": (2,), "solver_type": ("bh2", "midpoint", "heun", "logrho")},
}
# Options without effect once REQUIRED holds (euler_at_final is implied by a final sigma of zero), or read elsewhere.
WITHOUT_EFFECT = {
    "base_image_seq_len", "base_shift", "clip_sample_range", "dynamic_thresholding_ratio", "euler_at_final",
    "flow_shift", "max_image_seq_len", "max_shift", "sample_max_value", "solver_type", "time_shift_type",
}  # fmt: skip
READ_BY_ALL = {"sigma_max", "sigma_min"}  # schedules of sigmas look for these in any config
LIMITS = {"clip_sample", "threshold", "learned_range"}  # fields that are set where the class reads such options
KEPT = {field.name for field in fields(SchedulerCard)} - {"sampler", "schedule", "shift", "table"} - LIMITS
FIXES: dict[str, dict[str, Any]] = {  # what the constructor of a pipeline sets in the scheduler's config
    "StableDiffusionPipeline": {"steps_offset": 1, "clip_sample": False},
    "StableDiffusionInpaintPipeline": {"steps_offset": 1, "skip_prk_steps": True},
}
UNSAID = {"timestep_spacing", "set_alpha_to_one"}  # each sampler has its own default


def read_scheduler(
    config: Mapping[str, Any], entry: Any, pipeline: str
) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]:
    """scheduler_config.json as diffusers' pipeline takes it; what it does not state, and what the pipeline corrects.

    entry: of model_index.json, [library, class]; the class counts, whatever the config says. Raises CheckpointError.
    """
    if not isinstance(entry, list) or len(entry) != 2 or entry[0] != "diffusers":
        shown = printable(repr(entry), 80)
        raise CheckpointError(f"model_index.json gives {shown} for scheduler; 'diffusers' and a class are expected")
    name = entry[1]
    given = {**config, "_class_name": name}
    known = defaults(name)
    assumed = []
    if "prediction_type" in known and config.get("prediction_type") is None:
        assumed.append(
            f"prediction_type: {known['prediction_type']}, {name}'s default, because scheduler_config.json states none"
        )
    if ignored := sorted(key for key in config.keys() - known.keys() - every_option() if not key.startswith("_")):
        unknown = printable(", ".join(ignored), 80)
        assumed.append(f"scheduler: without {unknown}, which {name} of diffusers {diffusers.__version__} does not know")
    for option in [option for option, default in known.items() if option in config and default is not None]:
        if config[option] is None:  # diffusers takes null for false, and stops at other ones
            given[option] = False if isinstance(known[option], bool) else known[option]
            if option != "prediction_type" and given[option] is not False:
                assumed.append(f"scheduler: {option} {known[option]!r}, {name}'s default, because it is null")
    corrected = []
    if (said := config.get("_class_name", name)) != name:
        corrected.append(f"scheduler: {name}, as model_index.json names it, instead of {printable(said, 80)}")
    for option, right in FIXES.get(pipeline, {}).items():
        if (value := given.get(option, known.get(option, right))) != right:
            given[option] = right
            was = printable(repr(value), 80)
            corrected.append(f"scheduler: {option} {right!r} instead of {was}, as {pipeline} sets it")
    return given, tuple(assumed), tuple(corrected)


def scheduler_card(config: Mapping[str, Any], counts: Iterable[int] = COUNTS) -> SchedulerCard:
    """The card of a diffusers scheduler_config.json, with compiled steps for these counts where there is no formula.

    Raises BundleError for what no scheduler can have, CheckpointError for what diffusers does not run, or not linearly.
    """
    known = defaults(config.get("_class_name"))
    name = str(config["_class_name"])
    read = {**known, **{key: value for key, value in config.items() if key in known.keys() | READ_BY_ALL}}
    stated = {**{key: value for key, value in known.items() if key not in UNSAID}, **config}
    values = {key: stated[key] for key in KEPT if stated.get(key) is not None}
    schedules = [schedule for schedule in SCHEDULES[1:] if stated.get(f"use_{schedule}_sigmas")]
    if name in EDM:
        values["prediction_type"] = "edm"
    elif name in FLOW or read.get("use_flow_sigmas"):
        values["prediction_type"] = "flow"
        values["shift"] = stated.get("shift" if name in FLOW else "flow_shift", 1.0)
    if read.get("thresholding"):
        values["threshold"] = read["dynamic_thresholding_ratio"], read["sample_max_value"]
    values["clip_sample"] = bool(read.get("clip_sample"))
    values["learned_range"] = read.get("variance_type") == "learned_range"
    if values.get("prediction_type") == "original_sample":
        values["prediction_type"] = "sample"
    try:
        other = False  # a schedule of betas that only diffusers knows
        if "trained_betas" in values:
            values["trained_betas"] = tuple(float(beta) for beta in values["trained_betas"])
            values.setdefault("num_train_timesteps", len(values["trained_betas"]))
        elif values.get("beta_schedule", "linear") not in BETA_SCHEDULES:
            other = values.pop("beta_schedule") is not None
        card = SchedulerCard(sampler=name, schedule=schedules[0] if schedules else "normal", **values)
    except (TypeError, ValueError) as error:
        raise BundleError(f"{name} has a value of the wrong kind: {one_line(error)}") from None
    formula = formula_of(name, read, card) if len(schedules) < 2 else None
    scheduler = None if formula and not other else built(name, config)
    if other:
        card = replace(card, trained_betas=tuple(exact_copy(scheduler).betas.tolist()))
    if formula:
        return replace(card, sampler=formula)
    return replace(card, table=step_table(scheduler, counts))


def noising_card(config: Mapping[str, Any]) -> SchedulerCard:
    """The card of a scheduler that noises the low-resolution image: of its options only the betas count."""
    plain = {"clip_sample": False, "thresholding": False, "variance_type": "fixed_small", "prediction_type": "epsilon"}
    return scheduler_card({**config, **plain, "_class_name": "DDPMScheduler"}, ())


def formula_of(name: str, read: Mapping[str, Any], card: SchedulerCard) -> str | None:
    """Our sampler that does what the class does with these options, all of its own; None if there is none."""
    sampler = FORMULAS.get(name)
    if name == "DPMSolverMultistepScheduler":
        sampler = DPM_SOLVERS.get((read["algorithm_type"], read["solver_order"]))
    if sampler is None:
        return None
    required = {**REQUIRED, **REQUIRED_OF_CLASS.get(name, {})}
    schedules = {f"use_{schedule}_sigmas" for schedule in SCHEDULES[1:]}
    known = KEPT | {"shift"} | required.keys() | schedules | WITHOUT_EFFECT | {"algorithm_type", "solver_order"}
    if any(value not in required[key] if key in required else key not in known for key, value in read.items()):
        return None
    kind = SAMPLERS[sampler]
    clips = read.get("clip_sample") and not read.get("thresholding")
    if clips and not (kind.clips and read.get("clip_sample_range", 1.0) == 1.0):
        return None
    fits = card.prediction_type in kind.predictions and (kind.zero_snr or not card.rescale_betas_zero_snr)
    return sampler if fits else None


def defaults(name: object) -> dict[str, Any]:
    """Options of a scheduler class of diffusers and their defaults. Raises BundleError for an unknown class."""
    if name == "DPMSolverSDEScheduler":
        raise BundleError("DPMSolverSDEScheduler draws noise that no seed decides; name another class in the model")
    choose("scheduler class", name, CLASSES)
    parameters = inspect.signature(getattr(diffusers, str(name)).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def every_option() -> set[str]:
    """Options of any supported class: configs carry those of their relatives."""
    return {option for name in CLASSES for option in defaults(name)} | {"skip_prk_steps"}


def built(name: str, config: Mapping[str, Any]) -> Any:
    """The scheduler of diffusers. Raises CheckpointError with its reason."""
    try:
        with silent():
            return getattr(diffusers, name).from_config(dict(config))
    except Exception as error:
        raise CheckpointError(f"{name} of diffusers refuses its config: {one_line(error)}") from error
