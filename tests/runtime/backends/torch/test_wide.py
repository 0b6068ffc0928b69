"""Wide layers and sums of the fast tier against the exact tier, in fp32: only the order of sums differs."""

from __future__ import annotations

import numpy as np
import pytest

from stepforge.runtime.backends import Banks, open_backend
from stepforge.runtime.backends.torch.wide import bucket, columns_of
from stepforge.runtime.bundle import UNET, read

BANKS = (".lora_A", ".lora_B")


def opened(path, name):
    bundle = read(path)
    random = np.random.RandomState(1)
    banks = Banks({}, np.zeros(3, np.int64))
    for tensor in bundle.components[UNET].inputs:
        if tensor.name.endswith(BANKS):
            banks[tensor.name] = (0.1 * random.standard_normal(tensor.shape)).astype(np.float32)
            banks[tensor.name][0] = 0
    return open_backend(name, bundle, precision="fp32", threads=1).open(UNET, banks)


def call(graph, adapter, rows=slice(None)):
    random = np.random.RandomState(3)
    values = {
        "sample": random.standard_normal((3, 4, 16, 24)).astype(np.float32),
        "timestep": np.linspace(999, 1, 3).astype(np.float32),
        "encoder_hidden_states": random.standard_normal((3, 77, 32)).astype(np.float32),
        "adapter": np.array(adapter),
        "adapter_strength": np.array([0.7, 1.0, -0.5], np.float32).reshape(-1, 1, 1),
    }
    return graph({name: value[rows] for name, value in values.items()})["prediction"]


@pytest.fixture(scope="module")
def graphs(tiny_sd1_banks):
    return opened(tiny_sd1_banks, "torch"), opened(tiny_sd1_banks, "torch-exact")


@pytest.mark.parametrize("adapter", [[2, 0, 1], [1, 1, 1], [0, 0, 0]], ids=str)
def test_as_the_exact_tier(graphs, adapter):
    fast, exact = (call(graph, adapter) for graph in graphs)
    assert np.linalg.norm(fast - exact) <= 1e-5 * np.linalg.norm(exact)


def test_back_to_the_first_adapter_to_the_bit(graphs):
    first = call(graphs[0], [1, 1, 1])
    assert not np.array_equal(call(graphs[0], [2, 2, 2]), first)
    assert np.array_equal(call(graphs[0], [1, 1, 1]), first)


def test_a_mixed_batch_is_its_rows(graphs):
    """Columns of another adapter are zeros: within the rounding of a sum of more terms."""
    mixed = call(graphs[0], [2, 0, 1])
    for row in range(3):
        alone = call(graphs[0], [2, 0, 1], slice(row, row + 1))
        assert np.abs(mixed[row] - alone[0]).max() <= 1e-4 * np.abs(alone).max()


def test_columns():
    slots, mask = columns_of(np.array([3, 0, 1, 3]), 16)
    assert slots == (1, 3)
    assert mask.shape == (4, 32)
    assert mask.sum(1).tolist() == [16, 0, 16, 16]
    assert mask[0, 16:].all()
    assert mask[2, :16].all()
    assert [bucket(n) for n in (1, 17, 65, 128, 129, 257)] == [16, 32, 128, 128, 256, None]
    assert columns_of(np.array([1, 2, 3]), 100)[1] is None
