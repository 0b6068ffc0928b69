"""benchmarks/bench.py: the gate, runs that go on, images that differ, and runs compared by ratio, on records made up here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import bench
from suite import history, report
from suite.cases import Case, Record, Store
from suite.items import ITEMS, item
from suite.models import whole_steps

DIFFUSERS, OURS = Case("txt2img", "demo", "diffusers"), Case("txt2img", "demo", "stepforge openvino")
GATE = Case("parity", "demo", "stepforge openvino")


def record(case, *seconds, **more):
    return Record(case, list(seconds), machine="a machine", commit="abc", command="bench", **more)


def test_every_item_has_cases_of_its_own():
    for profile in (True, False):
        keys = [case.key for name in ITEMS for case in item(name).cases(profile, ["fp32", "bf16"])]
        assert len(keys) == len(set(keys))
        assert all(item(name).TITLE for name in ITEMS)


def test_who_draws_another_image_has_no_ratio(tmp_path):
    store = Store(tmp_path)
    image = np.random.RandomState(0).rand(1, 8, 8, 3).astype(np.float32)
    wrong = Case("txt2img", "demo", "openvino")
    for case, drawn in ((DIFFUSERS, image), (OURS, image + 1e-3), (wrong, np.roll(image, 1, 1))):
        np.save(store.image(case), drawn)
    noted = record(OURS, 1.5, peak=3 << 30, weights=2 << 30, notes={"weights": "a note in no figure's place"})
    records = [record(DIFFUSERS, 3.0, 2.0, 4.0), noted, record(wrong, 0.1)]
    first, ours, other = report.rows(records, store)
    assert (first["ratio"], ours["ratio"]) == (1.0, 2.0)
    assert ours["psnr"] == pytest.approx(60.0, abs=0.1)
    assert other["differs"]
    assert "ratio" not in other
    page = report.markdown("quick", records, store)
    assert "3 s (2..4)" in page
    assert "1.50 x weights" in page
    assert "another image" in page


@pytest.mark.parametrize("fails", [False, True])
def test_gate_and_resumption(tmp_path, monkeypatch, capsys, fails):
    """No speed without parity; a finished case is not measured again; a run out of time says so."""
    cases = {"parity": [GATE], "txt2img": [DIFFUSERS, OURS]}

    def only(name: str) -> SimpleNamespace:
        return SimpleNamespace(cases=lambda quick, offered: cases.get(name, []), TITLE=name)

    ran = []

    def run_case(case: Case, args: object, store: Store) -> Record:
        ran.append(case)
        return Record(case, [1.0], refused="parity failed" if fails and case == GATE else "")

    monkeypatch.setattr(bench, "item", only)
    monkeypatch.setattr(report, "item", only)
    monkeypatch.setattr(bench, "run_case", run_case)
    monkeypatch.setattr(bench, "precisions", lambda: ["fp32"])
    monkeypatch.setattr(report, "plot", lambda told, path: None)
    arguments = ["bench.py", "quick", "--work", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--minutes", "-1"])
    assert bench.main() == bench.UNFINISHED
    monkeypatch.setattr(sys, "argv", arguments)
    assert bench.main() == int(fails)
    assert ran == ([GATE] if fails else [GATE, DIFFUSERS, OURS])
    assert (tmp_path / "out/quick.md").exists() != fails
    if not fails:
        ran.clear()
        assert bench.main() == 0
        assert ran == []


def test_runs_are_compared_by_ratio(tmp_path, capsys):
    path = tmp_path / "history.jsonl"
    for commit, ratio in (("a", 2.0), ("b", 3.0), ("b", 1.9), ("c", 1.2)):  # b is reported twice
        history.append(path, "quick", [{"key": OURS.key, "ratio": ratio, "commit": commit, "machine": "one"}])
        print(history.compare(path, "quick", 0.15))
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) == 1] == ["0", "0", "0", "1"]
    history.append(path, "quick", [{"key": OURS.key, "ratio": 0.5, "commit": "abc", "machine": "another"}])
    assert history.compare(path, "quick", 0.15) == 0
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 4


def test_a_timestep_for_all_rows():
    """The graph that OpenVINO GenAI is given says the same as ours."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    axes = {"sample": ["rows", 4, 2, 2], "timestep": ["rows"]}
    given = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in axes.items()]
    told = onnx.helper.make_tensor_value_info("prediction", onnx.TensorProto.FLOAT, ["rows"])
    nodes = [onnx.helper.make_node("Identity", ["timestep"], ["prediction"])]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", given, [told]))
    whole_steps(model)
    values = {"sample": np.zeros((3, 4, 2, 2), np.float32), "timestep": np.array([7])}
    assert ReferenceEvaluator(model).run(None, values)[0].tolist() == [7.0, 7.0, 7.0]


def test_nothing_is_imported_upwards():
    """items <- report <- bench; runners know no items, models no runners."""
    root = Path(__file__).resolve().parents[1] / "benchmarks/suite"
    forbidden = {"cases.py": ("suite.",), "models.py": ("suite.runners", "suite.items"), "runners": ("suite.items",)}
    for place, names in forbidden.items():
        files = [root / place] if place.endswith(".py") else (root / place).glob("*.py")
        for file in files:
            assert not any(f"from {name}" in file.read_text() for name in names), file
