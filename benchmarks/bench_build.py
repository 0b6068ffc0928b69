"""TensorRT plans: seconds to build, size and peak memory of each network, of a bundle or of a model with SD's exact shapes.

    python benchmarks/bench_build.py --bundle out/emoji.bundle
    python benchmarks/bench_build.py --family sd1 --work DIR       SD1.5-shaped UNet, ControlNet and LoRA banks, random weights
    python benchmarks/bench_build.py --family sdxl --work DIR      needs some 30 GB of memory and of disk

A network whose weights suggest a build above --memory is not built, and said so: a build takes some 4.5 times its weights
(an SD1.5 UNet of 1.7 GB with LoRA banks took 7.4 GB).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import machine

from stepforge.export.engines.build import Order, build_plans
from stepforge.runtime.backends.tensorrt.library import BuildOptions, Library
from stepforge.runtime.backends.tensorrt.profiles import Use
from stepforge.runtime.bundle import Bundle, ComponentId, read
from stepforge.runtime.errors import BackendError

OF_WEIGHTS = 4.5  # peak of a build as a multiple of the weights' bytes in fp16


def prepare(family: str, work: Path) -> Path:
    """A bundle in fp16 with a ControlNet and LoRA banks of rank 16."""
    import random_models
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    model, control, bundle = work / family, work / f"{family}-control", work / f"{family}.bundle"
    if (bundle / "bundle.json").exists():
        return bundle
    if not (model / "model_index.json").exists():
        random_models.save(model, family)
    if not (control / "config.json").exists():
        torch.manual_seed(1)
        ControlNetModel.from_unet(
            UNet2DConditionModel.from_pretrained(model / "unet", local_files_only=True)
        ).save_pretrained(control)
    command = [sys.executable, "-m", "stepforge.runtime", "export", model, "-o", bundle, "--precision", "fp16",
               "--control", f"net={control}", "--lora-slots", "4", "--lora-rank", "16"]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True)
    return bundle


def weights(bundle: Bundle, component: ComponentId) -> int:
    """Bytes of a network's weights in fp16."""
    folder = bundle.components[component].graph.rpartition("/")[0]
    size = sum(n for name, (n, _) in bundle.files.items() if name.startswith(f"{folder}/") and name.endswith(".data"))
    return size // (2 if bundle.precision == "fp32" else 1)


def processor_seconds() -> float:
    """Of the children so far: what a build costs whatever else the machine does."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--family", choices=["sd1", "sdxl"], help="random weights, made in --work")
    parser.add_argument("--work", type=Path, help="kept; default: a temporary folder")
    parser.add_argument("--engine", default="tensorrt-rtx")
    parser.add_argument("--target", nargs="*", default=["sm_89"])
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--rows", nargs="*", default=["1..8"])
    parser.add_argument("--size", help="LOW..HIGH")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB that one build may take")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if (args.bundle is None) == (args.family is None):
        parser.error("give --bundle or --family")
    library = Library(args.engine)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["STEPFORGE_PLANS"] = str(Path(temporary, "plans"))
        bundle = read(args.bundle or prepare(args.family, args.work or Path(temporary)))
        order = Order(args.engine, args.precision, Use.parse(bundle, args.rows, args.size),
                      BuildOptions(targets=tuple(args.target)))  # fmt: skip
        print(machine())
        print(f"{bundle.card.name}, {library.name} {library.version}, {args.precision} for {', '.join(args.target)}, rows "
              f"{' and '.join(args.rows)}, size {args.size or bundle.card.width}")  # fmt: skip
        print(f"{'network':40}{'weights MB':>11}{'s':>8}{'CPU s':>8}{'plan MB':>9}{'peak GB':>9}{'profiles':>10}")
        report: list[dict[str, Any]] = []
        for component in bundle.components:
            line = f"{component!s:40}{weights(bundle, component) / 1e6:11.1f}"
            if (need := OF_WEIGHTS * weights(bundle, component) / (1 << 30)) > args.memory:
                print(f"{line}  not built: it may take {need:.1f} GiB")
                continue
            before = processor_seconds()
            try:
                (built,) = build_plans(bundle, order, [component])
            except BackendError as error:
                print(f"{line}  {error}")
                continue
            card, spent = built.plan.card, round(processor_seconds() - before, 1)
            print(
                f"{line}{card.seconds:8.1f}{spent:8.1f}{card.bytes / 1e6:9.1f}{card.peak_bytes / 1e9:9.2f}"
                f"{len(card.profiles):10}",
                flush=True,
            )
            kept = {
                key: value
                for key, value in asdict(card).items()
                if key not in ("weights", "profiles", "inputs", "outputs")
            }
            report.append({**kept, "weights_bytes": weights(bundle, component), "processor_seconds": spent})
            if args.json:  # after each, which may be the last that memory allows
                args.json.write_text(json.dumps({"machine": machine(), "plans": report}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
