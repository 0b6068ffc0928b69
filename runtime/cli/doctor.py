"""`stepforge doctor`: what this machine can run, and what is wrong with it."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from stepforge.runtime.backends import AUTO, available_threads, choose, open_backend, runnable
from stepforge.runtime.backends.compile_cache import root
from stepforge.runtime.backends.diagnose import diagnose
from stepforge.runtime.backends.fake import fake_bundle
from stepforge.runtime.backends.gpu import torch_on_gpu
from stepforge.runtime.backends.tensorrt.plans import plans
from stepforge.runtime.bundle import read
from stepforge.runtime.cli import options
from stepforge.runtime.errors import StepforgeError
from stepforge.runtime.files import printable

LIBRARIES = ("numpy", "pillow", "tokenizers", "onnxruntime", "openvino")
OFFLINE = ("torch", "diffusers", "transformers", "safetensors", "onnxscript")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    subject: str
    ok: bool
    text: str


def doctor(
    bundle: Annotated[Path | None, typer.Argument(metavar="BUNDLE", help="Also check and load this bundle.")] = None,
    as_json: options.Json = False,
) -> None:
    """Say what this machine can run, and what is wrong."""
    findings = examine(bundle)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.ok else 'FAIL'} {finding.subject}: {printable(finding.text, 500)}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def examine(bundle: Path | None = None) -> list[Finding]:
    """Findings about the machine, the libraries and, if given, a bundle. Never raises."""
    findings = [
        Finding("machine", True, f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}"),
        Finding("threads", True, f"{available_threads()} usable of {os.cpu_count()} (affinity and cgroup quota)"),
    ]
    for name in LIBRARIES:
        found = _version(name)
        findings.append(Finding(name, found is not None or name in AUTO, found or "not installed"))
    missing = [name for name in OFFLINE if _version(name) is None]
    findings.append(
        Finding("export", True, f"not installed: {', '.join(missing)}; pip install 'stepforge[export]'" if missing
                else "installed, `stepforge export` and `verify` can run")
    )  # fmt: skip
    try:
        findings.append(Finding("backend", True, f"auto is {choose(fake_bundle())}"))
    except StepforgeError as error:
        findings.append(Finding("backend", False, str(error)))
    findings += [*_openvino(), _cache()]
    if _version("torch") and _version("onnx"):
        runs, reason = torch_on_gpu()
        text = (
            f"runs on {reason}; auto takes it"
            if runs
            else f"can run on the CPU, slowly; auto does not take it: {reason}"
        )
        findings.append(Finding("torch backend", True, text))
    findings += [Finding(found.subject, not found.is_broken, found.text) for found in diagnose()]
    if bundle is not None:
        findings += _bundle(bundle)
    return findings


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _openvino() -> list[Finding]:
    if importlib.util.find_spec("openvino") is None:
        return []
    from stepforge.runtime.backends.openvino import core

    processor = core().get_property("CPU", "FULL_DEVICE_NAME")
    abilities = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precision = "bf16" if "BF16" in abilities else "fp32"
    return [Finding("processor", True, f"{processor}; openvino computes in {precision} by default")]


def _cache() -> Finding:
    """Not having one costs time at each start, nothing else."""
    folder = root()
    if folder is None:
        return Finding("compile cache", True, "none: STEPFORGE_CACHE is empty, or this user has no home folder")
    try:
        above = next(place for place in (folder, *folder.parents) if place.exists())
        writable = above.is_dir() and os.access(above, os.W_OK)
    except OSError:
        writable = False
    kept = "compiled networks are kept there" if writable else "cannot be written, networks are compiled at each start"
    return Finding("compile cache", True, f"{folder}: {kept} (STEPFORGE_CACHE moves it)")


def _bundle(path: Path) -> list[Finding]:
    try:
        bundle = read(path)
    except (StepforgeError, OSError) as error:
        return [Finding("bundle", False, str(error))]
    findings = [Finding("bundle", True, f"{bundle.card.name}, {len(bundle.files)} files, every hash matches")]
    if kept := [len(list(plans(bundle, component))) for component in bundle.components]:
        findings.append(
            Finding("plans", True, f"{sum(kept)} of TensorRT for {sum(map(bool, kept))} networks; see stepforge info")
        )
    for name in runnable():
        if importlib.util.find_spec(name) is None:
            continue
        try:
            backend = open_backend(name, bundle)
            for component in bundle.components:
                backend.open(component)
            findings.append(Finding(name, True, f"loads all {len(bundle.components)} networks in {backend.precision}"))
        except StepforgeError as error:
            findings.append(Finding(name, False, str(error)))
    return findings
