"""The journal of a batch: torn and damaged lines."""

import json

import pytest

from stepforge.runtime.errors import RequestError
from stepforge.runtime.serve.journal import Journal

FACTS = {"bundle": "b", "manifest": "m", "settings": {"a": 1}}


@pytest.fixture
def path(tmp_path):
    folder = tmp_path / "out" / ".stepforge"
    folder.mkdir(parents=True)
    return folder / "journal.jsonl"


def opened(path, facts=FACTS):
    return Journal(path, facts, 4)


def test_any_cut_leaves_whole_lines(path, monkeypatch):
    """Cut at every byte: the lines before the cut stand, the torn one is as if it had never been, and it can be appended."""
    monkeypatch.setattr("os.fsync", lambda _: None)  # hundreds of waits for the disk
    records = [{"job": job, "line": job + 1, "files": [{"name": "ä" * job + "x", "size": 1}]} for job in (2, 0, 3)]
    journal = opened(path)
    journal.append(records[:2])
    journal.append(records[2:])
    assert [record["job"] for record in journal.records()] == [0, 2, 3]
    journal.close()
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        journal = opened(path)
        whole = max(data[:cut].count(b"\n") - 1, 0)
        assert sorted(record["job"] for record in journal.records()) == sorted(r["job"] for r in records[:whole])
        journal.append([{"job": 1, "line": 2, "error": "no"}])
        journal.close()
        journal = opened(path)
        assert journal[1] == {"job": 1, "line": 2, "error": "no"}
        assert len(list(journal.records())) == whole + 1
        journal.close()


def test_a_tail_of_zeros_is_torn(path):
    opened(path).close()
    data = path.read_bytes()
    path.write_bytes(data + bytes(4096))
    opened(path).close()
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "{}", '{"job": 4}', '{"job": -1}', '{"job": "0"}', '{"job": true}', '{"job": 0, "files": {}}']
    + [f'{{"job": 0, "files": [{{"name": {name}, "size": 1}}]}}' for name in ('"../a"', '"/a"', '".."', '""', "1")],
)
def test_damage_before_the_end_is_refused(line, path):
    opened(path).close()
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RequestError, match="is damaged at line 2"):
        opened(path)


def test_files_that_are_no_journal(path):
    path.write_text("hello\n")
    with pytest.raises(RequestError, match="is damaged at line 1"):
        opened(path)


def test_other_facts_are_named(path):
    opened(path).close()
    with pytest.raises(RequestError, match="another bundle"):
        opened(path, {**FACTS, "bundle": "c"})
    with pytest.raises(RequestError, match=r"other options \(a\)"):
        opened(path, {**FACTS, "settings": {"a": 2}})
    assert json.loads(path.read_text())["bundle"] == "b"


def test_the_last_line_of_a_job_counts(path):
    journal = opened(path)
    journal.append([{"job": 0, "line": 1, "error": "no"}])
    journal.forget(0)
    assert 0 not in journal
    journal.append([{"job": 0, "line": 1, "files": []}])
    journal.close()
    journal = opened(path)
    assert journal[0] == {"job": 0, "line": 1, "files": []}
    assert 1 not in journal
    journal.close()
