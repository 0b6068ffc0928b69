"""Manifests: kinds of files, types of cells, lines that are no jobs."""

import tracemalloc

import pytest

from stepforge.runtime.errors import RequestError
from stepforge.runtime.serve.manifest import Manifest


def values(row):
    try:
        return row.values()
    except ValueError as error:
        return str(error)


def test_cells_have_the_types_of_fields(tmp_path):
    file = tmp_path / "jobs.csv"
    file.write_bytes(
        "\ufeffid,prompt,seed,eta,guidance,adapters,timesteps,experts\r\n"
        'a,"a, ""b""\nc",18446744073709551615,0.5,"interval(7.5, sigma=0.28..5.42)","{""x"": 0.5}","[9, 5]",base@0..1\r\n'
        "\r\n"
        "007,1,,,7.5,,,\n"
        "b,short\n"
        "c,猫,x,,,,,\n".encode()
    )
    manifest = Manifest(file)
    assert manifest.total == 4
    rows = [(row.index, row.line, values(row)) for row in manifest.rows()]
    assert rows[0] == (0, 2, {
        "id": "a", "prompt": 'a, "b"\nc', "seed": 2**64 - 1, "eta": 0.5, "guidance": "interval(7.5, sigma=0.28..5.42)",
        "adapters": {"x": 0.5}, "timesteps": [9, 5], "experts": "base@0..1",
    })  # fmt: skip
    assert rows[1] == (1, 5, {"id": "007", "prompt": "1", "guidance": "7.5"})  # texts stay texts
    assert rows[2] == (2, 6, "the row has 2 cells, the first line 8")
    assert rows[3][:2] == (3, 7)
    assert rows[3][2].startswith("the cell of seed: it is not JSON")


def test_csv_goes_on_behind_bad_rows(tmp_path):
    file = tmp_path / "jobs.csv"
    file.write_text('prompt,seed\n"a"b,1\nc,2\n')
    found = [values(row) for row in Manifest(file).rows()]
    assert found[0].startswith("the row cannot be read as CSV")
    assert found[1:] == [{"prompt": "c", "seed": 2}]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("jobs.txt", b"x", "is no manifest"),
        ("jobs.jsonl", b"\n \n", "has no jobs"),
        ("jobs.csv", b"prompt\n", "has no jobs"),
        ("jobs.csv", b"a,b\n1,2\n", "column names are needed"),
        ("jobs.csv", b"prompt,prompt\n1,2\n", "column names are needed"),
        ("jobs.csv", b"prompt\n\xff\n", "line 2 is not UTF-8"),
        ("jobs.csv", b"prompt\n" + b"x" * (5 << 20), "line 2 is longer than 4 MiB"),
        ("jobs.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_files_that_are_no_manifests(name, data, reason, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RequestError, match=reason):
        Manifest(tmp_path / name)


def test_folders_and_nothing_are_no_manifests(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        with pytest.raises(RequestError, match="is not a file"):
            Manifest(tmp_path / name)


def test_memory_does_not_grow_with_the_manifest(tmp_path):
    file = tmp_path / "jobs.jsonl"
    with file.open("w") as stream:
        for _ in range(20_000):
            stream.write('{"prompt": "' + "x" * 500 + '"}\n')
    tracemalloc.start()
    assert Manifest(file).total == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20  # the file has 10 MB


def test_manifests_may_not_grow_while_they_are_read(tmp_path):
    file = tmp_path / "jobs.jsonl"
    file.write_text('{"prompt": "a"}\n')
    manifest = Manifest(file)
    file.write_text('{"prompt": "a"}\n' * 2)
    with pytest.raises(RequestError, match="has grown while it was read"):
        list(manifest.rows())
