"""Batches: what is drawn, what a killed run leaves, and what becomes of bad jobs and bad disks."""

import errno
import io
import json
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import stepforge
from stepforge.runtime.serve.draw import facts_of
from stepforge.runtime.serve.manifest import own_seed
from stepforge.runtime.serve.store import OWN, Store

SMALL = {"steps": 2, "width": 64, "height": 64}
PROMPTS = [{"prompt": f"cat {i}", "seed": i} for i in range(12)]


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_images_are_those_of_generate(batch, jobs, tmp_path, files):
    """Same pixels as the engine's own, with the request in the file and a line in the sidecar; images=2 makes two files."""
    manifest = jobs(*PROMPTS[:3], {"prompt": "two", "seed": 7, "images": 2, "id": "a-b_C"})
    code, report, _ = batch(manifest)
    assert (code, report["done"], report["images"], report["left"]) == (0, 4, 5, 0)
    sidecar = lines(tmp_path / "out/images.jsonl")
    names = ["00000000.png", "00000001.png", "00000002.png", "00000003-a-b_C-0.png", "00000003-a-b_C-1.png"]
    assert [line["file"] for line in sidecar] == names
    assert [line["seed"] for line in sidecar] == [0, 1, 2, 7, 8]
    assert {name: sha for name, sha in files(tmp_path / "out").items() if name in names} == {
        line["file"]: line["sha256"] for line in sidecar
    }
    with stepforge.load("fake") as engine:
        for line in sidecar:
            (expected,) = engine.generate(line["prompt"], seed=line["seed"], **SMALL).images
            with Image.open(tmp_path / "out" / line["file"]) as image:
                assert image.tobytes() == expected.tobytes()
                assert json.loads(image.info["stepforge"])["prompt"] == line["prompt"]


def test_same_seeds_give_the_same_images_whatever_batch_size_order_workers_and_resume_point(
    batch, jobs, tmp_path, monkeypatch, files
):
    """Byte for byte; a job without a seed has one of its fields and its id or place. Networks whose roundings depend on the
    rows of a call: `test_kinds.py`."""
    mixed = [{"width": 96, "images": 2}, {"steps": 5, "sampler": "euler_a"}, {"upscale": "nearest"}, {"guidance": 1}]
    given = [{**job, **mixed[i % 4]} for i, job in enumerate(PROMPTS)]
    given += [{"prompt": "x", "id": "x"}, {"prompt": "x", "id": "y"}]
    manifest = jobs(*given)
    batch(manifest, out="whole")
    whole = files(tmp_path / "whole")
    for rows, threads, encoders, together in ((2, 1, 1, 1), (3, 2, 8, 2), (64, 1, 2, 32)):
        monkeypatch.setattr("stepforge.runtime.serve.draw.ENCODERS", encoders)
        monkeypatch.setattr("stepforge.runtime.serve.batch.TOGETHER", together)
        batch(manifest, "--max-rows", rows, "--threads", threads, out=f"rows{rows}")
        assert files(tmp_path / f"rows{rows}") == whole
    publish, left = Store.publish, [1, 2, 5]

    def failing(*arguments):
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.EIO, "gone")
        publish(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "publish", failing)
        patch.setattr("stepforge.runtime.serve.batch.TOGETHER", 1)
        while left:  # three resume points, each with other rows
            assert batch(manifest, "--max-rows", 1 + 2 * len(left), out="resumed")[0] == 1
            del left[0]
    assert batch(manifest, out="resumed")[1]["resumed"] == 5
    assert files(tmp_path / "resumed") == whole
    batch(jobs(*reversed(given)), out="c")
    drawn = [{line["sha256"] for line in lines(tmp_path / name / "images.jsonl")} for name in ("whole", "c")]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == len(given) + 3  # x and y differ by their ids; three jobs have two images
    fields = {**SMALL, "prompt": "x"}
    assert lines(tmp_path / "whole/images.jsonl")[-1]["seed"] == own_seed(13, "y", fields) == own_seed(0, "y", fields)
    assert own_seed(0, "", fields) != own_seed(1, "", fields)


