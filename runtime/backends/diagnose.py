"""What of the GPU backends works on this machine, why the rest does not, and one line of advice for each.

Asks package metadata and NVML alone: nothing is imported, and CUDA is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import distributions

from stepforge.runtime.backends.gpu import OLDEST, Gpu, driver, first_gpu
from stepforge.runtime.backends.tensorrt.library import LIBRARIES

PACKAGES = (
    "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-lean-cu13", "tensorrt-rtx",
    "cuda-bindings", "torch", "triton",
)  # fmt: skip
CUDA_13_DRIVER = 580  # oldest driver of CUDA 13 (CUDA Toolkit release notes, "CUDA Driver")
TRITON = {"2.13": "3.7", "2.14": "3.8"}  # what these releases of torch want

Versions = Mapping[str, str]  # installed package among PACKAGES -> version


@dataclass(frozen=True, slots=True)
class Diagnosis:
    subject: str
    works: bool
    text: str  # with the advice
    is_broken: bool = False  # not merely absent


def installed() -> Versions:
    found = {}
    for one in distributions():
        name = str(one.metadata["Name"] or "").lower().replace("_", "-")
        if name in PACKAGES:
            found[name] = one.version
    return found


def diagnose() -> list[Diagnosis]:
    """This machine's. Never raises."""
    return examine(installed(), first_gpu(), driver())


def examine(versions: Versions, gpu: Gpu | None, driver_version: str | None) -> list[Diagnosis]:
    """versions: of installed packages; gpu, driver_version: as `gpu.first_gpu` and `gpu.driver` give them."""
    if gpu is None:
        why = (
            "no NVIDIA GPU, or CUDA_VISIBLE_DEVICES hides it"
            if driver_version
            else "no NVIDIA driver (libnvidia-ml.so.1)"
        )
        found = [Diagnosis("gpu", False, f"{why}; networks run on the CPU")]
    else:
        found = [Diagnosis("gpu", True, f"{gpu}, driver {driver_version}")]
    found += [
        _tensorrt("tensorrt", versions, gpu),
        _tensorrt("tensorrt-rtx", versions, gpu),
        _onnxruntime("onnxruntime-cuda", versions, gpu),
        _onnxruntime("onnxruntime-tensorrt", versions, gpu),
    ]
    for pair in PAIRS:
        if text := pair(versions, gpu, driver_version):
            found.append(Diagnosis("known-bad pair", False, text, is_broken=True))
    return found


def _tensorrt(name: str, versions: Versions, gpu: Gpu | None) -> Diagnosis:
    version, traits = versions.get(name), LIBRARIES[name]
    if version is None and name == "tensorrt":
        version = next((versions[other] for other in ("tensorrt-cu13", "tensorrt-cu12") if other in versions), None)
    lean = versions.get("tensorrt-lean-cu13") if name == "tensorrt" else None
    if version is None and lean is None:
        where = " (its libraries come from pypi.nvidia.com)" if name == "tensorrt" else ""
        return Diagnosis(name, False, f"not installed; pip install '{name}' cuda-bindings{where}")
    if gpu is None:
        use = "builds plans for other machines: stepforge build --target sm_89" if traits.targets else "there is no GPU"
        return Diagnosis(name, False, f"{version or lean}, {use}")
    target = f"sm_{gpu.capability[0]}{gpu.capability[1]}"
    if traits.targets and target not in traits.targets:
        return Diagnosis(name, False, f"{version}, which does not know {target}; use tensorrt or torch on this GPU")
    if "cuda-bindings" not in versions:
        return Diagnosis(name, False, f"{version or lean}, but cuda-bindings is missing; pip install cuda-bindings")
    if version is None:
        return Diagnosis(
            name, True, f"{lean}, lean: runs plans built with --version-compatible elsewhere, and builds none"
        )
    return Diagnosis(name, True, f"{version}; build plans with stepforge build BUNDLE --engine {name}")


def _onnxruntime(name: str, versions: Versions, gpu: Gpu | None) -> Diagnosis:
    version = versions.get("onnxruntime-gpu")
    if version is None:
        has = "onnxruntime is the CPU's; " if "onnxruntime" in versions else "not installed; "
        return Diagnosis(name, False, f"{has}pip uninstall onnxruntime, then pip install 'stepforge[cuda]'")
    if gpu is None:
        return Diagnosis(name, False, f"onnxruntime-gpu {version}, but there is no GPU")
    if name.endswith("tensorrt") and not any(key in versions for key in ("tensorrt", "tensorrt-cu12", "tensorrt-cu13")):
        return Diagnosis(name, False, f"onnxruntime-gpu {version}, but tensorrt is not installed")
    return Diagnosis(name, True, f"onnxruntime-gpu {version}")


Pair = Callable[[Versions, "Gpu | None", "str | None"], str]


def _two_onnxruntimes(versions: Versions, gpu: Gpu | None, driver_version: str | None) -> str:
    if "onnxruntime" in versions and "onnxruntime-gpu" in versions:
        return (
            "onnxruntime and onnxruntime-gpu are one import name and overwrite each other's files; pip uninstall both, "
            "then install one"
        )
    return ""


def _two_tensorrts(versions: Versions, gpu: Gpu | None, driver_version: str | None) -> str:
    both = "tensorrt-cu12" in versions and "tensorrt-cu13" in versions
    return "tensorrt-cu12 and tensorrt-cu13 are one import name; pip uninstall both, then install one" if both else ""


def _new_tensorrt(versions: Versions, gpu: Gpu | None, driver_version: str | None) -> str:
    tensorrt = next((versions[n] for n in ("tensorrt", "tensorrt-cu13", "tensorrt-cu12") if n in versions), "")
    onnxruntime = versions.get("onnxruntime-gpu", "")
    if tensorrt and onnxruntime and _number(tensorrt) >= (11,) and _number(onnxruntime) < (1, 27):
        return f"onnxruntime-gpu {onnxruntime} cannot use tensorrt {tensorrt}; from 1.27 on it can"
    return ""


def _old_driver(versions: Versions, gpu: Gpu | None, driver_version: str | None) -> str:
    bindings = versions.get("cuda-bindings", "")
    if driver_version and bindings and _number(bindings) >= (13,) and _number(driver_version) < (CUDA_13_DRIVER,):
        return f"driver {driver_version} is older than CUDA 13 needs ({CUDA_13_DRIVER}); update it, or use cuda-bindings 12"
    return ""


def _torch_and_triton(versions: Versions, gpu: Gpu | None, driver_version: str | None) -> str:
    torch, triton = versions.get("torch", ""), versions.get("triton", "")
    wanted = TRITON.get(".".join(torch.split(".")[:2]), "")
    if gpu is None or gpu.capability < OLDEST or not triton or not wanted or triton.startswith(f"{wanted}."):
        return ""
    return f"torch {torch} wants triton {wanted}, and {triton} is installed; pip install 'triton=={wanted}.*'"


PAIRS: tuple[Pair, ...] = (_two_onnxruntimes, _two_tensorrts, _new_tensorrt, _old_driver, _torch_and_triton)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())
