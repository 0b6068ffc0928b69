"""Weights that an engine has packed do not stay resident a second time."""

import mmap
import sys

import numpy as np
import pytest

from stepforge.runtime.backends import open_backend
from stepforge.runtime.backends.mapped import release
from stepforge.runtime.bundle import UNET, read

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")]
SIZE = 8 << 20


def resident(folder):
    """Bytes of mappings of files below a folder that are in this process's resident memory."""
    total, ours = 0, False
    with open("/proc/self/smaps", "rb") as lines:
        for line in lines:
            if b"-" in line.split(maxsplit=1)[0]:
                ours = f"{folder}/".encode() in line
            elif ours and line.startswith(b"Rss:"):
                total += int(line.split()[1]) << 10
    return total


def test_shared_read_only_pages_are_dropped_and_come_back(tmp_path):
    content = np.random.RandomState(0).bytes(SIZE)
    inside, outside = tmp_path / "in", tmp_path / "in and\r\x0b\u2028out"  # no separators of lines to the kernel
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "weights data").write_bytes(content)
    with open(inside / "weights data", "r+b") as one, open(outside / "weights data", "rb") as other:
        read_only, theirs = (mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) for file in (one, other))
        written = mmap.mmap(one.fileno(), 0, access=mmap.ACCESS_COPY)  # private: its changes exist in memory alone
        written[:4] = b"mine"
        assert read_only[:] == content == theirs[:]
        assert resident(inside) >= SIZE
        assert release([inside]) == SIZE
        assert resident(inside) < SIZE // 4
        assert resident(outside) >= SIZE
        assert read_only[:] == content
        assert written[:4] == b"mine"
        for mapping in (read_only, theirs, written):
            mapping.close()


@pytest.mark.parametrize("start", ["anew", "from the cache"])
def test_openvino_keeps_its_own_copy_of_weights_alone(tiny_sd1_banks, tmp_path, monkeypatch, start):
    """Of the compiled network, its first call, and a call of another shape; what OpenVINO reads in every call may stay."""
    monkeypatch.setenv("STEPFORGE_CACHE", str(tmp_path / "cache"))
    bundle = read(tiny_sd1_banks)
    if start == "from the cache":
        open_backend("openvino", bundle, precision="fp32", threads=1).open(UNET)
    graph = open_backend("openvino", bundle, precision="fp32", threads=1).open(UNET)
    banks = {t.name: np.zeros(t.shape, np.float32) for t in bundle.components[UNET].inputs if ".lora_" in t.name}
    for side in (8, 16):
        call = {
            "sample": np.ones((1, 4, side, side), np.float32), "timestep": np.ones(1, np.float32),
            "encoder_hidden_states": np.ones((1, 77, 32), np.float32), "adapter": np.zeros(1, np.int64),
            "adapter_strength": np.zeros((1, 1, 1), np.float32),
        }  # fmt: skip
        graph({**call, **banks})
        assert resident(tmp_path) + resident(bundle.path) < (64 << 10)