def test_bad_jobs_stop_nobody(batch, jobs, tmp_path, files):
    inside, outside = tmp_path / "in.png", tmp_path.parent / "outside.png"
    for path in (inside, outside):
        Image.new("RGB", (8, 8)).save(path)
    control = {"name": "a", "image": "in.png"}
    bad = {
        "{": "it is not JSON",
        "[1]": "an object with the fields of a request is needed",
        json.dumps({"prompt": "x", "seed": -1}): "seed is -1",
        json.dumps({"prompt": "x", "sede": 1}): "a request has no 'sede'",
        json.dumps({"prompt": "x", "id": "../x"}): "the id is '../x'",
        json.dumps({"prompt": "x", "id": 7}): "the id is 7",
        json.dumps({"prompt": "x", "sampler": "no"}): "sampler is 'no'",
        json.dumps({"prompt": "x", "width": 63}): "63",
        json.dumps({"prompt": "x", "adapters": {"none": 1}}): "none",
        json.dumps({"prompt": "x", "controls": control}): "ControlNet",  # the bundle has none; the picture may be read
        json.dumps({"prompt": "x", "controls": {**control, "image": "../outside.png"}}): "is not in",
        json.dumps({"prompt": "x", "controls": [{**control, "image": str(outside)}]}): "is not in",
        '{"prompt": "' + "x" * (4 << 20) + '"}': "the line is longer than 4 MiB",
    }
    manifest = jobs(PROMPTS[0], "", *bad, PROMPTS[1])
    code, report, errors = batch(manifest)
    assert code == 1
    assert (report["done"], report["failed"], report["left"]) == (2, len(bad), 0)
    told = lines(tmp_path / "out/failures.jsonl")
    assert [line["line"] for line in told] == list(range(3, 3 + len(bad)))
    for line, reason in zip(told, bad.values(), strict=True):
        assert reason in line["error"]
    assert len(errors) == len(bad)
    assert all(error.startswith("stepforge: jobs.jsonl, line ") for error in errors)
    before = files(tmp_path / "out")
    code, report, errors = batch(manifest)  # they stay failed, and nothing is drawn again
    assert (code, report["done"], report["resumed"], report["failed"], errors) == (1, 0, 2, len(bad), [])
    code, report, errors = batch(manifest, "--retry-failed")
    assert (code, report["done"], report["failed"]) == (1, 0, len(bad))
    assert files(tmp_path / "out") == before
    allowed = jobs({"prompt": "x", "controls": [{**control, "image": "outside.png"}]})
    assert "ControlNet" in batch(allowed, "--pictures", tmp_path.parent, out="b")[2][0]


def test_failures_can_be_too_many(batch, jobs, tmp_path):
    manifest = jobs(*["{"] * 3, *PROMPTS)
    code, report, errors = batch(manifest, "--max-failures", 2, "--max-rows", 2)
    assert code == 1
    assert report["failed"] == 3
    assert errors[-1] == "stepforge: stopped: 3 jobs failed, --max-failures is 2"
    code, report, _ = batch(manifest, "--max-rows", 2)
    assert (report["failed"], report["left"]) == (3, 0)
    assert len(lines(tmp_path / "out/images.jsonl")) == len(PROMPTS)


@pytest.mark.parametrize(("kind", "ending"), [("webp", "webp"), ("jpeg", "jpg")])
def test_other_formats(kind, ending, batch, jobs, tmp_path):
    assert batch(jobs(PROMPTS[0]), "--format", kind)[0] == 0
    with Image.open(tmp_path / f"out/00000000.{ending}") as image:
        assert (image.format, image.size) == (kind.upper(), (64, 64))


