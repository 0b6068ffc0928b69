"""Model repositories: what is written, what is refused."""

import pytest

from stepforge.runtime.cli.main import main
from stepforge.runtime.serve.triton.repository import quoted


@pytest.fixture
def triton(capsys, tmp_path):
    """Run `stepforge triton fake`; returns exit code and the lines on standard output and standard error."""

    def triton(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([*map(str, ("triton", "fake", "-o", tmp_path / "repo", *arguments))])
        text = capsys.readouterr()
        return caught.value.code, text.out.splitlines(), text.err.splitlines()

    return triton


def test_repository(triton, tmp_path):
    repo = tmp_path / "repo"
    code, out, _ = triton("--mode", "both", "--gpu", 0, "--gpu", 2, "--environment", "/opt/a b", "--threads", 3)
    assert (code, out) == (0, [str(repo / "fake"), str(repo / "fake_stream")])
    assert sorted(path.relative_to(repo).as_posix() for path in repo.rglob("*") if path.is_file()) == [
        "fake/1/model.py", "fake/config.pbtxt", "fake_stream/1/model.py", "fake_stream/config.pbtxt",
    ]  # fmt: skip
    plain, stream = ((repo / name / "config.pbtxt").read_text().splitlines() for name in ("fake", "fake_stream"))
    assert 'name: "fake"' in plain
    assert "instance_group { count: 1, kind: KIND_GPU, gpus: [0, 2] }" in plain
    assert 'input { name: "prompt", data_type: TYPE_STRING, dims: [1] }' in plain
    assert 'parameters { key: "EXECUTION_ENV_PATH", value: { string_value: "/opt/a b" } }' in plain
    assert "model_transaction_policy { decoupled: true }" in stream
    assert not [line for line in plain if "progress" in line or "decoupled" in line]
    assert triton("--name", "other")[0] == 0
    code, _, errors = triton()
    assert (code, len(errors)) == (2, 1)
    assert "is there already; --overwrite replaces a model" in errors[0]
    assert triton("--overwrite")[0] == 0
    assert "KIND_CPU" in (repo / "fake/config.pbtxt").read_text()
    assert sorted(entry.name for entry in repo.iterdir()) == ["fake", "fake_stream", "other"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--name", "../x"), "the model's name is '../x'"),
        (("--mode", "no"), "--mode is 'no'"),
        (("--queue-limit", 0), "--queue-limit is 0"),
        (("--adapter", "a.safetensors:0.5"), "takes no strength"),
        (("--backend", "no"), "backend 'no' is unknown"),
        (("--precision", "no"), "precision 'no' is unknown"),
    ],
)
def test_refusals(arguments, reason, triton, tmp_path):
    code, _, errors = triton(*arguments)
    assert (code, len(errors)) == (1 if "unknown" in reason else 2, 1)
    assert reason in errors[0]
    assert not (tmp_path / "repo").exists()


def test_other_folders_are_left_alone(triton, tmp_path):
    (tmp_path / "repo/fake").mkdir(parents=True)
    (tmp_path / "repo/fake/mine.txt").write_text("")
    assert triton("--overwrite")[0] == 2
    assert (tmp_path / "repo/fake/mine.txt").exists()


def test_texts_are_quoted():
    assert quoted('a"\\\né') == '"a\\042\\134\\012\\303\\251"'
