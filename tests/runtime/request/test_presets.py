"""Named plan presets: stored in a bundle, used by requests, refused when they cannot be run."""

import json
from pathlib import Path

import pytest

from stepforge import Request, RequestError
from stepforge.runtime.bundle import Bundle, Preset, read, write_manifest
from stepforge.runtime.cli.main import main
from stepforge.runtime.request.presets import resolve, store

FAST = {"guidance": "7.5@0-0.6,1@0.6-1", "reuse": "deepcache(2)", "control_end": 0.5, "found": {"rows": 14}}


@pytest.fixture
def bundle(hand_written_bundle: Path) -> Bundle:
    return read(hand_written_bundle)


def test_what_is_stored_is_what_requests_get(bundle):
    stored = store(bundle, "fast", FAST)
    assert json.loads((bundle.path / "bundle.json").read_text())["presets"] == {"fast": FAST}
    controls = [{"name": "a", "image": b"", "start": 0.1, "end": 0.9, "scale": 0.4}]
    found = resolve(Request(prompt="x", preset="fast", guidance=3.0, guider="apg", controls=controls, seed=5), stored)
    expected = Request(
        prompt="x", guidance=FAST["guidance"], guider="apg", reuse="deepcache(2)", seed=5,
        controls=[{**controls[0], "end": 0.5}],
    )  # fmt: skip
    assert found == expected
    plain = Request(prompt="x")
    assert resolve(plain, stored) is plain


def test_presets_do_not_change_the_digest(bundle):
    stored = store(bundle, "fast", FAST)
    assert stored.digest == bundle.digest
    assert store(stored, "fast", {"reuse": ""}).presets == {"fast": Preset(reuse="")}
    assert list(store(stored, "slow", {}).presets) == ["fast", "slow"]


def test_presets_survive_the_manifest(tiny_sd1_bundle):
    bundle = read(tiny_sd1_bundle)
    try:
        store(bundle, "fast", FAST)
        again = read(tiny_sd1_bundle)
        assert again.presets == {"fast": Preset(**FAST)}
        assert again.digest == bundle.digest
    finally:
        write_manifest(bundle)


@pytest.mark.parametrize(
    ("name", "preset", "message"),
    [
        ("a b", {}, "preset name 'a b' is not allowed"),
        ("../x", {}, "is not allowed"),
        ("fast", {"steps": 3}, "preset.steps is unknown; preset has guidance, guider"),
        ("fast", {"guidance": "lots"}, "guidance"),
        ("fast", {"guider": "magic"}, "magic"),
        ("fast", {"reuse": "deepcache(1)"}, "interval is 1;"),
        ("fast", {"control_start": 0.7, "control_end": 0.2}, "runs from 0.7 to 0.2"),
        ("fast", {"control_end": "late"}, "preset.control_end is 'late'; it must be a number"),
    ],
)
def test_bad_presets_are_not_stored(bundle, name, preset, message):
    with pytest.raises(RequestError, match=message) as caught:
        store(bundle, name, preset)
    assert "\n" not in str(caught.value)
    assert not read(bundle.path).presets


def test_unknown_presets_are_refused(bundle):
    with pytest.raises(RequestError, match="no preset 'fast'; it has none; `stepforge tune` makes them"):
        resolve(Request(prompt="x", preset="fast"), bundle)
    with pytest.raises(RequestError, match="no preset 'fast'; it has slow"):
        resolve(Request(prompt="x", preset="fast"), store(bundle, "slow", {}))


@pytest.mark.parametrize("option", [("-g", "3"), ("--guider", "apg"), ("--reuse", "tgate(0.5)")])
@pytest.mark.parametrize("command", [("plan", "fake"), ("generate", "fake", "x")])
def test_the_command_line_takes_a_preset_or_its_parts(option, command, capsys):
    with pytest.raises(SystemExit) as done:
        main([*command, "--plan", "fast", *option])
    assert done.value.code == 2
    name = "--guidance" if option[0] == "-g" else option[0]
    error = capsys.readouterr().err
    assert f"--plan decides guidance, guider, reuse; leave {name} out" in error
    assert error.count("\n") == 1


def test_the_command_line_shows_a_preset(tiny_sd1_bundle, capsys):
    bundle = read(tiny_sd1_bundle)
    try:
        store(bundle, "half", {"guidance": "7.5@0-0.5,1@0.5-1"})
        with pytest.raises(SystemExit) as done:
            main(["plan", str(tiny_sd1_bundle), "-n", "4", "--sampler", "ddim", "--plan", "half", "--json"])
        assert done.value.code == 0
        steps = json.loads(capsys.readouterr().out)["steps"]
        assert [step["guidance"] for step in steps] == [7.5, 7.5, 1.0, 1.0]
    finally:
        write_manifest(bundle)