def test_shards_hold_neighbours(batch, jobs, tmp_path, files):
    """WebDataset: KEY.json before KEY.png, no times; a shard of failed jobs alone has no file."""
    manifest = jobs(*PROMPTS[:5], "{", "{", "{", {"prompt": "two", "images": 2}, "{")
    options = ("--layout", "webdataset", "--shard-size", 3)
    assert batch(manifest, *options)[0] == 1
    assert list(files(tmp_path / "out")) == [
        "failures.jsonl", "shard-000000.tar", "shard-000001.tar", "shard-000002.tar",
    ]  # fmt: skip
    with tarfile.open(tmp_path / "out/shard-000002.tar") as tar:
        assert tar.getnames() == ["00000008-0.json", "00000008-0.png", "00000008-1.json", "00000008-1.png"]
        assert {(m.mtime, m.uid, m.uname) for m in tar.getmembers()} == {(0, 0, "")}
        about = json.load(tar.extractfile("00000008-1.json"))
        with Image.open(io.BytesIO(tar.extractfile("00000008-1.png").read())) as image:
            assert json.loads(image.info["stepforge"]) == about
    with tarfile.open(tmp_path / "out/shard-000001.tar") as tar:
        assert tar.getnames() == ["00000003.json", "00000003.png", "00000004.json", "00000004.png"]
    assert not list((tmp_path / "out" / OWN / "staging").iterdir())
    before = files(tmp_path / "out")
    (tmp_path / "out/shard-000000.tar").write_bytes(b"cut")  # not what the journal tells of
    report = batch(manifest, *options)[1]
    assert (report["done"], report["resumed"]) == (3, 3)
    assert files(tmp_path / "out") == before
    assert "--retry-failed needs --layout files" in batch(manifest, *options, "--retry-failed")[2][0]
    batch(jobs(*["{"] * 3, PROMPTS[0]), *options, out="b")
    assert list(files(tmp_path / "b")) == ["failures.jsonl", "shard-000001.tar"]


def test_parquet_in_and_out(batch, tmp_path, files):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{**SMALL, "prompt": f"p{i}", "seed": None if i == 1 else i, "guidance": None} for i in range(4)]
    parquet.write_table(pa.Table.from_pylist([*rows, {**SMALL, "prompt": None}]), tmp_path / "jobs.parquet")
    code, report, errors = batch(tmp_path / "jobs.parquet", "--layout", "parquet", "--shard-size", 3)
    assert (code, report["done"], report["failed"]) == (1, 4, 1)
    assert "line 5: a request needs a prompt" in errors[0]
    table = parquet.read_table(tmp_path / "out/part-000000.parquet").to_pylist()
    assert [(row["key"], row["prompt"]) for row in table] == [(f"{i:08d}", f"p{i}") for i in range(3)]
    with Image.open(io.BytesIO(table[2]["image"])) as image:
        assert json.loads(image.info["stepforge"]) == json.loads(table[2]["about"])
    before = files(tmp_path / "out")
    batch(tmp_path / "jobs.parquet", "--layout", "parquet", "--shard-size", 3, out="again")
    assert files(tmp_path / "again") == before
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not")
    assert "cannot be read as Parquet" in batch(tmp_path / "bad.parquet")[2][0]


def test_parquet_without_pyarrow(batch, jobs, monkeypatch, tmp_path):
    for name in [*(n for n in sys.modules if n.split(".")[0] == "pyarrow"), "pyarrow"]:
        monkeypatch.setitem(sys.modules, name, None)
    code, _, errors = batch(jobs(PROMPTS[0]), "--layout", "parquet")
    assert (code, errors) == (2, ["stepforge: Parquet needs the package pyarrow; pip install 'stepforge[parquet]'"])
    assert not (tmp_path / "out").exists()


