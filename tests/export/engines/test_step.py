"""The step's own graphs, run by ONNX Runtime, against the reference of the update kernel and plain indexing."""

import numpy as np
import onnxruntime
import pytest
import torch

from stepforge.export.engines import step
from stepforge.kernels.reference import guide_update
from stepforge.runtime.backends.tensorrt.step import NAMES, NUM_P, NUM_X


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("step")
    sessions = {}
    for name in NAMES:
        step.write(name, folder / f"{name}.onnx")
        sessions[name] = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
    return lambda name, **inputs: sessions[name].run(None, inputs)


@pytest.mark.parametrize("seed", range(3))
def test_update_is_the_kernels_reference(run, seed):
    """Images at different steps, some done, one named twice as rows of padding are; what has the weight 0 may hold NaN."""
    random = np.random.RandomState(seed)
    places, steps, size, rows, window = 6, 4, 24, 7, NUM_X + NUM_P

    def draw(*shape):
        return random.standard_normal(shape).astype(np.float32)

    guidance, table = draw(places, steps, 2), draw(places, steps, window + 1)
    guidance[0, :, 1] = guidance[1, :, 0] = 0
    table[random.rand(*table.shape) < 0.5] = 0
    table[2] = [1.0, *(0.0,) * window]
    counters = np.array([0, 2, 3, 1, steps, steps], np.int64)
    own = np.array([[0, 6], [6, 1], [2, 3], [4, 5], [0, 0], [0, 0], [0, 0]], np.int64)
    at = np.array([0, 1, 2, 3, 4, 5, 5], np.int64)
    given = {
        "prediction": draw(rows, size), "sources": own, "places": at, "guidance": guidance, "table": table,
        "scale_in": draw(places, steps + 1), "step": counters, "state": draw(places, window, size), "z": draw(places, size),
        "sample": draw(places, size),
    }  # fmt: skip
    given["prediction"][6] = np.nan
    given["z"][2] = np.nan
    given["state"][2, 1:NUM_X] = np.nan
    state, sample, counted = run("update", **given)
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    want_state, want_sample = guide_update(
        *(tensors[n] for n in ("prediction", "guidance", "table", "scale_in", "step", "state", "z")),
        tensors["places"][:6], tensors["sources"][:6], NUM_X,
    )  # fmt: skip
    np.testing.assert_allclose(state, want_state, rtol=0, atol=1e-5)
    moved = counters < steps
    np.testing.assert_allclose(sample[moved], want_sample.numpy()[moved], rtol=0, atol=1e-5)
    assert np.array_equal(sample[~moved], given["sample"][~moved])
    assert np.array_equal(counted, np.where(moved, counters + 1, counters))


def test_rows_are_looked_up_and_spread(run):
    random = np.random.RandomState(0)
    table, values = random.rand(5, 7).astype(np.float32), random.rand(4, 3).astype(np.float32)
    rows, counters = np.array([4, 0, 4], np.int64), np.array([1, 9, 0, 0, 2], np.int64)
    assert np.array_equal(run("select", table=table, rows=rows)[0], table[rows])
    assert np.array_equal(run("look", table=table, owners=np.array([4, 1, 0], np.int64), step=counters)[0],
                          [table[4, 2], table[1, 6], table[0, 1]])  # fmt: skip
    own = np.array([[np.nan] * 3, [1, 2, 3]], np.float32)
    found = run("spread", total=values, own=own, map=np.array([-1, 1, -1, 1], np.int64))[0]
    added = np.array([[0], [1], [0], [1]], np.float32) * np.array([1, 2, 3], np.float32)
    assert np.array_equal(found, values + added)
