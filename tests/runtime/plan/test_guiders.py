"""Guiders against diffusers' guiders and schedulers where those are right, else against float64 formulas."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from stepforge.runtime.bundle.scheduler import SchedulerCard
from stepforge.runtime.errors import RequestError
from stepforge.runtime.plan import Step
from stepforge.runtime.plan.guiders import GRAMMAR, PARTS, Guider
from stepforge.runtime.plan.sampling.sample import sample_steps

parse = Guider.parse
CARD = SchedulerCard(sampler="ddim", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SHAPE = (4, 9, 7)
STEPS = 6
# Both sides are float32 but for the reductions, whose order differs: a few epsilons (6e-8) of the largest of the terms
# that are added, which are up to w = 7.5 times the result. 2.1e-7 seen, relative to the largest value.
FLOAT32 = 1e-6
# diffusers sums ⟨cond, uncond⟩ and |uncond|² in float32: a scale wrong by 2e-7, of which guidance makes 1 − w = −6.5 times
# as much. 1.5e-6 seen.
FLOAT32_SUMS = 3e-6


def rows(count: int = STEPS, sampler: str = "ddim", w: float = 7.5, **options: object) -> list[Step]:
    return [replace(step, guidance=w) for step in sample_steps(CARD, sampler=sampler, steps=count, **options)[0]]


def predictions(seed: int = 0, count: int = STEPS, near: float = 0.5) -> list[tuple[np.ndarray, np.ndarray]]:
    """cond and uncond of each evaluation, [C, h, w]; near: size of their difference."""
    random = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        uncond = random.normal(size=SHAPE)
        pairs.append(((uncond + near * random.normal(size=SHAPE)).astype(np.float32), uncond.astype(np.float32)))
    return pairs


def run(
    guider: Guider, steps: Sequence[Step], pairs: Sequence[tuple[np.ndarray, np.ndarray]], x: np.ndarray | None = None
) -> tuple[list[np.ndarray], list[int]]:
    """The guided predictions of one image, [C, h, w], and the rows that each evaluation cost; as the engine calls it."""
    state, guided, cost = guider.start(), [], []
    latent = np.zeros(math.prod(SHAPE), np.float32) if x is None else x.reshape(-1)
    for step, (cond, uncond) in zip(steps, pairs, strict=True):
        w = state.weight(step)
        out = np.full(math.prod(SHAPE), np.nan, np.float32)
        some = [p.reshape(-1) if use else None for p, use in ((cond, w != 0.0), (uncond, w != 1.0))]
        kept = [None if p is None else p.copy() for p in some]
        guider(state, step, w, latent, some[0], some[1], out)
        for before, after in zip(kept, some, strict=True):
            assert before is None or (before == after).all()  # inputs stay as they are
        assert out.dtype == np.float32
        guided.append(out.reshape(SHAPE))
        cost.append(sum(p is not None for p in some))
    return guided, cost


def theirs(guider: object, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """What a guider of diffusers makes of the same predictions."""
    found = []
    for step, (cond, uncond) in enumerate(pairs):
        guider.set_state(step, len(pairs), torch.tensor(0))
        guider.prepare_inputs({"sample": (torch.zeros(1), torch.zeros(1))})  # APG makes its momentum here
        found.append(guider.forward(torch.tensor(cond)[None], torch.tensor(uncond)[None]).pred[0].numpy())
    return found


def check(ours: Sequence[np.ndarray], wanted: Sequence[np.ndarray], tolerance: float = FLOAT32) -> None:
    for a, b in zip(ours, wanted, strict=True):
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


CASES = {
    "cfg": (ClassifierFreeGuidance, {}),
    "rescale(0.7)": (ClassifierFreeGuidance, {"guidance_rescale": 0.7}),
    "cfg+rescale(phi=1)": (ClassifierFreeGuidance, {"guidance_rescale": 1.0}),
    "zero_star(zero=0)": (ClassifierFreeZeroStarGuidance, {"zero_init_steps": 0}),
    "zero_star": (ClassifierFreeZeroStarGuidance, {"zero_init_steps": 1}),
    "zero_star(3)": (ClassifierFreeZeroStarGuidance, {"zero_init_steps": 3}),
    "zero_star(0)+rescale": (ClassifierFreeZeroStarGuidance, {"zero_init_steps": 0, "guidance_rescale": 0.7}),
    "apg": (AdaptiveProjectedGuidance, {"adaptive_projected_guidance_momentum": -0.5}),
    "apg(0)": (AdaptiveProjectedGuidance, {}),
    "apg(momentum=-0.75, norm=2.5, eta=0)": (
        AdaptiveProjectedGuidance,
        {
            "adaptive_projected_guidance_momentum": -0.75,
            "adaptive_projected_guidance_rescale": 2.5,
            "eta": 0.0,
        },
    ),
    "apg(0.3, 0, 0.5) + rescale(0.4)": (
        AdaptiveProjectedGuidance,
        {
            "adaptive_projected_guidance_momentum": 0.3,
            "adaptive_projected_guidance_rescale": 0.0,
            "eta": 0.5,
            "guidance_rescale": 0.4,
        },
    ),
}


@pytest.mark.parametrize("w", [7.5, 2.0, 0.4, -1.0])
@pytest.mark.parametrize("text", CASES)
def test_against_diffusers(text: str, w: float):
    kind, options = CASES[text]
    for near in (0.01, 0.5, 3.0):
        pairs = predictions(near=near)
        ours, _ = run(parse(text), rows(w=w), pairs)
        tolerance = FLOAT32_SUMS if text.startswith("zero_star") else FLOAT32
        check(ours, theirs(kind(guidance_scale=w, **options), pairs), tolerance)


def test_momentum_and_norm_matter_in_the_comparison():
    """Else the test above would not see them."""
    pairs = predictions()
    for other in ("apg(momentum=-0.49)", "apg(norm=5)", "apg(eta=0.9)"):
        ours, _ = run(parse(other), rows(), pairs)
        wanted = theirs(AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=-0.5), pairs)
        assert np.abs(ours[-1] - wanted[-1]).max() > 1e-3 * np.abs(wanted[-1]).max(), other


def test_apg_of_the_paper_differs():
    """cond + (w − 1)·d of the paper is uncond + w·d only while d is cond − uncond (eta 1, no momentum, no limit)."""
    pairs, plain = predictions(), parse("apg(momentum=0, norm=0, eta=1)")
    check(run(plain, rows(), pairs)[0], run(parse("cfg"), rows(), pairs)[0])
    options = {"adaptive_projected_guidance_rescale": 2.5, "eta": 0.0}
    paper = theirs(AdaptiveProjectedGuidance(guidance_scale=6.5, use_original_formulation=True, **options), pairs)
    ours, _ = run(parse("apg(0, 2.5, 0)"), rows(), pairs)
    assert np.abs(ours[0] - paper[0]).max() > 0.1


@pytest.mark.parametrize("text", ["cfg", "zero_star(0)", "apg", "rescale", "apg+rescale", "adaptive+rescale"])
def test_a_missing_row_leaves_the_other(text: str):
    pairs = predictions()
    for w, chosen in ((1.0, 0), (0.0, 1)):
        ours, cost = run(parse(text), rows(w=w), pairs)
        assert all((out == pair[chosen]).all() for out, pair in zip(ours, pairs, strict=True))
        assert cost == [1] * STEPS
    if text in CASES:  # diffusers, too, passes the conditional prediction on and leaves its momentum alone
        kind, options = CASES[text]
        steps = [replace(step, guidance=w) for step, w in zip(rows(), (1, 7.5, 1, 1, 7.5, 7.5), strict=True)]
        guider, wanted = kind(guidance_scale=7.5, **options), []
        for k, (step, pair) in enumerate(zip(steps, pairs, strict=True)):
            guider.guidance_scale = step.guidance
            guider.set_state(k, STEPS, torch.tensor(0))
            guider.prepare_inputs({"sample": (torch.zeros(1), torch.zeros(1))})
            wanted.append(guider.forward(*(torch.tensor(p)[None] for p in pair)).pred[0].numpy())
        check(run(parse(text), steps, pairs)[0], wanted, FLOAT32_SUMS)


def test_plain_guidance_is_what_the_engine_did():
    """Bit for bit: cond − uncond, times w, plus uncond."""
    for out, (cond, uncond) in zip(run(parse("cfg"), rows(), predictions())[0], predictions(), strict=True):
        wanted = np.subtract(cond, uncond)
        wanted *= np.float32(7.5)
        wanted += uncond
        assert (out == wanted).all()


def test_zeroed_steps():
    """Zeroed whatever the weight, as in diffusers; they cost one row; both evaluations of a step are zeroed."""
    pairs = predictions()
    for w in (7.5, 1.0, 0.0):
        ours, cost = run(parse("zero_star(2)+rescale"), rows(w=w), pairs)
        assert [bool(out.any()) for out in ours] == [False, False, True, True, True, True]
        assert cost == [1, 1, *[2 if w == 7.5 else 1] * 4]
    wanted = theirs(ClassifierFreeZeroStarGuidance(guidance_scale=1.0, zero_init_steps=2), pairs)
    check(run(parse("zero_star(2)"), rows(w=1.0), pairs)[0], wanted, tolerance=0)
    heun = rows(4, "heun")
    ours, cost = run(parse("zero_star(1)"), heun, predictions(count=len(heun)))
    assert [bool(out.any()) for out in ours] == [False, False, True, True, True, True, True]
    assert cost == [1, 1, 2, 2, 2, 2, 2]


def test_the_optimised_scale_is_a_projection():
    """cond − s·uncond is orthogonal to uncond, in float64 up to the 1e-8 beside |uncond|² and float32 outputs."""
    cond, uncond = predictions()[0]
    s_uncond = run(parse("zero_star(0)"), rows(1, w=1e-30), [(cond, uncond)])[0][0].astype(np.float64)
    assert abs(((cond - s_uncond) * uncond).sum()) < 1e-5 * (uncond**2).sum()


def test_a_zero_prediction_is_no_trouble():
    zero = np.zeros(SHAPE, np.float32)
    for text in ("cfg+rescale", "zero_star(0)+rescale", "apg+rescale", "adaptive+dynamic"):
        ours, _ = run(parse(text), rows(), [(zero, zero)] * STEPS)
        assert all((out == 0).all() for out in ours), text


class TestAdaptive:
    """Castillo et al.: conditional row only, once the cosine has exceeded the threshold."""

    NEAR = (1.0, 0.5, 0.1, 0.5, 0.01, 0.5)  # cosines of about 0.71, 0.89, 0.995, 0.89, 1.0, 0.89

    def pairs(self, count: int = STEPS) -> list[tuple[np.ndarray, np.ndarray]]:
        return [predictions(seed, 1, near)[0] for seed, near in enumerate(self.NEAR[:count])]

    def reference(
        self, pairs: Sequence[tuple[np.ndarray, np.ndarray]], limit: float
    ) -> tuple[list[np.ndarray], list[int]]:
        guided, cost, latched = [], [], False
        for cond, uncond in pairs:
            c, u = cond.astype(np.float64).ravel(), uncond.astype(np.float64).ravel()
            guided.append(cond if latched else uncond + 7.5 * (cond - uncond))
            cost.append(1 if latched else 2)
            latched = latched or c @ u / np.sqrt((c @ c) * (u @ u)) > limit
        return guided, cost

    @pytest.mark.parametrize(("limit", "cost"), [(0.5, 7), (0.85, 8), (0.991, 9), (0.999, 11), (1.0, 12)])
    def test_latch(self, limit: float, cost: int):
        pairs = self.pairs()
        wanted, wanted_cost = self.reference(pairs, limit)
        ours, ours_cost = run(parse(f"adaptive({limit})"), rows(), pairs)
        check(ours, wanted)
        assert ours_cost == wanted_cost
        assert sum(ours_cost) == cost

    def test_with_every_combiner(self):
        """The latch looks at the predictions, whatever combines them."""
        for name in ("cfg", "zero_star(0)", "apg"):
            alone, _ = run(parse(name), rows(), self.pairs())
            ours, cost = run(parse(f"{name}+adaptive"), rows(), self.pairs())
            assert cost == [2, 2, 2, 1, 1, 1]
            check(ours[:3], alone[:3], tolerance=0)
            assert all((out == pair[0]).all() for out, pair in zip(ours[3:], self.pairs()[3:], strict=True))

    def test_both_evaluations_of_a_step_get_the_same_weight(self):
        heun = rows(3, "heun")
        pairs = [self.pairs()[k] for k in (2, 0, 1, 3, 5)]  # aligned at the first evaluation of the first step
        assert run(parse("adaptive"), heun, pairs)[1] == [2, 2, 1, 1, 1]

    def test_windows_come_first(self):
        """A weight of 0 or 1 stays; the latch looks only where both rows run."""
        steps = [replace(step, guidance=w) for step, w in zip(rows(), (7.5, 7.5, 1.0, 7.5, 0.0, 7.5), strict=True)]
        assert run(parse("adaptive"), steps, self.pairs())[1] == [2, 2, 1, 2, 1, 2]
        pairs = [self.pairs()[2], *self.pairs()[1:]]
        ours, cost = run(parse("adaptive"), steps, pairs)
        assert cost == [2, 1, 1, 1, 1, 1]
        assert (ours[4] == pairs[4][1]).all()

    def test_images_do_not_share_it(self):
        guider = parse("adaptive")
        for _ in range(2):
            assert run(guider, rows(), self.pairs())[1] == [2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("w", [7.5, 1.0])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_dynamic_thresholding(prediction: str, scheduler: type, w: float):
    """x0 of the guided prediction, thresholded by diffusers; a weight of 1 is thresholded, too."""
    card = replace(CARD, prediction_type=prediction)
    steps = [replace(step, guidance=w) for step in sample_steps(card, steps=STEPS)[0]]
    pairs, x = predictions(seed=3), np.random.default_rng(9).normal(size=SHAPE).astype(np.float32)
    for p, cap in ((0.995, 1.5), (0.9, 3.0), (1.0, 100.0)):
        reference = scheduler(thresholding=True, dynamic_thresholding_ratio=p, sample_max_value=cap)
        ours, _ = run(parse(f"dynamic(p={p}, max={cap})"), steps, pairs, x)
        for out, step, (cond, uncond) in zip(ours, steps, pairs, strict=True):
            a, b = step.denoised
            guided = uncond + w * (cond - uncond) if w != 1.0 else cond
            x0 = a * x.astype(np.float64) + b * guided.astype(np.float64)
            wanted = reference._threshold_sample(torch.tensor(x0)[None])[0].numpy()
            # our prediction is float32: an epsilon of it (6e-8) is multiplied by b on the way back
            assert np.abs(a * x + b * out - wanted).max() < 2e-7 * (np.abs(a * x).max() + np.abs(wanted).max())


def test_thresholding_is_not_clipping():
    """diffusers' default cap of 1 gives clipping, and values within the cap keep their order above it."""
    pairs, x = predictions(), 3 * np.random.default_rng(9).normal(size=SHAPE).astype(np.float32)
    step = rows(1, w=1.0)[0]
    a, b = step.denoised
    x0 = a * x.astype(np.float64) + b * pairs[0][0]
    clipped = DDPMScheduler(thresholding=True)._threshold_sample(torch.tensor(x0)[None])[0].numpy()
    assert (clipped == np.clip(x0, -1, 1)).all()
    out = run(parse("dynamic(max=50)"), [step], pairs[:1], x)[0][0]
    assert np.abs((a * x + b * out) - clipped).max() > 0.1


