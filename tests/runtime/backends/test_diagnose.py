"""What `stepforge doctor` says of GPU backends, on machines that are told."""

import pytest

from stepforge.runtime.backends.diagnose import examine
from stepforge.runtime.backends.gpu import Gpu

H100, ADA = Gpu("NVIDIA H100", (9, 0)), Gpu("RTX 4090", (8, 9))
ALL = {"onnxruntime-gpu": "1.31.1", "tensorrt": "11.4.0.106", "tensorrt-rtx": "1.7.1.116", "cuda-bindings": "13.5.0"}


def told(versions, gpu, driver="590.1"):
    return {one.subject: one for one in examine(versions, gpu, driver)}


def test_a_machine_where_everything_works():
    found = told(ALL, ADA)
    assert all(one.works for one in found.values())
    assert not any(one.is_broken for one in found.values())
    assert "stepforge build BUNDLE --engine tensorrt-rtx" in found["tensorrt-rtx"].text


@pytest.mark.parametrize(
    ("versions", "gpu", "subject", "text"),
    [
        ({}, None, "gpu", "no NVIDIA GPU"),
        ({}, ADA, "tensorrt", "not installed; pip install 'tensorrt' cuda-bindings"),
        (ALL, None, "tensorrt-rtx", "builds plans for other machines: stepforge build --target"),
        (ALL, H100, "tensorrt-rtx", "does not know sm_90; use tensorrt or torch"),
        ({"tensorrt-rtx": "1.7"}, ADA, "tensorrt-rtx", "cuda-bindings is missing"),
        ({"onnxruntime": "1.32"}, ADA, "onnxruntime-cuda", "onnxruntime is the CPU's; pip uninstall onnxruntime"),
        ({"onnxruntime-gpu": "1.31"}, ADA, "onnxruntime-tensorrt", "tensorrt is not installed"),
    ],
)
def test_why_not_and_what_helps(versions, gpu, subject, text):
    found = told(versions, gpu)[subject]
    assert text in found.text
    assert not found.works
    assert not found.is_broken


@pytest.mark.parametrize(
    ("versions", "gpu", "driver", "text"),
    [
        (ALL | {"onnxruntime": "1.32.0"}, None, None, "one import name and overwrite each other"),
        ({"tensorrt-cu12": "10.1", "tensorrt-cu13": "11.4"}, None, None, "tensorrt-cu12 and tensorrt-cu13"),
        (ALL | {"onnxruntime-gpu": "1.26.0"}, ADA, "590.1", "cannot use tensorrt 11.4.0.106; from 1.27 on"),
        (ALL, ADA, "570.86", "driver 570.86 is older than CUDA 13 needs"),
        ({"torch": "2.13.0+cu130", "triton": "3.8.0"}, ADA, "590.1", "wants triton 3.7"),
    ],
)
def test_pairs_that_do_not_work_fail(versions, gpu, driver, text):
    found = told(versions, gpu, driver)["known-bad pair"]
    assert found.is_broken
    assert text in found.text


def test_pairs_that_do_work_are_not_told():
    versions = ALL | {"torch": "2.13.0", "triton": "3.7.1"}
    assert "known-bad pair" not in told(versions, ADA)
    lean = told({"tensorrt-lean-cu13": "11.4", "cuda-bindings": "13.5"}, H100)["tensorrt"]
    assert lean.works
    assert "version-compatible" in lean.text
