"""Candidates are the presets that they become."""

from dataclasses import replace

import pytest

from stepforge import Request
from stepforge.runtime.bundle import Preset
from stepforge.runtime.plan.compile import compile_plan
from stepforge.runtime.request.presets import resolve
from stepforge.runtime.tune.candidate import FULL, Candidate, candidates
from stepforge.runtime.tune.price import denoising_rows, row_counts

CASES = {
    "full": (FULL, {"guidance": "3", "reuse": "", "control_end": 1.0}),
    "late cut, DeepCache in a window": (
        Candidate(guidance_end=0.5, deepcache=(3, 0.2, 1.0), control_end=0.6),
        {"guidance": "interval(3, steps=0..0.5)", "reuse": "deepcache(3, steps=0.2..1)", "control_end": 0.6},
    ),
    "both ends, T-GATE": (
        Candidate(guidance_start=0.2, guidance_end=0.7, gate=0.5),
        {"guidance": "interval(3, steps=0.2..0.7)", "reuse": "tgate(0.5)", "control_end": 1.0},
    ),
    "both variants": (
        Candidate(gate=0.3, deepcache=(2, 0.0, 0.8), control_end=0.2),
        {"guidance": "3", "reuse": "deepcache(2, steps=0..0.8)+tgate(0.3)", "control_end": 0.2},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("guess_mode", [False, True])
def test_a_preset_is_its_candidate_and_its_rows_are_counted_as_the_engine_does(engine, case, guess_mode, controls):
    candidate, preset = CASES[case]
    controls = [{**controls[0], "guess_mode": guess_mode}]
    base = Request(prompt="x", steps=10, guidance=3, sampler="ddim", controls=controls)
    assert candidate.preset(base) == {**preset, "control_start": 0.0}
    stored = replace(engine.bundle, presets={"quick": Preset(**candidate.preset(base))})
    request = resolve(replace(base, preset="quick"), stored)
    result = engine.generate(request)
    assert row_counts(result.plan, request, engine.bundle) == denoising_rows(result)
    assert result.plan == compile_plan(candidate.apply(base), engine.scheduler_card)


def test_candidates_are_distinct_and_keep_some_guidance():
    ladder = {"guidance_end": (0.5, 0.2), "guidance_start": (0.1, 0.2), "gate": (0.5,)}
    found = list(candidates(ladder))
    assert found[0] == FULL
    assert len(found) == len(set(found)) == 2 * (3 * 3 - 1)
    assert all(candidate.guidance_end - candidate.guidance_start >= 0.1 for candidate in found)
