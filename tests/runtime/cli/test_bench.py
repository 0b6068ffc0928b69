"""`stepforge bench`: no speed without parity, and lines whose parts add up."""

import json
from dataclasses import replace

import pytest

from stepforge import load
from stepforge.runtime.backends.fake import fake_bundle
from stepforge.runtime.errors import BundleError
from stepforge.runtime.request import Request
from stepforge.runtime.tune.speed import check_verified, measure


def test_no_speed_without_parity(refuse, run, capsys):
    assert "was never verified on fake fp32, and no speed is told" in refuse(1, "bench", "fake", "-n", 2)
    assert run("bench", "fake", "-n", 2, "--images", 3, "--runs", 2, "--unverified", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parity"] == "not verified on this backend and precision"
    assert [(line["name"], line["images"], line["rows"]) for line in found["lines"]] == [
        ("one image", 1, 4),
        ("3 images at once", 3, 12),
    ]
    assert run("bench", "fake", "-n", 2, "--images", 1, "--runs", 1, "--unverified") == 0
    out = capsys.readouterr().out
    assert "parity not verified" in out
    assert "one image" in out


@pytest.mark.parametrize(
    ("passed", "message"), [([True, False], "failed parity"), ([], "was never verified"), ([True], "")]
)
def test_whose_verdict_counts(passed, message):
    """That of this backend and precision."""
    others = [{"backend": "openvino", "precision": "bf16", "passed": message == ""}]
    checks = [{"backend": "openvino", "precision": "fp32", "passed": one} for one in passed]
    bundle = replace(fake_bundle(), verdict={"passed": False, "summary": "", "checks": checks + others[: len(passed)]})
    if not message:
        return check_verified(bundle, "openvino", "fp32")
    with pytest.raises(BundleError, match=message):
        check_verified(bundle, "openvino", "fp32")


def test_lines():
    """Each runs as often as asked, one run beside; parts of single images are parts of the whole."""
    told = []
    with load("fake") as engine:
        request = Request(prompt="a cat", steps=2, seed=4)
        alone, crowd = measure(engine, request, images=2, runs=3, on_image=told.append)
    assert told == list(range(1, 4 * 3 + 1))
    for line in (alone, crowd):
        assert 0 < line.low <= line.median <= line.high
        assert line.rate == line.images / line.median
    assert 0 < alone.networks < alone.networks + alone.outside < 1
