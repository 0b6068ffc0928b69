"""Every sampler against the diffusers scheduler of its name, coefficient by coefficient.

The reference runs with its tables in float64 (`export.schedulers.in_float64`), so that both sides do the same algebra
and only the order of operations differs.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepforge.export.oracle import Trace, exact_copy, follow
from stepforge.runtime.bundle.scheduler import SCHEDULES, SPACINGS, SchedulerCard
from stepforge.runtime.errors import RequestError
from stepforge.runtime.plan import Step, expand
from stepforge.runtime.plan.sampling.levels import SamplerOptions, ahead_levels
from stepforge.runtime.plan.sampling.sample import sample_steps
from stepforge.runtime.plan.sampling.samplers import SAMPLERS

STEPS = (1, 2, 3, 7, 20, 50)
# 50 steps of float64 from sigma 4096 (zero SNR) lose 4 digits to cancellation; the largest seen is 2e-12, and 6e-10 for
# DDPM, whose reference ends with noise of 1e-10 where ours has none.
TOLERANCE = 1e-9
# Timesteps between whole numbers, which diffusers interpolates in float32 logs of its table: a last bit of the logs of two
# neighbours, of 2.7 and 6e-3 apart, moves them by 8e-5 of their distance, once for the table and, in kdpm2, for midpoints.
# Zero terminal SNR takes differences of roots before, and loses two bits more: 4e-4 seen.
BETWEEN = 1e-3

REFERENCES = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
}
CARD = SchedulerCard(  # Stable Diffusion 1.5
    sampler="pndm",
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    set_alpha_to_one=False,
)
FLOW = SchedulerCard(sampler="flow_euler", prediction_type="flow", shift=3.0)
# Their references are slow: made by a Python loop over all training timesteps, and LMS integrates by quadrature.
SLOW = ("heun", "kdpm2", "lms")
BY_COST = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SAMPLERS if name != "flow_euler"
]
# Longest windows over latents and predictions where the network predicts epsilon.
WINDOWS = {
    **dict.fromkeys(("ddim", "ddpm", "euler", "euler_a", "lcm", "tcd"), (1, 1)),
    **dict.fromkeys(("heun", "kdpm2", "deis"), (1, 2)),
    **dict.fromkeys(("dpmpp_2m", "dpmpp_2m_sde"), (2, 2)),
    "dpmpp_3m": (3, 3),
    "unipc": (3, 3),
    "lms": (1, 4),
    "pndm": (1, 5),
}


def reference(card: SchedulerCard, sampler: str, schedule: str = "normal", spacing: str | None = None):
    """The diffusers scheduler that the card, sampler, schedule and spacing stand for."""
    class_name, options = REFERENCES[sampler]
    options = dict(options)
    if sampler == "flow_euler":
        options |= {"shift": card.shift, "num_train_timesteps": card.num_train_timesteps}
    else:
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
        options |= {name: getattr(card, name) for name in names}
    if card.rescale_betas_zero_snr:
        options["rescale_betas_zero_snr"] = True
    if sampler in ("ddim", "pndm") and card.set_alpha_to_one is not None:
        options["set_alpha_to_one"] = card.set_alpha_to_one
    if SAMPLERS[sampler].spacing:
        options |= {"steps_offset": card.steps_offset}
        options |= {"timestep_spacing": spacing} if spacing else {}
    if schedule != "normal":
        options[f"use_{schedule}_sigmas"] = True
    return getattr(diffusers, class_name)(**options)


def traced(
    card: SchedulerCard, sampler: str, schedule: str = "normal", spacing: str | None = None, **options: float
) -> Callable[[int], Trace]:
    """Traces of one reference by step count. options: of its `step`."""
    scheduler = reference(card, sampler, schedule, spacing)
    exact = exact_copy(scheduler)
    return lambda steps: follow(scheduler, steps, options, {}, exact)


def distance(rows: tuple[Step, ...], init_noise: float, trace: Trace) -> float:
    """Largest difference of any coefficient of any latent, relative to the largest coefficient of that latent."""
    ours = expand(rows, init_noise)
    count = len(trace.t)
    assert len(ours) == count + 1
    worst = 0.0
    for latent, wanted in zip(ours, trace.latents, strict=True):
        vector = np.zeros(1 + 2 * count)
        for (name, k), value in latent.items():
            vector[{"x": 0, "p": 1, "z": 1 + count}[name] + k] = value
        worst = max(worst, float(np.abs(vector - wanted).max() / np.abs(wanted).max()))
    return worst


def check(rows: tuple[Step, ...], init_noise: float, trace: Trace, case: object) -> None:
    assert distance(rows, init_noise, trace) < TOLERANCE, case
    for row, t, scale_in, sigma, denoised in zip(
        rows, trace.t, trace.scale_in, trace.sigma, trace.denoised, strict=True
    ):
        assert row.t == pytest.approx(t, abs=BETWEEN if t % 1 else 0), case
        assert row.scale_in == pytest.approx(scale_in, rel=1e-12), case
        assert row.sigma == pytest.approx(sigma, rel=1e-9, abs=1e-12), case
        assert row.denoised == pytest.approx(denoised, rel=1e-9, abs=1e-9), case


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", BY_COST)
def test_coefficients(sampler: str, prediction: str):
    kind = SAMPLERS[sampler]
    card = replace(CARD, prediction_type=prediction, num_train_timesteps=200 if sampler in SLOW else 1000)
    if prediction not in kind.predictions:
        with pytest.raises(RequestError, match=f"predicts {prediction}; choose one of"):
            sample_steps(card, sampler=sampler, steps=7)
        return
    spacings = SPACINGS if kind.spacing else (None,)
    latents = predictions = 0
    counts = STEPS if prediction == "epsilon" else (1, 3, 20)
    for spacing, schedule in itertools.product(spacings, kind.schedules):
        trace = traced(card, sampler, schedule, spacing)
        few = sampler in SLOW and (spacing, schedule) not in (("linspace", "normal"), ("trailing", "karras"))
        for steps in (count for count in counts if count <= 7 or not few):
            rows, init_noise = sample_steps(card, sampler=sampler, steps=steps, schedule=schedule, spacing=spacing)
            check(rows, init_noise, trace(steps), (spacing, schedule, steps))
            latents = max(latents, *(len(row.keep) for row in rows))
            predictions = max(predictions, *(len(row.gain) for row in rows))
    if prediction == "epsilon":
        assert (latents, predictions) == WINDOWS[sampler]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "flow_euler"])
def test_zero_terminal_snr(sampler: str, prediction: str):
    kind = SAMPLERS[sampler]
    card = replace(CARD, prediction_type=prediction, rescale_betas_zero_snr=True)
    if prediction not in kind.predictions:
        pytest.skip("refused for the prediction type; see test_coefficients")
    if not kind.zero_snr:  # their diffusers classes have no such option, and drop it from a config
        with pytest.raises(RequestError, match="zero terminal SNR; choose one of ddim"):
            sample_steps(card, sampler=sampler, steps=7)
        return
    if prediction == "epsilon" and sampler in ("ddim", "ddpm", "lcm", "tcd"):  # diffusers: x0 = (x − eps) / 0
        with pytest.raises(RequestError, match="no signal"):
            sample_steps(card, sampler=sampler, steps=7, spacing="trailing" if kind.spacing else None)
        return
    spacing = "trailing" if kind.spacing else None
    for schedule in kind.schedules:
        trace = traced(card, sampler, schedule, spacing)
        for steps in (1, 2, 7, 20):
            rows, init_noise = sample_steps(card, sampler=sampler, steps=steps, schedule=schedule, spacing=spacing)
            assert rows[0].sigma == math.inf or rows[0].sigma == pytest.approx(4096, rel=1e-3)
            check(rows, init_noise, trace(steps), (schedule, steps))


@pytest.mark.parametrize("betas", [("linear", 0.0001, 0.02), ("squaredcos_cap_v2", 0.0001, 0.02)], ids=lambda b: b[0])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m", "unipc", "deis", "pndm"])
def test_beta_schedules(sampler: str, betas: tuple[str, float, float]):
    name, start, end = betas
    card = replace(CARD, beta_schedule=name, beta_start=start, beta_end=end, set_alpha_to_one=None, steps_offset=0)
    for schedule in ("normal", "karras") if "karras" in SAMPLERS[sampler].schedules else ("normal",):
        rows, init_noise = sample_steps(card, sampler=sampler, steps=12, schedule=schedule)
        check(rows, init_noise, follow(reference(card, sampler, schedule), 12, None, {}), schedule)


def test_trained_betas():
    betas = tuple(float(beta) for beta in np.linspace(0.001, 0.03, 100))
    card = replace(CARD, trained_betas=betas, num_train_timesteps=100)
    rows, init_noise = sample_steps(card, sampler="dpmpp_2m", steps=9)
    check(rows, init_noise, follow(reference(card, "dpmpp_2m"), 9, None, {}), None)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "tcd"])
def test_eta(sampler: str, eta: float):
    for prediction, snr in itertools.product(("epsilon", "v_prediction", "sample"), (False, True)):
        if snr and (prediction == "epsilon" or (sampler == "ddim" and eta == 1)):
            continue  # no signal at the start; see test_zero_terminal_snr. diffusers: root of a rounded, negative 0
        card = replace(CARD, prediction_type=prediction, rescale_betas_zero_snr=snr, timestep_spacing="trailing")
        trace = traced(card, sampler, spacing="trailing", eta=eta)
        for steps in (1, 3, 20):
            rows, init_noise = sample_steps(card, sampler=sampler, steps=steps, eta=eta)
            check(rows, init_noise, trace(steps), (prediction, snr, steps))


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if "timesteps" in SAMPLERS[name].custom])
def test_custom_timesteps(sampler: str):
    card = FLOW if sampler == "flow_euler" else CARD
    for timesteps in ([999, 850, 600, 359, 80, 10], [499], [721, 80, 1]):
        rows, init_noise = sample_steps(card, sampler=sampler, timesteps=timesteps)
        check(rows, init_noise, follow(reference(card, sampler), None, None, {"timesteps": timesteps}), timesteps)


def test_custom_sigmas_of_flow():
    for sigmas in ([1.0, 0.75, 0.5, 0.25], [0.9], [0.6, 0.1]):
        rows, init_noise = sample_steps(FLOW, sigmas=sigmas)
        check(rows, init_noise, follow(reference(FLOW, "flow_euler"), None, None, {"sigmas": sigmas}), sigmas)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.floats(0.03, 80.0), min_size=1, max_size=12, unique=True), st.floats(0.0, 0.029))
def test_custom_sigmas_of_euler(sigmas: list[float], last: float):
    sigmas = [*sorted(sigmas, reverse=True), last]
    rows, init_noise = sample_steps(CARD, sampler="euler", sigmas=sigmas)
    check(rows, init_noise, follow(reference(CARD, "euler"), None, None, {"sigmas": sigmas}), sigmas)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_flow_euler(schedule: str, shift: float):
    card = replace(FLOW, shift=shift)
    trace = traced(card, "flow_euler", schedule)
    for steps in STEPS:
        rows, init_noise = sample_steps(card, steps=steps, schedule=schedule)
        check(rows, init_noise, trace(steps), steps)


@pytest.mark.parametrize("field", ["keep", "gain", "noise"])
def test_a_wrong_coefficient_is_noticed(field: str):
    rows, init_noise = sample_steps(CARD, sampler="dpmpp_2m_sde", steps=7)
    trace = follow(reference(CARD, "dpmpp_2m_sde"), 7, None, {})
    value = getattr(rows[3], field)
    wrong = value * (1 + 1e-6) if field == "noise" else (value[0], value[1] * (1 + 1e-6))
    bent = (*rows[:3], replace(rows[3], **{field: wrong}), *rows[4:])
    assert distance(rows, init_noise, trace) < TOLERANCE < distance(bent, init_noise, trace)


def network(latent: np.ndarray, t: float) -> np.ndarray:
    """A fixed network that is not linear."""
    return np.tanh(latent) + 0.3 * np.sin(3 * latent + t / 200)


def run(rows: tuple[Step, ...], init_noise: float, start: np.ndarray, noise: np.ndarray) -> np.ndarray:
    latents, predictions = [start * init_noise], []
    for k, row in enumerate(rows):
        predictions.append(network(row.scale_in * latents[-1], row.t))
        kept = sum(factor * latents[k - i] for i, factor in enumerate(row.keep))
        gained = sum(factor * predictions[k - j] for j, factor in enumerate(row.gain))
        latents.append(kept + gained + row.noise * noise[k])
    return latents[-1]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_trajectory(sampler: str, monkeypatch: pytest.MonkeyPatch):
    """A whole trajectory of diffusers as users run it, with its float32 tables."""
    card = FLOW if sampler == "flow_euler" else CARD
    schedules = ("normal", "karras") if "karras" in SAMPLERS[sampler].schedules else ("normal",)
    for schedule in schedules:
        scheduler = reference(card, sampler, schedule)
        rows, init_noise = sample_steps(card, sampler=sampler, steps=20, schedule=schedule)
        random = np.random.default_rng(1)
        start, noise = random.normal(size=(1, 4, 8, 8)), random.normal(size=(len(rows), 1, 4, 8, 8))
        draws = iter(noise)
        module = importlib.import_module(type(scheduler).__module__)
        given_noise = lambda *_, draws=draws, **__: torch.tensor(next(draws))  # noqa: E731
        monkeypatch.setattr(module, "randn_tensor", given_noise, raising=False)
        scheduler.set_timesteps(20)
        latent = torch.tensor(start) * float(getattr(scheduler, "init_noise_sigma", 1.0))
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latent, t) if hasattr(scheduler, "scale_model_input") else latent
            latent = scheduler.step(torch.tensor(network(scaled.numpy(), float(t))), t, latent).prev_sample.double()
        ours, wanted = run(rows, init_noise, start, noise), latent.numpy()
        # float32 tables and sample casts: 6e-8 a step, times the network's slope of 2, over 20 steps; 2e-6 seen
        assert np.sqrt(np.mean((ours - wanted) ** 2) / np.mean(wanted**2)) < 5e-6, schedule


# Their timesteps are whole now and then only; all others tell the network whole numbers.
BROKEN = ("euler", "euler_a", "flow_euler", "heun", "kdpm2", "lms")


@contextmanager
def ieee_roots() -> Iterator[None]:
    """Within, torch's float32 roots are rounded as IEEE 754 has it, and its logs and exponentials are NumPy's.

    Torch's own are those of its build on a processor: MKL's root is a unit off for 190 of SD's 1000 timesteps on AMD EPYC.
    """
    plain = {name: getattr(torch.Tensor, name) for name in ("__pow__", "sqrt", "log", "exp")}

    def replaced(name, function, *exponent):
        def call(self, *given):
            if self.dtype == torch.float32 and given == exponent:
                return torch.from_numpy(np.asarray(function(self.numpy())))
            return plain[name](self, *given)

        return call

    with pytest.MonkeyPatch.context() as patch, np.errstate(divide="ignore"):
        patch.setattr(torch.Tensor, "__pow__", replaced("__pow__", np.sqrt, 0.5))
        for name in ("sqrt", "log", "exp"):
            patch.setattr(torch.Tensor, name, replaced(name, getattr(np, name)))
        yield


# The variants of DPM-Solver++ share one class of diffusers and one function here.
ONE_OF_A_KIND = [name for name in SAMPLERS if name not in ("dpmpp_2m_sde", "dpmpp_3m")]
# every step count in the long lane; here the shortest and longest, and those that divide the table and do not
LANES = [(name, False) for name in ONE_OF_A_KIND]
LANES += [pytest.param(name, True, marks=pytest.mark.long) for name in ONE_OF_A_KIND if name not in BROKEN]


@pytest.mark.parametrize(("sampler", "every"), LANES)
def test_timesteps_are_those_of_diffusers(sampler: str, every: bool):
    """Of schedulers as users run them, in float32: every schedule and spacing, and step counts to 100.

    Whole numbers are equal, and all others to the last bit where torch's roots are rounded as IEEE 754 has it.
    """
    kind, card = SAMPLERS[sampler], FLOW if sampler == "flow_euler" else CARD
    betas = ("scaled_linear",) if sampler in SLOW or not kind.spacing else ("scaled_linear", "linear")
    for name, spacing, schedule in itertools.product(betas, SPACINGS if kind.spacing else (None,), kind.schedules):
        if kind.levels is ahead_levels and schedule != "normal" and spacing != "linspace":
            continue  # spans the whole table, whatever the spacing
        case = replace(card, beta_schedule=name, num_train_timesteps=200 if sampler in SLOW else 1000)
        scheduler = reference(case, sampler, schedule, spacing)
        most = 50 if kind.spacing is None and sampler not in BROKEN else 100
        for steps in range(1, most + 1) if every else (1, 2, 7, 20, 50, most - 1):
            if spacing == "trailing" and steps == 61:
                continue  # diffusers makes one timestep too many: np.arange(1000, 0, -1000 / 61) has 62 values
            options = SamplerOptions(
                sampler=sampler, steps=steps, schedule=schedule, spacing=spacing or "", timesteps=None, sigmas=None,
                eta=0.0, alpha_to_one=False,
            )  # fmt: skip
            scheduler.set_timesteps(steps)
            theirs = scheduler.timesteps.double().numpy()
            ours = np.array([level.t for level in kind.levels(case, options).at], np.float32)
            where = str((name, spacing, schedule, steps))
            np.testing.assert_allclose(ours, theirs, 0, 0 if (theirs % 1 == 0).all() else BETWEEN, err_msg=where)
            assert (theirs % 1 == 0).all() or sampler in BROKEN
            if sampler in BROKEN:
                with ieee_roots():
                    scheduler.set_timesteps(steps)
                rounded = scheduler.timesteps.numpy().astype(
                    np.float32
                )  # float32 is what networks take; kdpm2 keeps float64
                np.testing.assert_array_equal(ours, rounded, err_msg=where)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "unipc", "euler"])
def test_timesteps_of_zero_terminal_snr(sampler: str):
    card = replace(CARD, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    for schedule in SCHEDULES:
        scheduler = reference(card, sampler, schedule, "trailing")
        for steps in (1, 7, 20, 50):
            rows, _ = sample_steps(card, sampler=sampler, steps=steps, schedule=schedule, spacing="trailing")
            scheduler.set_timesteps(steps)
            theirs = scheduler.timesteps.double().numpy()
            ours = [row.t for row in rows]
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=0 if sampler != "euler" else BETWEEN)
            with ieee_roots():
                rounded = reference(card, sampler, schedule, "trailing")
                rounded.set_timesteps(steps)
            np.testing.assert_array_equal(np.array(ours, np.float32), rounded.timesteps.numpy())


@pytest.mark.parametrize(
    ("card", "request_", "message"),
    [
        (CARD, {"sampler": "eular", "steps": 5}, r"sampler is 'eular'; choose one of ddim, ddpm"),
        (CARD, {"sampler": "flow_euler", "steps": 5}, r"'flow_euler' cannot run a model that predicts epsilon"),
        (FLOW, {"sampler": "ddim", "steps": 5}, r"predicts flow; choose one of flow_euler"),
        (CARD, {"steps": 5, "schedule": "karras"}, r"schedule of sampler 'pndm' is 'karras'; choose one of normal"),
        (CARD, {"sampler": "euler", "steps": 5, "schedule": "karas"}, r"normal, karras, exponential, beta"),
        (CARD, {"steps": 5, "spacing": "even"}, r"spacing is 'even'; choose one of linspace, leading, trailing"),
        (CARD, {"sampler": "lcm", "steps": 5, "spacing": "leading"}, r"takes no spacing"),
        (CARD, {"sampler": "lcm", "steps": 51}, r"takes 1 to 50 steps"),
        (CARD, {"sampler": "ddim", "sigmas": [3, 1, 0]}, r"takes no sigmas of a request; choose one of euler"),
        (CARD, {"sampler": "unipc", "timesteps": [9, 1]}, r"takes no timesteps of a request; choose one of ddpm"),
        (CARD, {"sampler": "euler", "steps": 2, "sigmas": [3, 1, 0]}, r"exactly one of steps, timesteps and sigmas"),
        (CARD, {"sampler": "euler"}, r"exactly one of steps, timesteps and sigmas"),
        (CARD, {"sampler": "euler", "sigmas": [1, 3, 0]}, r"strictly falling"),
        (CARD, {"sampler": "euler", "sigmas": [3]}, r"must be two or more"),
        (CARD, {"sampler": "euler", "sigmas": [3, 0, -1]}, r"above 0 but for the last"),
        (CARD, {"sampler": "euler", "sigmas": ["a"]}, r"list of numbers"),
        (CARD, {"sampler": "euler", "sigmas": [math.inf, 0]}, r"finite"),
        (FLOW, {"sigmas": [2.0, 1.0]}, r"above 0 and up to 1"),
        (CARD, {"sampler": "euler", "timesteps": [1000, 3]}, r"timesteps must lie in 0..999"),
        (CARD, {"sampler": "ddpm", "timesteps": [99.5, 3]}, r"must be whole numbers"),
        (CARD, {"sampler": "euler", "timesteps": [9, 3], "schedule": "karras"}, r"makes its own sigmas"),
        (CARD, {"sampler": "euler", "steps": 5, "eta": 1.0}, r"has no eta; choose one of ddim, tcd"),
        (CARD, {"sampler": "ddim", "steps": 5, "eta": 1.5}, r"must lie in 0..1"),
        (CARD, {"steps": 0}, r"whole number from 1 to 1000"),
        (CARD, {"steps": 1001}, r"whole number from 1 to 1000"),
        (CARD, {"steps": 2.5}, r"whole number from 1 to 1000"),
        (CARD, {"sampler": "dpmpp_2m", "steps": 1000}, r"too many for this spacing"),
    ],
    ids=lambda value: "" if isinstance(value, SchedulerCard | str) else "-".join(map(str, value.values())),
)
def test_refusals(card: SchedulerCard, request_: dict, message: str):
    with pytest.raises(RequestError, match=message) as error:
        sample_steps(card, **request_)
    assert "\n" not in str(error.value)


def test_the_models_own_choices():
    own = replace(CARD, sampler="euler", schedule="karras", timestep_spacing="trailing")
    asked = {"sampler": "euler", "steps": 9}
    assert sample_steps(own, steps=9) == sample_steps(CARD, **asked, schedule="karras", spacing="trailing")
    assert sample_steps(own, sampler="ddim", steps=9) == sample_steps(CARD, sampler="ddim", steps=9, spacing="trailing")
    assert sample_steps(own, steps=9, schedule="normal", spacing="linspace") == sample_steps(CARD, **asked)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rows_are_plain_floats(sampler: str):
    rows, init_noise = sample_steps(FLOW if sampler == "flow_euler" else CARD, sampler=sampler, steps=5)
    values = [init_noise]
    for row in rows:
        values += [row.t, row.sigma, row.scale_in, row.noise, *row.keep, *row.gain, *row.denoised]
    assert {type(value) for value in values} == {float}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rows_number_the_steps_of_the_sampler(sampler: str):
    """Two evaluations share a step of heun and kdpm2, and their last step has one; all others have one a step."""
    for count in (1, 2, 5):
        rows, _ = sample_steps(FLOW if sampler == "flow_euler" else CARD, sampler=sampler, steps=count)
        indices = [row.index for row in rows]
        if sampler in ("heun", "kdpm2"):
            assert indices == [k for k in range(count) for _ in range(2)][:-1]
        else:
            assert indices == list(range(len(rows)))
