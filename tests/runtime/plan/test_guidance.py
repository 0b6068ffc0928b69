"""Guidance weights: each form of the grammar against its formula in float64, and step fractions against diffusers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from diffusers.guiders import ClassifierFreeGuidance
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stepforge import Request
from stepforge.runtime.bundle.scheduler import SchedulerCard
from stepforge.runtime.errors import RequestError
from stepforge.runtime.plan import Step
from stepforge.runtime.plan import guidance as values
from stepforge.runtime.plan.guidance import GRAMMAR, parse_guidance
from stepforge.runtime.plan.sampling.sample import sample_steps

CARD = SchedulerCard(sampler="ddim", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")  # SD 1.5
EXACT = {"rtol": 1e-14, "atol": 1e-14}  # both sides are the same few float64 operations in another order


def rows(count: int, sampler: str = "ddim", **options: object) -> tuple[Step, ...]:
    return sample_steps(CARD, sampler=sampler, steps=count, **options)[0]


def weights(guidance: object, steps: Sequence[Step]) -> tuple[float, ...]:
    """Of anything that a request takes."""
    return values.weights(parse_guidance(guidance), steps)


def taus(count: int) -> np.ndarray:
    return np.linspace(0, 1, count)


FORMULAS = {  # text -> weight at progress tau, as the papers write it
    "7.5": lambda tau: 7.5 + 0 * tau,
    " -2 ": lambda tau: -2 + 0 * tau,
    "linear(1..12)": lambda tau: 1 + 11 * tau,
    "linear(7.5..1)": lambda tau: 7.5 - 6.5 * tau,
    "linear(7.5)": lambda tau: 2 * 7.5 * tau,
    "cosine(7.5)": lambda tau: 7.5 * (1 - np.cos(np.pi * tau)),
    "pcs(7.5, s=4)": lambda tau: 7.5 * (1 - np.cos(np.pi * tau**4)) / 2,
    "pcs(7.5, s=0.5)": lambda tau: 7.5 * (1 - np.cos(np.pi * tau**0.5)) / 2,
    "clamp(linear(7.5), 2)": lambda tau: np.maximum(2, 2 * 7.5 * tau),
    "clamp(cosine(7.5), floor=4)": lambda tau: np.maximum(4, 7.5 * (1 - np.cos(np.pi * tau))),
    "clamp( pcs( 7.5,s=4 ),1 )": lambda tau: np.maximum(1, 7.5 * (1 - np.cos(np.pi * tau**4)) / 2),
    # Ho's form c + w'·(c − u) with w' = 6.5 ramped is a weight of 1 + w'(tau)
    "linear(7.5, base=1)": lambda tau: 1 + 2 * 6.5 * tau,
    "cosine(7.5, base=1)": lambda tau: 1 + 6.5 * (1 - np.cos(np.pi * tau)),
    "pcs(7.5, s=2, base=1)": lambda tau: 1 + 6.5 * (1 - np.cos(np.pi * tau**2)) / 2,
    "linear(7.5, base=0)": lambda tau: 2 * 7.5 * tau,
}


@pytest.mark.parametrize("text", FORMULAS)
@pytest.mark.parametrize("count", [2, 3, 20, 50])
def test_formulas(text: str, count: int):
    np.testing.assert_allclose(weights(text, rows(count)), FORMULAS[text](taus(count)), **EXACT)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("base", [0, 1])
def test_ramps_have_the_mean_of_a_constant_weight(shape: str, base: int):
    for count in (1, 2, 7, 20, 100):
        assert np.mean(weights(f"{shape}(7.5, base={base})", rows(count))) == pytest.approx(7.5, rel=1e-13)


def test_a_single_step_stands_in_the_middle_of_a_ramp():
    assert weights("linear(1..12)", rows(1)) == (6.5,)
    assert weights("7.5@0-0.6,1@0.6-1", rows(1)) == (1.0,)  # fractions round down: int(0.6·1) is 0


def test_ramps_begin_exactly_at_their_base():
    """So the first step costs one row: the unconditional one on w, the conditional one on w − 1."""
    for shape in ("linear(7.5", "cosine(7.5", "pcs(7.5, s=4"):
        assert weights(shape + ")", rows(9))[0] == 0.0
        assert weights(shape + ", base=1)", rows(9))[0] == 1.0


LISTS = ("[7.5, 7.5, 1, 1]", "7.5,7.5,1,1", "(7.5, 7.5, 1, 1)", [7.5, 7.5, 1, 1], (7.5, 7.5, 1.0, 1.0))


@pytest.mark.parametrize("guidance", [*LISTS, list(np.array([7.5, 7.5, 1, 1], np.float32))], ids=repr)
def test_lists(guidance: object):
    assert weights(guidance, rows(4)) == (7.5, 7.5, 1.0, 1.0)
    assert parse_guidance(guidance) == (7.5, 7.5, 1.0, 1.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.floats(0, 0.99), st.floats(0, 1))
@example(100, 0.29, 0.57)  # int(0.29·100) is 28
def test_step_fractions_are_those_of_diffusers(count: int, start: float, stop: float):
    start, stop = sorted((round(start, 4), round(stop, 4)))
    if start == stop:
        return
    guider = ClassifierFreeGuidance(guidance_scale=7.5, start=start, stop=stop)
    theirs = []
    for step in range(count):
        guider.set_state(step, count, None)
        theirs.append(7.5 if guider._is_cfg_enabled() else 1.0)
    assert weights(f"interval(7.5, steps={start}..{stop})", rows(count)) == tuple(theirs)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.001, 0.999), max_size=5, unique=True), st.integers(1, 40))
def test_pieces_cover_every_step_once(inner: list[float], count: int):
    bounds = [0.0, *sorted(inner), 1.0]
    parts = list(zip(range(2, len(bounds) + 1), bounds, bounds[1:], strict=False))
    found = weights(",".join(f"{w}@{low!r}-{high!r}" for w, low, high in parts), rows(count))
    for step, w in enumerate(found):
        assert [part for part, low, high in parts if int(low * count) <= step < int(high * count)] == [w]


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0, 20), st.floats(0.001, 20), st.sampled_from(["ddim", "euler", "dpmpp_2m", "unipc"]), st.integers(1, 30)
)
def test_sigma_intervals(low: float, width: float, sampler: str, count: int):
    steps = rows(count, sampler)
    for step, w in zip(steps, weights(f"interval(7.5, sigma={low!r}..{low + width!r})", steps), strict=True):
        assert w == (7.5 if low < step.sigma <= low + width else 1.0)


def test_sigma_intervals_are_open_below_and_closed_above():
    steps = [replace(rows(1)[0], sigma=sigma, index=k) for k, sigma in enumerate((3.0, 2.0, 1.0, 0.5))]
    assert weights("interval(7.5, sigma=1..2)", steps) == (1.0, 7.5, 1.0, 1.0)


def test_an_interval_in_sigma_is_not_one_in_steps():
    """The SD-XL interval of the paper holds half of its 32 steps; on timesteps with uniform spacing it holds 14 of 20."""
    text, rho, n = "interval(7.5, sigma=0.28..5.42)", 7, 32
    assert weights(text, rows(20, "euler")).count(7.5) == 14
    assert weights(text, rows(50, "euler")).count(7.5) == 36
    noise = (80 ** (1 / rho) + np.arange(n) / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho  # EDM
    indices = [k for k, sigma in enumerate(noise) if 0.28 < sigma <= 1.61]
    assert indices == [17, 18, 19, 20, 21, 22]  # kynkaat/guidance-interval runs EDM2-XXL with steps 17 to 22


def test_no_signal_is_a_sigma_above_every_finite_one():
    card = replace(CARD, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    steps, _ = sample_steps(card, sampler="ddim", steps=5)
    assert steps[0].sigma == math.inf
    assert weights("interval(7.5, sigma=0.28..5.42)", steps)[0] == 1.0
    assert weights("interval(7.5, sigma=0.28..inf)", steps)[0] == 7.5
    assert weights("linear(1..12)", steps)[0] == 1.0


CURVES = ("interval(7.5, sigma=0.28..5.42)", "interval(7.5, steps=0.1..0.7)", "7.5@0-0.45,1@0.45-1", *FORMULAS)


@pytest.mark.parametrize("sampler", ["heun", "kdpm2"])
@pytest.mark.parametrize("text", CURVES)
def test_both_evaluations_of_a_step_get_its_weight(sampler: str, text: str):
    """They get what the one evaluation of Euler gets at the same step, whose sigma their first evaluation has."""
    for count in (1, 2, 10, 20):
        pairs, single = rows(count, sampler), weights(text, rows(count, "euler"))
        assert weights(text, pairs) == tuple(single[step.index] for step in pairs)


def test_a_list_must_not_change_within_a_step():
    assert weights([5, 5, 2, 2, 1], rows(3, "heun")) == (5, 5, 2, 2, 1)
    with pytest.raises(RequestError, match=r"two network evaluations of step 1 the weights 2.0 and 1.0"):
        weights([5, 5, 2, 1, 1], rows(3, "heun"))


def test_experts():
    steps = tuple(replace(step, denoiser="unet" if k < 6 else "refiner") for k, step in enumerate(rows(10)))
    assert weights("unet=7.5; refiner=5", steps) == (7.5,) * 6 + (5.0,) * 4
    assert weights("refiner = linear(1..10);unet=3", steps) == pytest.approx((3.0,) * 6 + (7.0, 8.0, 9.0, 10.0))
    assert weights("unet=7@0-0.3,6@0.3-1; refiner=[4,3,2,1]", steps) == (7, 7, 7, 6, 6, 6, 4, 3, 2, 1)
    assert weights("unet=7.5; refiner=5", rows(10)) == (7.5,) * 10  # the plan may run fewer networks than are named
    with pytest.raises(
        RequestError, match="guidance has no weight for refiner, which the plan runs; it names unet, refinr"
    ):
        weights("unet=7.5; refinr=5", steps)
    with pytest.raises(RequestError, match="guidance of refiner has 3 weights, but it has 4 network evaluations"):
        weights("unet=7.5; refiner=1,1,1", steps)


def test_rows_must_number_their_steps():
    """A constant needs no number; progress does."""
    steps = [replace(step, index=0) for step in rows(5)]
    assert weights("7.5", steps) == (7.5,) * 5
    for numbers in ((0, 0, 0, 0, 0), (0, 2, 3, 4, 5), (0, 1, 1, 0, 1)):
        with pytest.raises(RequestError, match="does not number the sampler's steps"):
            weights("linear(7.5)", [replace(step, index=k) for step, k in zip(steps, numbers, strict=True)])
    later = [replace(step, index=k + 5) for k, step in enumerate(steps)]  # the tail of a longer run
    assert weights("linear(1..5)", later) == (1.0, 2.0, 3.0, 4.0, 5.0)


@pytest.mark.parametrize("guidance", [7, 7.5, np.float32(7.5), "7.5", *LISTS, *CURVES, "unet=7.5; refiner=[2,1]"])
def test_a_request_keeps_a_value_that_prints_as_it_was_written(guidance: object):
    request = Request(prompt="x", guidance=guidance)
    stated = json.loads(json.dumps(request.to_dict()["guidance"]))
    again = Request(prompt="x", guidance=stated)
    assert (again, hash(again)) == (request, hash(request))
    assert weights(request.guidance, rows(4)) == weights(guidance, rows(4))
    if isinstance(stated, str):
        named = re.sub(r"floor=|, base=0|[\[\]()]", "", str(guidance))
        assert re.sub(r"[\[\]()\s]", "", stated) == re.sub(r"\s", "", named)


TEXTS = {
    "": "is not a number",
    "lots": "'lots' is not a number",
    "nan": "not a number",
    "1e999": "inf is not a finite number",
    "1_0": "not a number",
    "٣": "not a number",
    "101": "101 is beyond ±100",
    "linear(60)": "120 is beyond ±100",
    "7.5,": "'' is not a number",
    "[7.5": "not a number",
    "7;5": "names no network",
    "unet=7;": "names no network",
    "unet=7;unet=5": "unet is named twice",
    "unet=": "not a number",
    "unet=refiner=5": "not a number",
    "ramp(7.5)": "ramp is unknown",
    "linear()": "linear takes w, base",
    "linear(7.5, 1)": "linear takes w, base",
    "linear(7.5, s=4)": "linear takes w, base, not s",
    "linear(7.5, w=3)": "linear takes w, base, once",
    "linear(7.5, base=2)": "base is 0 (the ramp is on w) or 1 (on w − 1), not 2",
    "linear(1..12, base=1)": "base goes with one weight",
    "linear(1..x)": "is not a range",
    "linear(base=1, 7.5)": "'7.5' stands after a named argument",
    "linear(7.5))": "brackets do not match",
    "linear((7.5)": "brackets do not match",
    "cosine(1..12)": "is not a number",
    "pcs(7.5)": "pcs needs s above 0",
    "pcs(7.5, s=0)": "pcs needs s above 0",
    "clamp(7.5, 2)": "clamp takes linear, cosine or pcs",
    "clamp(interval(7.5, steps=0..1), 2)": "clamp takes linear, cosine or pcs",
    "clamp(linear(7.5))": "clamp takes ramp, floor",
    "interval(7.5)": "either sigma=0.28..5.42 or steps=0.1..0.7",
    "interval(7.5, sigma=0..1, steps=0..1)": "either sigma",
    "interval(7.5, 0.28..5.42)": "interval takes w, sigma, steps",
    "interval(7.5, sigma=5.42..0.28)": "sigma must rise",
    "interval(7.5, sigma=-1..2)": "sigma must rise",
    "interval(7.5, sigma=5)": "is not a range",
    "interval(7.5, steps=0.7..0.1)": "fractions that rise within 0..1",
    "interval(7.5, steps=0..2)": "fractions that rise within 0..1",
    "7.5@0-0.6": "cover 0-1 in order, without gap or overlap",
    "7.5@0-0.6,1@0.7-1": "without gap or overlap",
    "7.5@0-0.6,1@0.5-1": "without gap or overlap",
    "1@0.6-1,7.5@0-0.6": "in order",
    "7.5@0-0.6,1@0.6-0.6,2@0.6-1": "must end above its start",
    "7.5@0-0.6,1": "is written 7.5@0-0.6",
}


@pytest.mark.parametrize("text", TEXTS)
def test_wrong_texts_are_refused_with_the_grammar(text: str):
    with pytest.raises(RequestError, match=re.escape(TEXTS[text])) as error:
        parse_guidance(text)
    assert str(error.value).endswith(GRAMMAR)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "guidance",
    [
        None,
        True,
        [],
        [True],
        ["7.5"],
        [7.5, None],
        {},
        b"75",
        object(),
        10**400,
        10**6000,
        math.inf,
        [math.nan],
        101,
        2j,
    ],
    ids=lambda value: repr(value)[:20] if not isinstance(value, int) else str(value % 1000),
)
def test_wrong_values_are_refused(guidance: object):
    with pytest.raises(RequestError) as error:
        parse_guidance(guidance)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_every_example_of_the_grammar_is_understood():
    found = re.findall(r"[a-z]+\((?:[^()]|\([^()]*\))*\)|\[.*?\]|7\.5@\S+1@0\.6-1|unet=.*$", GRAMMAR)
    assert len(found) == 10
    for text in found:
        parse_guidance(text)


PIECES = re.findall(
    r"\S+", "linear cosine clamp pcs interval ( ) , 7.5 = .. @ - ; sigma steps s base 0 unet [ ] inf nan"
)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from([*PIECES, " ", "\n"]), max_size=14).map("".join)))
def test_any_text_is_understood_or_refused_on_one_line(text: str):
    message = ""
    try:
        kept = parse_guidance(text)
        printed = kept if isinstance(kept, float | tuple) else str(kept)
        assert (parse_guidance(printed), hash(parse_guidance(kept))) == (kept, hash(kept))
    except RequestError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1
    assert len(message) < 1000


@pytest.mark.parametrize(
    "text", ["1" * 20_000 + "x", "clamp(" * 3000, "(" * 9999, "a" * 20_000, ";" * 20_000, "1," * 10_000]
)
def test_long_texts_are_refused_at_once_and_briefly(text: str):
    for long in (text, text * 100):
        with pytest.raises(RequestError) as error:
            parse_guidance(long)
        assert len(str(error.value)) < 1000