def test_other_batches_are_refused(batch, jobs, tmp_path, files):
    """Another manifest, other options, another bundle's journal, a folder of other things; --overwrite begins anew."""
    first, out = jobs(*PROMPTS[:2]), tmp_path / "out"
    batch(first)
    journal = out / OWN / "journal.jsonl"
    kept = journal.read_bytes()
    other = jobs(PROMPTS[2], name="other.jsonl")
    assert "holds a batch of another manifest; give what it was begun with" in batch(other)[2][0]
    assert "other options (format)" in batch(first, "--format", "webp")[2][0]
    assert "other options (format, negative)" in batch(first, "--negative", "dog", "--format", "jpeg")[2][0]
    head = json.loads(kept.split(b"\n")[0])
    journal.write_text(json.dumps({**head, "bundle": "0" * 64}) + "\n")
    assert "another bundle" in batch(first)[2][0]
    journal.write_bytes(kept)
    (out / "mine.txt").write_text("kept")
    code, report, _ = batch(other, "--format", "webp", "--overwrite")
    assert (code, report["done"]) == (0, 1)
    assert list(files(out)) == ["00000000.webp", "images.jsonl", "mine.txt"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.txt").write_text("")
    code, _, errors = batch(first, out="mine")
    assert (code, len(errors)) == (2, 1)
    assert "holds other files" in errors[0]
    assert "is not a folder" in batch(first, out="jobs.jsonl")[2][0]


def test_another_file_of_an_adapter_is_another_batch():
    with stepforge.load("fake") as engine:
        adapter = stepforge.Adapter("style", "ab12", {}, [], [])
        told = SimpleNamespace(
            bundle=engine.bundle, backend=engine.backend, adapters=SimpleNamespace(list=lambda: {"style": adapter})
        )
        assert facts_of(told) == {**facts_of(engine), "adapters": {"style": "ab12"}}


@pytest.mark.parametrize("change", ["cut", "gone", "longer"])
def test_files_that_differ_are_drawn_again(change, batch, jobs, tmp_path, files):
    manifest, image = jobs(*PROMPTS[:3]), tmp_path / "out/00000001.png"
    batch(manifest)
    before = files(tmp_path / "out")
    data = image.read_bytes()
    image.unlink() if change == "gone" else image.write_bytes(data[:-1] if change == "cut" else data + b"\0")
    assert batch(manifest)[1]["done"] == 1
    assert files(tmp_path / "out") == before


KILLED = """
import os, random, signal, sys
from pathlib import Path
number, layout, *arguments = sys.argv[1:]
left = int(number)
def deadly(original):
    def call(*given, **keywords):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given, **keywords)
    return call
os.fsync, Path.replace, os.write, Path.unlink = map(deadly, (os.fsync, Path.replace, os.write, Path.unlink))
main(["batch", "fake", *arguments, "--json", "--layout", layout, "--shard-size", "5"])
"""


@pytest.mark.parametrize("layout", ["files", "webdataset"])
def test_killed_runs_lose_and_double_nothing(layout, batch, jobs, tmp_path, files):
    """SIGKILL at a random one of the calls that change the disk, twice over one folder."""
    manifest = jobs(*PROMPTS, "{")
    batch(manifest, "--layout", layout, "--shard-size", 5, out="whole")
    chance = random.Random(layout)
    for _ in range(2):
        command = [sys.executable, "-c", KILLED, str(chance.randint(4, 22)), layout, manifest, "-o", tmp_path / "out"]
        assert subprocess.run(command, capture_output=True).returncode in (-signal.SIGKILL, 1)
    batch(manifest, "--layout", layout, "--shard-size", 5)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    own = tmp_path / "out" / OWN
    assert [path for path in own.rglob("*") if path.is_file()] == [own / "journal.jsonl"]
    assert batch(manifest, "--layout", layout, "--shard-size", 5)[1]["done"] == 0


def test_signals_keep_what_is_finished(jobs, batch, tmp_path):
    manifest = jobs(*({"prompt": f"cat {i}", "steps": 400} for i in range(60)))
    command = [sys.executable, "-m", "stepforge.runtime", "batch", "fake", manifest, "-o", tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "out").glob("*.png")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.terminate()
        output, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert error == "stepforge: terminated\n"
    done = len(list((tmp_path / "out").glob("*.png")))
    assert 0 < done < 60
    assert f"{done} of 60 jobs done, 0 by earlier runs, 0 failed, {60 - done} left" in output
    assert len(lines(tmp_path / "out/images.jsonl")) == done
    store = Store(tmp_path / "out", layout="files", kind="png", shard_size=1, overwrite=False)
    assert len(store.journal.read_bytes().splitlines()) == done + 1


def test_one_process_a_folder(batch, jobs, tmp_path):
    import fcntl

    manifest = jobs(PROMPTS[0])
    batch(manifest)
    with (tmp_path / "out" / OWN / "journal.jsonl").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process is writing the batch" in batch(manifest)[2][0]
        assert "another process is writing the batch" in batch(manifest, "--overwrite")[2][0]
    assert batch(manifest)[1]["resumed"] == 1
