"""What a bundle keeps of a model's scheduler: the values that its noise schedule and default sampler are computed from."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from stepforge.runtime.bundle.steps import StepTable
from stepforge.runtime.checks import shown
from stepforge.runtime.errors import BundleError

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow", "edm")  # edm: a raw output that its own scheduler weighs
SPACINGS = ("linspace", "leading", "trailing")
SCHEDULES = ("normal", "karras", "exponential", "beta")
SAMPLER_NAMES = (  # keys of plan.sampling.samplers.SAMPLERS
    "ddim",
    "ddpm",
    "deis",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m",
    "euler",
    "euler_a",
    "flow_euler",
    "heun",
    "kdpm2",
    "lcm",
    "lms",
    "pndm",
    "tcd",
    "unipc",
)
COMPILED = re.compile(r"[A-Z][A-Za-z0-9]{0,63}Scheduler")  # name of a sampler whose steps the bundle carries
MOST_TIMESTEPS = 100_000
LEAST_BETA = 1e-9  # 1 − beta must be below 1 in arithmetic
HIGHEST_CAP = 1e6
LISTS = ("trained_betas", "threshold")  # fields that are lists in JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerCard:
    """What a bundle stores of a model's scheduler; hashable.

    A sampler that is none of SAMPLER_NAMES is the class of diffusers whose steps were compiled at export: `table`.

    `timestep_spacing` and `set_alpha_to_one` are None where the model's config is silent: each sampler then takes the
    default of its diffusers class, as `Scheduler.from_config(pipe.scheduler.config)` does.
    """

    sampler: str  # used where a request names none
    schedule: str = "normal"  # sigma schedule used where a request names none
    prediction_type: str = "epsilon"
    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool | None = None
    shift: float = 1.0  # flow models' shift
    threshold: tuple[float, float] | None = None  # ratio and cap of dynamic thresholding, see plan/sampling/limits.py
    clip_sample: bool = False  # the clean latent is clipped to -1..1, unless it is thresholded
    learned_range: bool = False  # the network predicts a variance beside the mean
    table: StepTable | None = field(default=None, repr=False)  # a file of its own, see steps.py

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, str) or not COMPILED.fullmatch(self.sampler):
            choose("sampler", self.sampler, SAMPLER_NAMES)
        choose("schedule", self.schedule, SCHEDULES)
        choose("prediction_type", self.prediction_type, PREDICTIONS)
        choose("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        choose("timestep_spacing", self.timestep_spacing, (None, *SPACINGS))
        choose("rescale_betas_zero_snr", self.rescale_betas_zero_snr, (False, True))
        choose("set_alpha_to_one", self.set_alpha_to_one, (None, False, True))
        choose("clip_sample", self.clip_sample, (False, True))
        choose("learned_range", self.learned_range, (False, True))
        for name in ("num_train_timesteps", "steps_offset"):
            if not isinstance(getattr(self, name), int):
                raise BundleError(f"{name} is {shown(getattr(self, name))}; it must be a whole number")
        if not 1 <= self.num_train_timesteps <= MOST_TIMESTEPS:
            raise BundleError(
                f"num_train_timesteps is {shown(self.num_train_timesteps)}; from 1 to {MOST_TIMESTEPS} are possible"
            )
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise BundleError(
                f"trained_betas has {len(self.trained_betas)} values for {self.num_train_timesteps} timesteps"
            )
        betas = self.trained_betas or (self.beta_start, self.beta_end)
        if not all(LEAST_BETA <= beta < 1.0 for beta in betas):
            raise BundleError(
                f"betas must lie between 0 and 1, and be {LEAST_BETA} at least, here from {min(betas)} to {max(betas)}"
            )
        if not 0.0 < self.shift < math.inf:
            raise BundleError(f"shift is {self.shift}; it must be positive")
        if self.threshold is not None:
            if len(self.threshold) != 2:
                raise BundleError(f"threshold is {shown(self.threshold)}; a ratio and a cap are expected")
            if not 0.0 <= self.threshold[0] <= 1.0 or not 1.0 <= self.threshold[1] <= HIGHEST_CAP:
                limits = f"a ratio from 0 to 1 and a cap from 1 to {HIGHEST_CAP:g} are possible"
                raise BundleError(f"threshold is {shown(self.threshold)}; {limits}")

    @property
    def is_compiled(self) -> bool:
        """Whether the sampler's steps come from a table."""
        return self.sampler not in SAMPLER_NAMES

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the table."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "table"}
        lists = {name: None if values[name] is None else list(values[name]) for name in LISTS}
        return values | lists

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SchedulerCard:
        """Reads what `to_dict` wrote; nothing may be missing or unknown."""
        if not isinstance(values, Mapping):
            raise BundleError(f"scheduler card is {shown(values)}; an object is expected")
        names = {field.name for field in fields(cls)} - {"table"}
        if values.keys() != names:
            wrong = ", ".join(sorted(values.keys() ^ names))
            raise BundleError(f"scheduler card has missing or unknown fields: {wrong}")
        try:
            tuples = {name: None if values[name] is None else tuple(values[name]) for name in LISTS}
            return cls(**{**values, **tuples})
        except TypeError as error:
            raise BundleError(f"scheduler card has a value of the wrong kind: {error}") from None


def choose(what: str, value: object, choices: tuple[Any, ...]) -> None:
    """Refuses a value of a card that is not among the choices."""
    if value not in choices:
        raise BundleError(f"{what} is {shown(value)}; choose one of {', '.join(dict.fromkeys(map(str, choices)))}")
