"""Seconds and peak memory of an export: of the tree of processes, sampled. What it writes, the other items read."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

from suite.cases import Case, Record
from suite.items import Context
from suite.models import disk_needed, export_command, prepare_control, prepare_model

TITLE = "Export"


def cases(quick: bool, precisions: Sequence[str]) -> list[Case]:
    """The precision is that of the stored weights."""
    found = [Case("export", "demo", f"stepforge {kind}") for kind in ("plain", "full", "merged")]
    found += [Case("export", "sd15", "stepforge plain"), Case("export", "sd15", "torch.onnx of the UNet alone")][
        : 1 if quick else 2
    ]
    if not quick:
        found += [Case("export", "sd15", "stepforge full"), Case("export", "sdxl", "stepforge plain", "fp16")]
    return found


def measure(case: Case, context: Context) -> Record:
    from bench_export import peaks_of

    model = context.model(case.model)
    kind = case.runner.split()[-1]
    prepare_model(model)
    if kind == "full":
        prepare_control(model)
    command = export_command(model, kind)
    if case.runner.startswith("torch"):
        command = [
            sys.executable,
            "-c",
            TORCH_ONNX,
            str(model.folder / "unet"),
            str(context.image.with_suffix(".onnx")),
        ]
    partial = model.bundle(kind)
    partial.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(partial.parent).free < disk_needed(case.model) // 2:
        return Record(case, refused=f"less than {disk_needed(case.model) // 2 >> 30} GiB of disk are free")
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr)
    with peaks_of(process) as peaks:
        process.wait()
    if process.returncode:
        raise SystemExit(f"{case.key} ended with {process.returncode}")
    for made in context.image.parent.glob(f"{context.image.stem}.onnx*"):
        made.unlink()
    unet = sum(path.stat().st_size for path in (model.folder / "unet").glob("*.safetensors"))
    largest = unet * (2 if case.model == "sdxl" and case.precision == "fp32" else 1)
    return Record(
        case, [time.perf_counter() - started], peak=peaks[0], weights=largest,
        notes={"anonymous bytes": peaks[1]},
    )  # fmt: skip


TORCH_ONNX = """
import sys, torch
from diffusers import UNet2DConditionModel
unet = UNet2DConditionModel.from_pretrained(sys.argv[1], local_files_only=True).eval()
given = (torch.zeros(2, 4, 32, 32), torch.zeros(2), torch.zeros(2, 77, unet.config.cross_attention_dim))
torch.onnx.export(unet, given, sys.argv[2], dynamo=True, external_data=True, opset_version=20)
"""
