"""Tuning on the fake backend: the preset is what `--plan` runs, costs follow the rows, and refusals."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from stepforge import Engine, Request, RequestError, load
from stepforge.runtime.backends.fake import Fake, fake_bundle
from stepforge.runtime.bundle import UNET, Component, ComponentId, ControlCard, Tensor, read, sha256, write_manifest
from stepforge.runtime.cli.main import main
from stepforge.runtime.plan.compile import compile_plan
from stepforge.runtime.presets import resolve
from stepforge.runtime.tune.candidate import FULL, Candidate, candidates
from stepforge.runtime.tune.distance import distance
from stepforge.runtime.tune.price import _denoising, prices, row_counts
from stepforge.runtime.tune.search import Guess, tune

SIZE = 64
HINT = Image.new("RGB", (SIZE, SIZE), "red")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The fake model as a bundle on disk, for the fake backend: its graphs are empty files."""
    folder, fake = tmp_path_factory.mktemp("bundles") / "fake", fake_bundle(SIZE)
    folder.mkdir()
    (folder / "fake_tokenizer.json").write_bytes((fake.path / "fake_tokenizer.json").read_bytes())
    (folder / "model.onnx").touch()
    files = {file.name: (file.stat().st_size, sha256(file)) for file in folder.iterdir()}
    components = {name: Component("model.onnx", (), ()) for name in fake.components}
    write_manifest(replace(fake, path=folder, components=components, files=files))
    return folder


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n\nthree\n")
    return file


class Variants(Fake):
    """The fake backend with the two reuse variants, which repeat the prediction that was kept, and a ControlNet."""

    def open(self, component, banks=None):
        if component.role.startswith("control"):
            return self._control(component.role == "control_hint")
        whole = super().open(component)
        if component.role != "denoiser":
            return whole

        def run(inputs):
            if (kept := inputs.get("deep", inputs.get("text_0"))) is not None:
                return {"prediction": kept.copy(), "deep": kept.copy()}
            outputs = whole(inputs)
            return {**outputs, "deep": outputs["prediction"], "text_0": outputs["prediction"]}

        return run

    @staticmethod
    def _control(is_hint):
        def run(inputs):
            if is_hint:
                return {"hint": inputs["image"]}
            return {"residual_0": np.zeros((len(inputs["sample"]), 4, 1, 1), np.float32)}

        return run


def variants_bundle():
    base = fake_bundle(SIZE)
    common = tuple(Tensor(name, "float32", (1,)) for name in ("sample", "timestep", "encoder_hidden_states"))
    residual = Tensor("residual_0", "float32", ("n", 4, "h", "w"))
    control = (*common, Tensor("hint", "float32", (1,)), Tensor("scale", "float32", ("n", 1)))
    components = {
        **base.components,
        UNET: Component("", (*common, residual), ()),
        replace(UNET, variant="deepcache"): Component("", (*common, residual, Tensor("deep", "float32", (1,))), ()),
        replace(UNET, variant="tgate"): Component("", (*common, residual, Tensor("text_0", "float32", (1,))), ()),
        ComponentId("control_hint", "edge"): Component("", (), ()),
        ComponentId("control_residuals", "edge"): Component("", control, ()),
    }
    return replace(base, components=components, controls={"edge": ControlCard()})


@pytest.fixture
def engine():
    bundle = variants_bundle()
    with Engine(bundle, Variants(bundle)) as engine:
        yield engine


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def test_the_stored_preset_is_what_plan_runs(bundle, prompts, tmp_path, capsys):
    plot = tmp_path / "frontier.png"
    options = ("-n", 10, "-g", 3, "--limit", 0.2, "--budget", 60, "--backend", "fake", "--name", "quick")
    assert run("tune", bundle, "--prompts", prompts, *options, "--plot", plot, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"]["rows"] < 20
    assert found["chosen"]["distance"] <= 0.2
    assert Image.open(plot).size == (640, 400)
    preset = read(bundle).presets["quick"]
    assert (preset["guidance"], preset["reuse"]) == (found["chosen"]["guidance"], "")
    assert preset["found"]["rows"] == found["chosen"]["rows"]
    assert preset["found"]["rows_full"] == 20
    assert preset["found"]["prompts"] == 3
    with load(bundle, backend="fake") as engine:
        result = engine.generate(Request(prompt="four", steps=10, preset="quick"))
        same = engine.generate(Request(prompt="four", steps=10, guidance=preset["guidance"]))
    assert result.stats.rows["unet"] == preset["found"]["rows"]
    np.testing.assert_array_equal(result.latents, same.latents)
    assert (
        run("generate", bundle, "four", "-n", 10, "--plan", "quick", "--backend", "fake", "-o", tmp_path / "a.png") == 0
    )


def test_a_limit_that_nothing_meets(bundle, prompts, capsys):
    code = run("tune", bundle, "--prompts", prompts, "-n", 10, "--limit", 1e-9, "--budget", 60, "--backend", "fake",
               "--name", "never")  # fmt: skip
    assert code == 1
    assert "no cheaper plan stays within 1e-09; raise --limit or --budget" in capsys.readouterr().err
    assert "never" not in read(bundle).presets


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--limit", "0"), "--limit is 0; a distance lies between 0 and 1"),
        (("--budget", "5"), "a budget of 5 images is too small for these prompts; give at least 27"),
        (("--parts", "guidance,magic"), "magic cannot be tuned; choose from guidance, tgate, deepcache, control"),
        (("--parts", "deepcache"), "deepcache cannot be tuned: export the bundle with --reuse deepcache"),
        (("--parts", "control"), "control cannot be tuned: the request has no ControlNet"),
        (("--guidance", "1"), "tune starts from one guidance weight other than 0 and 1, not 1.0"),
        (("--name", "a/b"), "preset name 'a/b' is not allowed"),
        (("--plot", "out.jpg"), "--plot out.jpg does not end in .png"),
    ],
)
def test_refusals(bundle, prompts, capsys, options, message):
    assert run("tune", bundle, "--prompts", prompts, "-n", 4, "--backend", "fake", *options) == 2
    assert message in capsys.readouterr().err


