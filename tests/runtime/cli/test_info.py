"""`stepforge info`: what a bundle holds."""

import json
from dataclasses import replace

from stepforge.runtime import load
from stepforge.runtime.backends.fake import fake_bundle


def test_info_speaks_json(run, capsys):
    assert run("info", "fake", "--json") == 0
    assert json.loads(capsys.readouterr().out)["model"]["family"] == "sd1"


def test_what_the_manifest_says_cannot_command_the_terminal(run, capsys, monkeypatch):
    fake, evil = fake_bundle(), "\x1b[2J\r\x07"
    hostile = replace(
        fake, card=replace(fake.card, name=f"a{evil}"), versions={f"torch{evil}": evil},
        source={
            "assumed": [f"heads{evil}"], "corrected": [evil],
            "upscalers": {f"x{evil}": {"assumed": [f"marks{evil}"], "corrected": []}},
        },
        verdict={"summary": evil, "reference": {"loader": evil, "assumed": [f"size{evil}"]}},
    )  # fmt: skip
    monkeypatch.setattr(load, "open_bundle", lambda *_, **__: hostile)
    assert run("info", "fake") == 0
    text = capsys.readouterr().out
    assert r"a\x1b[2J" in text
    assert "assumed at export: heads" in text
    assert "corrected at export: " in text
    assert r"assumed at export: stage x\x1b[2J \x07: marks\x1b[2J \x07" in text
    assert "assumed by verify: size" in text
    assert all(letter.isprintable() for letter in text.replace("\n", ""))
