"""`stepforge plan`: the table of numbers."""

import json


def test_plan_speaks_json(run, capsys):
    assert run("plan", "fake", "-n", 3, "--guidance", "7,1,0", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert [step["guidance"] for step in plan["steps"]] == [7.0, 1.0, 0.0]
    assert plan["rows"] == 4
    assert run("plan", "fake", "-n", 3) == 0
    assert "3 network evaluations, 6 denoiser rows" in capsys.readouterr().out


def test_plan_shows_which_evaluations_reuse(run, tiny_sd1_control_bundle, capsys):
    options = ["-n", 4, "--sampler", "ddim", "--reuse", "deepcache(2)+tgate(0.5)"]
    assert run("plan", tiny_sd1_control_bundle, *options, "--json") == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [step["denoiser"] for step in steps] == ["unet", "unet.deepcache", "unet.tgate", "unet.deepcache"]
    assert run("plan", "fake", *options) == 2
    assert "no variant 'deepcache'; export it with --reuse deepcache" in capsys.readouterr().err
