"""Batches on the fake model: manifests, the command, and what it has made."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stepforge.runtime.cli.main import main
from stepforge.runtime.serve.store import OWN

SMALL = {"steps": 2, "width": 64, "height": 64}


@pytest.fixture
def jobs(tmp_path):
    """Write a manifest of JSON lines; values that are text stand there as they are."""

    def write(*lines, name="jobs.jsonl") -> Path:
        file = tmp_path / name
        texts = [line if isinstance(line, str) else json.dumps({**SMALL, **line}) for line in lines]
        file.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        return file

    return write


@pytest.fixture
def batch(capsys, tmp_path, monkeypatch):
    """Run `stepforge batch fake`; returns exit code, report, and the lines on standard error but those of progress."""
    monkeypatch.setattr("stepforge.runtime.cli.serving.batch.PAUSE", 1e9)

    def batch(manifest, *arguments, out="out", bundle="fake"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([*map(str, ("batch", bundle, manifest, "-o", tmp_path / out, "--json", *arguments))])
        text = capsys.readouterr()
        return caught.value.code, json.loads(text.out) if text.out else None, text.err.splitlines()

    return batch


@pytest.fixture
def files() -> Callable[[Path], dict[str, str]]:
    """What a batch has made: sha256 of each file by its name, the journal's folder left out."""

    def files(folder):
        return {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and OWN not in path.parts
        }

    return files
