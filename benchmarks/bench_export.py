"""Export of a model of real size with random weights: seconds, peak memory, and whether the engines open and run the result.

    python benchmarks/bench_export.py                       SD 1.5: 4.3 GB of weights; writes 13 GB under --work
    python benchmarks/bench_export.py --family sdxl --precision fp16      weights in fp16, as SDXL is held: writes 14 GB
    python benchmarks/bench_export.py --opsets              why opset 20: attention by opset and engine, 3-level UNet

Peak memory is that of the exporter and its children, sampled: resident, and of that anonymous, which the system cannot let go
of. Each engine opens every component and makes one step in a process of its own, or says that the memory here is too little.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import machine

os.environ["HF_HUB_OFFLINE"] = "1"
GRAPHS = ("opset 20", "opset 20 derived", "opset 23")
ENGINES = {"onnxruntime": GRAPHS, "openvino": ("opset 20", "opset 23")}
CONTEXT = 256


def child(*arguments: object) -> dict[str, Any]:
    """Run one of this file's tasks in a fresh process; its last line is JSON. Adds the peaks of its tree of processes."""
    command = [sys.executable, __file__, "--task", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with peaks_of(process) as peaks:
        out = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))} ended with {process.returncode}")
    answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    return {**answer, "resident": peaks[0], "anonymous": peaks[1]}


@contextmanager
def peaks_of(process: subprocess.Popen[Any]) -> Iterator[list[int]]:
    """Most of what `held` gives while a process runs, 10 samples a second; the block waits for its end."""
    peaks = [0, 0]

    def sample() -> None:
        while process.poll() is None:
            peaks[:] = map(max, peaks, held(process.pid))
            time.sleep(0.1)

    sampler = threading.Thread(target=sample)
    sampler.start()
    yield peaks
    sampler.join()


def held(root: int) -> tuple[int, int]:
    """Resident and anonymous bytes of a process and its children."""
    parents, sizes = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            rows = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        except OSError:  # it has ended
            continue
        if "VmRSS" in rows:
            parents[int(folder.name)] = int(rows["PPid"])
            sizes[int(folder.name)] = [int(rows[name].split()[0]) << 10 for name in ("VmRSS", "RssAnon")]
    tree = {root}
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    mine = [sizes[pid] for pid in tree if pid in sizes]
    return sum(size[0] for size in mine), sum(size[1] for size in mine)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def make(model: str, family: str, precision: str) -> dict[str, Any]:
    import random_models
    import torch

    random_models.save(Path(model), family, dtype=torch.float16 if precision == "fp16" else torch.float32)
    return {}


def export(model: str, out: str, precision: str) -> dict[str, Any]:
    from stepforge.export.build import export_bundle

    before, started, stages = peak(), time.perf_counter(), []
    export_bundle(
        model, out, precision=precision, overwrite=True,
        progress=lambda stage, done, total: stages.append((stage, round(time.perf_counter() - started, 1), peak())),
    )  # fmt: skip
    return {
        "seconds": time.perf_counter() - started, "processor": processor_seconds(), "imports": before, "peak": peak(),
        "stages": stages,
    }  # fmt: skip


def load(engine: str, bundle: str) -> dict[str, Any]:
    """Open each component and run it once on small latents."""
    import numpy as np

    from stepforge import open_bundle
    from stepforge.runtime.backends import open_backend

    opened = open_bundle(bundle, check=False)
    backend = open_backend(engine, opened, precision="fp32")
    seconds = {}
    axes = {"rows": 1, "height": 16, "width": 16, "tokens": 77}
    for name, component in opened.components.items():
        started = time.perf_counter()
        graph = backend.open(name)
        inputs = {
            tensor.name: np.zeros([axes.get(size, size) for size in tensor.shape], tensor.dtype)
            for tensor in component.inputs
        }
        outputs = graph(inputs)
        assert all(np.isfinite(value).all() for value in outputs.values()), f"{name} made NaN"
        seconds[str(name)] = round(time.perf_counter() - started, 1)
    return {"seconds": seconds, "peak": peak()}


def make_opsets(folder: str) -> dict[str, Any]:
    import torch
    from diffusers import UNet2DConditionModel

    from stepforge.export.graph import modules, trace

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32, block_out_channels=(128, 256, 512), layers_per_block=2, cross_attention_dim=CONTEXT,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    for opset in (20, 23):
        trace.save(modules.denoiser(unet.eval().requires_grad_(False)), Path(folder) / f"opset {opset}", opset)
    return {}


