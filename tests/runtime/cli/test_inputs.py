"""Files that the command line reads: prompts, requests, adapters, images."""

import json
import os
from pathlib import Path

import pytest

from stepforge.runtime.cli.inputs import file_and_strength, parse_adapters, parse_controls, read_lines, read_requests
from stepforge.runtime.errors import RequestError

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


def test_options_without_effect_are_refused(refuse, tmp_path):
    """What the fake model, a format or a request without ControlNets would not look at."""
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text('{"prompt": "x"}')
    draw, batch = ("generate", "fake", "x", "-o", tmp_path / "x.png"), ("batch", "fake", jobs, "-o", tmp_path / "out")
    for code, command, said in (
        (1, (*draw, "--backend", "torch"), "no graphs for backend 'torch'"),
        (1, (*draw, "--backend", "opnvino"), "backend 'opnvino' is unknown"),
        (1, (*draw, "--precision", "bf16"), "computes in fp32, not in bf16"),
        (2, (*draw, "--preprocessor", "canny"), "--preprocessor needs --control"),
        (2, (*draw, "--control-window", "0..0.5"), "--control-window needs --control"),
        (2, (*draw, "--guess-mode"), "--guess-mode needs --control"),
        (2, ("generate", "fake", "--prompts", jobs), "give it with --requests"),
        (2, (*batch, "--quality", 80), "--quality is for --format webp and jpeg"),
        (2, (*batch, "--stall", 60), "need --ray ADDRESS"),
    ):
        assert said in refuse(code, *command)
    assert list(tmp_path.iterdir()) == [jobs]


LINES = {
    "no JSON": ("{", "line 2: "),
    "a list": ("[1]", "an object with the fields of a request is needed"),
    "an unknown field": ('{"prompt": "x", "stpes": 3}', "a request has no 'stpes'; it has prompt"),
    "no prompt": ('{"steps": 3}', "a request needs a prompt"),
    "deep": ("[" * 100_000, "line 2: "),
    "one field by two names": ('{"prompt": "x", "steps": 3, "num_inference_steps": 4}', "are the same; give one"),
    "a wrong value": ('{"prompt": "x", "steps": 0}', "steps is 0"),
    "a field twice": ('{"prompt": "x", "prompt": "y"}', "'prompt' is given twice"),
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


ODD = [
    "a\u2028b",
    "c\u2029d",
    "e\x85f",
    "g\x0bh",
    "i\x0cj",
    "k\x1cl\x1dm\x1en",
    "o\rp",
    "\u3000q\xa0",
    "r\ufeff",
    "\x0bs\x85",
]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_end_with_line_feeds_only(end, mark, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes((mark + end.join([*ODD, "", " \t ", " last "])).encode())
    numbered = [*enumerate(ODD, 1), (len(ODD) + 3, "last")]
    assert read_lines(file) == numbered
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in ODD]
    file.write_bytes((mark + end.join(lines)).encode())
    assert [request.prompt for request in read_requests(None, None, file, {})] == ODD


def test_prompts_from_a_pipe(tmp_path):
    reader, writer = os.pipe()
    os.write(writer, b"a\nb\n")
    os.close(writer)
    assert read_lines(Path(f"/dev/fd/{reader}")) == [(1, "a"), (2, "b")]
    os.close(reader)


def test_a_file_too_large(tmp_path):
    file = tmp_path / "prompts.txt"
    file.touch()
    os.truncate(file, 6 << 30)
    with pytest.raises(RequestError, match="is larger than 256 MiB"):
        read_lines(file)


def test_a_path_that_exists_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a=b.st", "b.st", "c.st", "c.st:2", "run=3/x:1=2.st"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    wanted = {
        "a=b.st": ("a=b", "a=b.st", 1.0), "a=b.st:0.5": ("a=b", "a=b.st", 0.5), "z=b.st:0.5": ("z", "b.st", 0.5),
        "z=a=b.st": ("z", "a=b.st", 1.0), "c.st:2": ("c", "c.st:2", 1.0), "c.st:2:3": ("c", "c.st:2", 3.0),
        "c.st:4": ("c", "c.st", 4.0), "z=c.st:2": ("z", "c.st:2", 1.0), "z=c.st:200:2": ("z", "c.st:200", 2.0),
        "run=3/x:1=2.st:-1": ("x:1=2", "run=3/x:1=2.st", -1.0), "y=run=3/x:1=2.st": ("y", "run=3/x:1=2.st", 1.0),
        "no/run=3/x.st": ("x", "no/run=3/x.st", 1.0), "=x.st": ("=x", "=x.st", 1.0), "style=no.st": ("style", "no.st", 1.0),
        f"{tmp_path}/a=b.st": ("a=b", f"{tmp_path}/a=b.st", 1.0), "z=" + "n" * 5000: ("z", "n" * 5000, 1.0),
    }  # fmt: skip
    for text, (name, file, strength) in wanted.items():
        assert parse_adapters([text]) == {name: (Path(file), strength)}, text
    assert file_and_strength("c.st:2") == (Path("c.st:2"), 1.0)
    (control,) = parse_controls(["canny=run=3/x:1=2.st:0.5"], "none", "0..1", False)
    assert (control["name"], control["image"], control["scale"]) == ("canny", Path("run=3/x:1=2.st"), 0.5)
    for text in ("run/a=b.st", "=b.st", "a="):
        with pytest.raises(RequestError, match="give NAME=IMAGE"):
            parse_controls([text], "none", "0..1", False)


@pytest.mark.parametrize("command", [("generate", "fake", "x", "-o", "out"), ("tune", "fake", "--prompts", "x.txt")])
@pytest.mark.parametrize("threads", [0, -1, 10**6, 10**30])
def test_threads_are_bounded(command, threads, refuse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    most = 4 * os.cpu_count()
    assert f"--threads is {threads}; it must be a whole number from 1 to {most}" in refuse(
        2, *command, "--threads", threads
    )
