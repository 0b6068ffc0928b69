"""Wheel and sdist, as a user would get them."""

import importlib.metadata
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.long  # builds both in processes of their own
def test_wheel_and_sdist_hold_the_package_and_nothing_else(tmp_path):
    """An sdist, and a wheel built from it; the wheel runs from a folder of its own."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(sdist) as archive:
        tops = {Path(name).parts[1] for name in archive.getnames() if len(Path(name).parts) > 1}
    assert {"kernels", "runtime", "export", "stepforge", "setup.py", "LICENSE"} <= tops
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        assert {name.split("/")[0].split("-")[0] for name in archive.namelist()} == {"stepforge"}
        archive.extractall(target)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import stepforge as r; "
        "assert r.__file__.startswith(sys.argv[1]), r.__file__\n"
        "with r.load('fake') as engine: engine.generate(r.Request(prompt='x', steps=1))"
    )
    subprocess.run([sys.executable, "-I", "-S", "-c", f"import site; site.addsitedir({str(target)!r})"], check=True)
    environment = [sys.executable, "-P", "-c", code.replace("sys.path.insert", _without_editable() + "sys.path.insert")]
    subprocess.run([*environment, str(target)], check=True, cwd=tmp_path)


def test_no_extra_asks_for_two_packages_of_one_name():
    """onnxruntime and onnxruntime-gpu overwrite each other's files: without an extra neither is installed, and an extra asks
    for one of them at most. What pip would resolve, from the wheel's own metadata."""
    from packaging.requirements import Requirement

    requires = [Requirement(line) for line in importlib.metadata.requires("stepforge") or ()]
    extras = ["", *importlib.metadata.metadata("stepforge").get_all("Provides-Extra", ())]
    asked = {
        extra: {r.name for r in requires if r.marker is None or r.marker.evaluate({"extra": extra})} for extra in extras
    }
    pair = {"onnxruntime", "onnxruntime-gpu"}
    assert not asked[""] & pair
    assert all(len(names & pair) <= 1 for names in asked.values())
    assert asked["cuda"] & pair == asked["export-cuda"] & pair == {"onnxruntime-gpu"}
    assert asked["export"] & pair == asked["onnxruntime"] & pair == {"onnxruntime"}
    for extra in ("torch", "tensorrt", "tensorrt-rtx", "control", "parquet", "server"):
        assert not asked[extra] & pair, f"{extra} may be combined with either"


def _without_editable() -> str:
    """Take the editable install's import hook away, so that the wheel's files are what is imported."""
    return "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "
