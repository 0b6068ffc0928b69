"""Whether this machine has a GPU that the torch backend runs on, without importing torch and without touching CUDA.

NVML, the library behind nvidia-smi, tells: it makes no CUDA context, so a process that asks may still fork.
CUDA_VISIBLE_DEVICES hides GPUs here as it does from CUDA.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

OLDEST = (8, 0)  # oldest compute capability with the kernels' bf16 tensor cores
NVML = "libnvidia-ml.so.1"


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name}, sm_{self.capability[0]}{self.capability[1]}"


def first_gpu() -> Gpu | None:
    """The first NVIDIA GPU that CUDA may use; None if there is none, or no driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = (visible or "0").split(",")[0].strip()
    if visible == "" or first == "-1":
        return None
    with _nvml() as nvml:
        if nvml is None:
            return None
        handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(96)
        major, minor = ctypes.c_int(), ctypes.c_int()
        index = ctypes.c_uint(int(first) if first.isdigit() else 0)  # a UUID: GPUs of one machine are of one kind
        failed = (
            nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
            or nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(len(name)))
            or nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
        )
        return None if failed else Gpu(name.value.decode(), (major.value, minor.value))


def driver() -> str | None:
    """Version of NVIDIA's driver; None if there is none."""
    with _nvml() as nvml:
        if nvml is None:
            return None
        found = ctypes.create_string_buffer(80)
        failed = nvml.nvmlSystemGetDriverVersion(found, ctypes.c_uint(len(found)))
        return None if failed else found.value.decode()


@contextmanager
def _nvml() -> Iterator[Any]:
    """NVML, initialised; None without a driver."""
    try:
        nvml = ctypes.CDLL(NVML)
    except OSError:
        yield None
        return
    if nvml.nvmlInit_v2():
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def torch_on_gpu() -> tuple[bool, str]:
    """Whether the torch backend runs on a GPU here, and on which or why not."""
    gpu = first_gpu()
    if gpu is None:
        return False, "no NVIDIA GPU"
    if gpu.capability < OLDEST:
        return False, f"{gpu} is older than sm_{OLDEST[0]}{OLDEST[1]}"
    for package in ("torch", "triton", "onnx"):
        if importlib.util.find_spec(package) is None:
            return False, f"{gpu}, but {package} is not installed"
    try:
        if "+cpu" in version("torch"):
            return False, f"{gpu}, but this torch is built for the CPU"
    except PackageNotFoundError:
        pass  # without metadata: let it try
    return True, str(gpu)