def test_dynamic_thresholding_leaves_what_it_cannot_reach():
    """No signal (x0 is not finite), or no noise (p says nothing about x0)."""
    pairs = predictions(count=2)
    for denoised in ((math.inf, -math.inf), (1.0, 0.0)):
        steps = [replace(step, denoised=denoised) for step in rows(2)]
        assert run(parse("dynamic"), steps, pairs)[0][1].tobytes() == run(parse("cfg"), steps, pairs)[0][1].tobytes()


def test_order_of_rescale_and_dynamic():
    """Rescaled first, thresholded then."""
    pairs, x, steps = predictions(), np.random.default_rng(5).normal(size=SHAPE).astype(np.float32), rows()
    wanted = theirs(ClassifierFreeGuidance(guidance_scale=7.5, guidance_rescale=0.7), pairs)
    alone = [replace(step, guidance=1.0) for step in steps]
    thresholded, _ = run(parse("dynamic(max=2)"), alone, [(p, p) for p in wanted], x)
    # the way back divides by b, 1/34 at the last step: float32 differences of x0 grow as much
    check(run(parse("rescale(0.7)+dynamic(max=2)"), steps, pairs, x)[0], thresholded, tolerance=1e-5)


def test_state_is_of_one_image():
    guider = parse("apg")
    first, second = run(guider, rows(), predictions())[0], run(guider, rows(), predictions())[0]
    assert all((a == b).all() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("text", ["cfg", *CASES, "adaptive", "dynamic", "apg+adaptive+rescale+dynamic", "adaptive+apg"])
def test_guiders_are_values(text: str):
    assert parse(text) == parse(f" {text} ".replace("+", " + "))
    assert hash(parse(text)) == hash(parse(text))


def test_defaults():
    assert parse("cfg") == Guider()
    for short, long in {
        "zero_star": "zero_star(zero=1)",
        "apg()": "apg(momentum=-0.5, norm=15, eta=1)",
        "adaptive": "adaptive(0.991)",
        "rescale": "rescale(0.7)",
        "dynamic": "dynamic(p=0.995, max=1.5)",
    }.items():
        assert parse(short) == parse(long)


TEXTS = {
    "": "'' is unknown",
    "cfgg": "'cfgg' is unknown",
    "cfg(1)": "cfg takes no arguments",
    "cfg+apg": "only one of cfg, zero_star, apg",
    "apg+zero_star": "only one of",
    "rescale+rescale": "rescale is given twice",
    "rescale+apg": "rescale comes after guidance",
    "dynamic+rescale": "dynamic comes last",
    "dynamic+adaptive": "dynamic comes last",
    "rescale(1.1)": "phi of rescale is 1.1; it must be from 0 to 1",
    "rescale(x)": "'x' is not a number",
    "rescale(nan)": "'nan' is not a number",
    "rescale(0.7, 1)": "rescale takes phi",
    "rescale(psi=0.7)": "rescale takes phi, not psi",
    "dynamic(0.995, 1)": "max of dynamic is 1; it must be above 1, which would be plain clipping",
    "dynamic(p=0)": "p of dynamic is 0",
    "dynamic(0.9, p=0.9)": "dynamic takes p, max, once",
    "zero_star(zero=1.5)": "zero of zero_star is 1.5; it must be a whole number",
    "zero_star(zero=-1)": "zero of zero_star is -1",
    "zero_star(1e999)": "zero of zero_star is inf",
    "apg(momentum=1)": "momentum of apg is 1; it must be between -1 and 1",
    "apg(norm=-1)": "norm of apg is -1",
    "apg(norm=1e999)": "norm of apg is inf",
    "apg(eta=11)": "eta of apg is 11",
    "adaptive(1.5)": "threshold of adaptive is 1.5; it must be a cosine",
    "apg(": "brackets do not match",
    "apg)+cfg": "brackets do not match",
    "cfg+": "'' is unknown",
}


@pytest.mark.parametrize("text", TEXTS)
def test_wrong_texts_are_refused_with_what_there_is(text: str):
    with pytest.raises(RequestError, match=re.escape(TEXTS[text])) as error:
        parse(text)
    assert str(error.value).endswith(GRAMMAR)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [None, 1, ["cfg"]])
def test_only_text_is_a_guider(value: object):
    with pytest.raises(RequestError, match="it is not text"):
        parse(value)


def test_the_grammar_names_every_part():
    assert all(re.search(rf"\b{name}\b", GRAMMAR) for name in PARTS)


PIECES = [*PARTS, "+", "(", ")", ",", "=", "0.5", "1", "momentum", "p", "max", "zero", " ", "\n"]


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=12).map("".join)))
def test_any_text_is_a_guider_or_refused_on_one_line(text: str):
    message = ""
    try:
        assert isinstance(parse(text), Guider)
    except RequestError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1
