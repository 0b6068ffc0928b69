"""Files that the command line reads: prompts, requests, adapters, images."""

import json

import pytest

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
INPUTS = {
    "prompts": (["generate", "fake", "--prompts", "in.txt"], 2),
    "requests": (["generate", "fake", "--requests", "in.txt"], 2),
    "adapter": (["lora", "inspect", "in.safetensors"], 1),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_git_lfs_pointers_are_named(kind, refuse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, code = INPUTS[kind]
    (tmp_path / arguments[-1]).write_bytes(POINTER)
    error = refuse(code, *arguments)
    assert f"{arguments[-1]} is a Git LFS pointer" in error
    assert "run `git lfs pull`" in error


def test_images_are_looked_at_before_work(refuse, tiny_sd1_control_bundle, tmp_path):
    (tmp_path / "in.png").write_bytes(POINTER)
    command = ("generate", tiny_sd1_control_bundle, "x", "--backend", "fake", "-o", tmp_path / "out", "--control")
    assert "in.png is a Git LFS pointer" in refuse(2, *command, f"a={tmp_path / 'in.png'}")
    assert "none.png is not a file" in refuse(2, *command, f"a={tmp_path / 'none.png'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", INPUTS)
def test_files_that_may_not_be_read(kind, refuse, foreign):
    arguments, code = INPUTS[kind]
    error = refuse(code, *arguments[:-1], foreign / f"secret.{arguments[-1].partition('.')[2]}")
    assert error.rstrip().endswith("Permission denied")


LINES = {
    "no JSON": ("{", "line 2: "),
    "a list": ("[1]", "an object with the fields of a request is needed"),
    "an unknown field": ('{"prompt": "x", "stpes": 3}', "a request has no 'stpes'; it has prompt"),
    "no prompt": ('{"steps": 3}', "a request needs a prompt"),
    "deep": ("[" * 100_000, "line 2: "),
    "one field by two names": ('{"prompt": "x", "steps": 3, "num_inference_steps": 4}', "are the same; give one"),
    "a wrong value": ('{"prompt": "x", "steps": 0}', "steps is 0"),
    "a control": ('{"prompt": "x", "controls": [{"name": "a"}]}', "has no name or no image"),
}


@pytest.mark.parametrize("case", LINES)
def test_wrong_lines_are_named(case, refuse, tmp_path):
    line, message = LINES[case]
    file = tmp_path / "requests.jsonl"
    file.write_text(json.dumps({"prompt": "fine"}) + "\n" + line)
    error = refuse(2, "generate", "fake", "--requests", file, "-o", tmp_path / "out")
    assert "requests.jsonl, line 2: " in error
    assert message in error


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "has no prompts"), (b"caf\xe9", "is not UTF-8 text")], ids=["empty", "Latin-1"]
)
def test_wrong_prompt_files(content, message, refuse, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(content)
    assert message in refuse(2, "generate", "fake", "--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "out")
    assert "Is a directory" in refuse(2, "generate", "fake", "--prompts", tmp_path, "-o", tmp_path / "out")