def test_the_test_model_keeps_no_presets(prompts, capsys):
    assert run("tune", "fake", "--prompts", prompts) == 2
    assert "has no files" in capsys.readouterr().err


@pytest.mark.slow
def test_all_parts_together(engine):
    controls = [{"name": "edge", "image": HINT}]
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
def test_a_preset_is_its_candidate_and_its_rows_are_counted_as_the_engine_does(engine, case, guess_mode):
    candidate, preset = CASES[case]
    controls = [{"name": "edge", "image": HINT, "guess_mode": guess_mode}]
    base = Request(prompt="x", steps=10, guidance=3, sampler="ddim", controls=controls)
    assert candidate.preset(base) == {**preset, "control_start": 0.0}
    stored = replace(engine.bundle, presets={"quick": candidate.preset(base)})
    request = resolve(replace(base, preset="quick"), stored)
    result = engine.generate(request)
    assert row_counts(result.plan, request, engine.bundle) == _denoising(result)
    assert result.plan == compile_plan(candidate.apply(base), engine.scheduler_card)


def test_prices_solve_for_the_seconds_of_a_row(engine):
    """Networks that take 2 ms a row whole, 0.5 ms with DeepCache and 1 ms for the ControlNet."""
    takes = {"unet": 2e-3, "unet.deepcache": 5e-4, "control/edge": 1e-3}

    class Slow(Variants):
        def open(self, component, banks=None):
            graph = super().open(component, banks)

            def run(inputs):
                time.sleep(takes.get(component.label, 0.0) * len(inputs.get("sample", ())))
                return graph(inputs)

            return run

    with Engine(engine.bundle, Slow(engine.bundle)) as slow:
        request = Request(prompt="x", guidance=3, sampler="ddim", controls=[{"name": "edge", "image": HINT}])
        found = prices(slow, request)
    assert found["unet"] == 1.0
    assert found["unet.deepcache"] == pytest.approx(0.25, abs=0.15)  # the engine's own time, and the machine's load
    assert found["control/edge"] == pytest.approx(0.5, abs=0.15)


def test_candidates_are_distinct_and_keep_some_guidance():
    ladder = {"guidance_end": (0.5, 0.2), "guidance_start": (0.1, 0.2), "gate": (0.5,)}
    found = list(candidates(ladder))
    assert found[0] == FULL
    assert len(found) == len(set(found)) == 2 * (3 * 3 - 1)
    assert all(candidate.guidance_end - candidate.guidance_start >= 0.1 for candidate in found)


def test_the_guess_follows_what_was_measured():
    alone = {("guidance_end", 0.5): 0.1, ("gate", 0.5): 0.2}
    guess, both = Guess(alone), Candidate(guidance_end=0.5, gate=0.5)
    assert guess(FULL) == 0.0
    assert guess(both) == pytest.approx(0.3)
    for _ in range(5):
        guess.learn(both, 0.15)
    assert 0.15 < guess(both) < 0.17


def picture(seed, size=SIZE):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


def test_distance_is_rmse_and_ssim():
    """Against the definition, window by window."""
    a, b = picture(1), picture(2)
    left, right = (np.asarray(x, np.float64).reshape(32, 2, 32, 2, 3).mean((1, 3)) / 255 for x in (a, b))
    gray = [x[..., 0] * 0.299 + x[..., 1] * 0.587 + x[..., 2] * 0.114 for x in (left, right)]
    values = []
    for y in range(32 - 6):
        for x in range(32 - 6):
            p, q = (g[y : y + 7, x : x + 7].ravel() for g in gray)
            covariance = np.cov(p, q, ddof=0)
            top = (2 * p.mean() * q.mean() + 1e-4) * (2 * covariance[0, 1] + 9e-4)
            bottom = (p.mean() ** 2 + q.mean() ** 2 + 1e-4) * (covariance[0, 0] + covariance[1, 1] + 9e-4)
            values.append(top / bottom)
    expected = (np.sqrt(((left - right) ** 2).mean()) + (1 - np.mean(values)) / 2) / 2
    assert distance(a, b) == pytest.approx(expected, abs=2e-3)  # Pillow's box average rounds to whole bytes
    assert distance(a, a) == pytest.approx(0, abs=1e-12)
    assert distance(a, b) == distance(b, a)
    assert distance(picture(1, 96), picture(2, 96)) > 0.1


def test_tune_starts_from_the_full_plan(engine):
    for wrong in ({"reuse": "tgate(0.5)"}, {"guidance": "linear(3)"},
                  {"controls": [{"name": "edge", "image": HINT, "end": 0.5}]}):  # fmt: skip
        with pytest.raises(RequestError, match="tune starts from"):
            tune(engine, [Request(prompt="x", **wrong)], limit=0.1, budget=400)
    with pytest.raises(RequestError, match="at least one prompt"):
        tune(engine, [], limit=0.1, budget=400)
