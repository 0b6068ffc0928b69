"""The search: what it finds, how it guesses, and what it refuses to start from."""

import pytest

from stepforge import Request, RequestError
from stepforge.runtime.tune.candidate import FULL, Candidate
from stepforge.runtime.tune.search import Guess, tune


@pytest.mark.slow
def test_all_parts_together(engine, controls):
    requests = [Request(prompt=p, steps=10, guidance=3, sampler="ddim", controls=controls) for p in ("one", "two")]
    found = tune(engine, requests, limit=0.2, budget=120)
    assert set(found.prices) == {"unet", "unet.deepcache", "unet.tgate", "control/edge", "control/edge.deepcache"}
    assert found.images <= 120
    assert (found.full.rows, found.full.distance) == (20, 0.0)
    assert found.full.cost == pytest.approx(20 * (1 + found.prices["control/edge"]))
    costs, away = zip(*((trial.cost, trial.distance) for trial in found.frontier), strict=True)
    assert list(costs) == sorted(costs, reverse=True)
    assert list(away) == sorted(away)
    assert found.chosen in found.trials
    alone = tune(engine, requests, limit=0.2, budget=120, parts=["control"])
    assert all(trial.candidate == Candidate(control_end=trial.candidate.control_end) for trial in alone.trials)


def test_the_guess_follows_what_was_measured():
    alone = {("guidance_end", 0.5): 0.1, ("gate", 0.5): 0.2}
    guess, both = Guess(alone), Candidate(guidance_end=0.5, gate=0.5)
    assert guess(FULL) == 0.0
    assert guess(both) == pytest.approx(0.3)
    for _ in range(5):
        guess.learn(both, 0.15)
    assert 0.15 < guess(both) < 0.17


def test_tune_starts_from_the_full_plan(engine, controls):
    for wrong in ({"reuse": "tgate(0.5)"}, {"guidance": "linear(3)"},
                  {"controls": [{**controls[0], "end": 0.5}]}):  # fmt: skip
        with pytest.raises(RequestError, match="tune starts from"):
            tune(engine, [Request(prompt="x", **wrong)], limit=0.1, budget=400)
    with pytest.raises(RequestError, match="at least one prompt"):
        tune(engine, [], limit=0.1, budget=400)