def attention(engine: str, folder: str, graph: str, latent: str) -> dict[str, Any]:
    """Peak memory and processor seconds of one pass of 2 rows, and the operators that are left."""
    import numpy as np

    random, size = np.random.default_rng(0), int(latent)
    inputs = {
        "sample": random.standard_normal((2, 4, size, size), dtype=np.float32),
        "timestep": np.full(2, 500, np.float32),
        "encoder_hidden_states": random.standard_normal((2, 77, CONTEXT), dtype=np.float32),
    }
    name = "model.onnxruntime.onnx" if graph.endswith("derived") else "model.onnx"
    path = Path(folder) / graph.removesuffix(" derived") / name
    if engine == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        options.enable_mem_pattern = False
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        left: Counter[str] = Counter()
        run = lambda: session.run(None, inputs)  # noqa: E731
    else:
        import openvino

        config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 2, "NUM_STREAMS": 1}
        compiled = openvino.Core().compile_model(path, "CPU", config)
        left = Counter(op.get_rt_info()["layerType"].astype(str) for op in compiled.get_runtime_model().get_ops())
        run = lambda: compiled(inputs)  # noqa: E731
    run()
    started = processor_seconds()
    for _ in range(3):
        run()
    kept = {name: left[name] for name in ("Subgraph", "ScaledDotProductAttention", "Softmax") if left[name]}
    return {"processor": (processor_seconds() - started) / 3, "peak": peak(), "operators": kept}


def compare_opsets() -> None:
    with tempfile.TemporaryDirectory(prefix="stepforge-opsets-") as folder:
        child("make_opsets", folder)
        print("| engine | graph | latents | processor s | peak MB | operators |\n|---|---|---|---|---|---|")
        for engine, graphs in ENGINES.items():
            for graph in graphs:
                for latent in (32, 64):
                    found = child("attention", engine, folder, graph, latent)
                    memory, operators = found["peak"] >> 20, found["operators"] or ""
                    print(f"| {engine} | {graph} | {latent} | {found['processor']:.2f} | {memory} | {operators} |")


def measure(work: Path, family: str, precision: str) -> None:
    from stepforge.export.memory import available

    # SDXL is held in fp16: its weights in fp32 are 14 GB
    stored = "fp16" if (family, precision) == ("sdxl", "fp16") else "fp32"
    model, bundle = work / f"{family}-{stored}", work / f"{family}-bundle-{precision}"
    if not (model / "model_index.json").is_file():
        child("make", model, family, stored)
    sizes = {path.parent.name: path.stat().st_size for path in model.rglob("*.safetensors")}
    unet, whole = (size / (2 if precision != stored else 1) for size in (sizes["unet"], sum(sizes.values())))
    found = child("export", model, bundle, precision)
    for stage, seconds, memory in found["stages"]:
        print(f"  {seconds:6.1f} s  peak {memory / 1e9:5.2f} GB before {stage}")
    print(f"exported {family} {precision} in {found['seconds']:.0f} s ({found['processor']:.0f} s of processor time)")
    print(
        f"peak {found['resident'] / 1e9:.2f} GB resident, {found['anonymous'] / 1e9:.2f} GB of it anonymous "
        f"({found['imports'] / 1e9:.2f} GB before the export began)"
    )
    print(f"     {found['resident'] / unet:.2f} of the UNet's weights in {precision} ({unet / 1e9:.2f} GB)")
    print(f"     {found['resident'] / whole:.2f} of the model's weights in {precision} ({whole / 1e9:.2f} GB)")
    written = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    print(f"bundle {written / 1e9:.2f} GB")
    for engine in ENGINES:
        needed, free = 1.5 * unet * (1 + (precision == "fp16")), available()  # engines widen fp16 to fp32 on a CPU
        if free is not None and free < needed:
            print(f"{engine} was not run: it may take {needed / 1e9:.0f} GB, {free / 1e9:.1f} GB are available")
            continue
        loaded = child("load", engine, bundle)
        print(
            f"{engine} loads and runs {loaded['seconds']} s, peak {loaded['resident'] / 1e9:.2f} GB resident, "
            f"{loaded['anonymous'] / 1e9:.2f} GB of it anonymous"
        )


def main() -> None:
    if sys.argv[1:2] == ["--task"]:
        tasks = {task.__name__: task for task in (make, export, load, make_opsets, attention)}
        print(json.dumps(tasks[sys.argv[2]](*sys.argv[3:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("sd1", "sd2", "sdxl"), default="sd1")
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32")
    parser.add_argument("--opsets", action="store_true", help="compare opsets and engines on a small UNet instead")
    parser.add_argument("--work", type=Path, help="where the model and bundle are kept; default: a temporary folder")
    options = parser.parse_args()
    print(machine())
    if options.opsets:
        compare_opsets()
        return
    work = options.work or Path(tempfile.mkdtemp(prefix="stepforge-export-"))
    try:
        measure(work, options.family, options.precision)
    finally:
        if options.work is None:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
