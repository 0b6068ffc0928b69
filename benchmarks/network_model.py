"""Bytes and FLOPs of a network's program, operator by operator, and the milliseconds that they take by a roofline.

The program is the one that CUDA runs, passes and all, on PyTorch's meta device: shapes without values, so a network of 860
million weights takes no memory. Its graph may lack its weights: a file of holes stands for them. Launches are counted by
`stepforge.runtime.backends.torch.launches`; rates are those of `stepforge.kernels.dispatch.cost`, each with its file.
"""

from __future__ import annotations

import lzma
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import torch

from stepforge.kernels.dispatch.cost import Gpu, roofline
from stepforge.runtime.backends.torch import backend, launches
from stepforge.runtime.backends.torch.program import Node, Program, read
from stepforge.runtime.bundle import UNET, VAE_DECODER, Component, Tensor

SHAPES = Path(__file__).with_name("shapes")  # graphs without weights, by shapes.py
VIEWS = "views"  # should cost nothing; on a GPU the measurement tells whether one copies
WHAT = "roofline with an H100's shares of the peaks, see stepforge/kernels/dispatch/cost.py"
LATENT = {768: 64, 2048: 128}  # width of the prompt -> side of the latents at the model's own size: SD1.5, SDXL
TOKENS = 77
ADAPTERS = 2  # in a batch
PRODUCTS = ("Linear", "Pointwise", "Accumulate", "Gemm")


@dataclass(frozen=True, slots=True)
class Work:
    """One operator: its launches, floating-point operations, and elements read and written."""

    kind: str
    launches: int
    flops: float
    elements: float

    def seconds(self, gpu: Gpu) -> float:
        return roofline(gpu, self.flops, self.elements) + self.launches * gpu.launch


def stated(value: onnx.ValueInfoProto) -> Tensor:
    """An input or output as a bundle's manifest states it."""
    return Tensor(
        value.name, "float32", tuple(axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim)
    )


class OneGraph:
    """What a backend asks of a bundle, for the graph of a denoiser or a VAE's decoder alone."""

    def __init__(self, graph: Path) -> None:
        self.graph = graph
        self.card = SimpleNamespace(family="")
        self.files = {file.name: (file.stat().st_size, "") for file in graph.parent.iterdir()}
        own = onnx.load(str(graph), load_external_data=False).graph
        weights = {tensor.name for tensor in own.initializer}
        inputs = tuple(stated(value) for value in own.input if value.name not in weights)
        self.key = VAE_DECODER if any(tensor.name == "latents" for tensor in inputs) else UNET
        self.components = {self.key: Component("", inputs, tuple(stated(value) for value in own.output))}

    def file(self, relative: str) -> Path:
        return self.graph

    def model(self, stage: str) -> SimpleNamespace:
        return self.card


@contextmanager
def with_holes(graph: Path) -> Iterator[Path]:
    """A graph whose weights are there: its own, or a copy beside a file of holes. Also of graphs in xz."""
    raw = lzma.decompress(graph.read_bytes()) if graph.suffix == ".xz" else graph.read_bytes()
    places = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in onnx.load_from_string(raw).graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    if graph.suffix != ".xz" and all(graph.with_name(place["location"]).exists() for place in places):
        yield graph
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model.onnx"
        copy.write_bytes(raw)
        for name in {place["location"] for place in places}:
            ends = [int(p.get("offset", 0)) + int(p["length"]) for p in places if p["location"] == name]
            with copy.with_name(name).open("wb") as file:
                file.truncate(max(ends))
        yield copy


def shapes_only(path: Path) -> Program:
    """A program whose weights are shapes."""
    program = read(path)
    for name, value in program.constants.items():
        if isinstance(value, torch.Tensor) and value.numel() >= backend.SHARED_FROM:
            program.constants[name] = value.to("meta")
    return program


def cuda_network(graph: Path, precision: str = "fp16", *, residuals: bool = False) -> Any:
    """The network as the torch backend prepares it for CUDA, on the meta device; as calls with adapters run it, where it takes
    any, that keep nothing for later steps. residuals: as those with a ControlNet do."""
    own, bundle = backend.Torch.__new__(backend.Torch), OneGraph(graph)
    own._bundle, own._device, own.precision = bundle, torch.device("meta"), precision
    own._weights, own._banks, own._wide, own._buffers, own._pool = {}, {}, {}, {}, None
    shapes = read(graph).shapes
    banks = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if ".lora_" in name}
    backend.read, real = shapes_only, backend.read
    try:
        outputs = ("prediction",) if bundle.key == UNET else None
        return own._open(bundle.key, banks, with_lora=bool(banks), residuals=residuals, outputs=outputs)
    finally:
        backend.read = real


def given(program: Program, rows: int, side: int = 0, device: Any = "meta") -> dict[str, Any]:
    """Inputs of a call: latents [rows, C, side, side]; side 0: the model's own. ADAPTERS adapters, where it takes any."""
    if "latents" in program.inputs:
        side = side or LATENT[768]
        return {"latents": torch.zeros(rows, program.shapes["latents"][1], side, side, device=device)}
    width = program.shapes["encoder_hidden_states"][2]
    side = side or LATENT.get(width, 32)
    sizes: dict[str, tuple[int, ...]] = {"timestep": (rows,), "encoder_hidden_states": (rows, TOKENS, width)}
    ranks = [shape[-1] for name, shape in program.shapes.items() if name.endswith(".lora_B")]
    if ranks:
        sizes |= {"adapter_columns": (rows, ADAPTERS * min(ranks)), "adapter_strength": (rows, 1, 1)}
    for name in program.inputs:
        shape = program.shapes.get(name, ())
        if name == "sample":
            sizes[name] = (rows, shape[1], side, side)
        elif name.startswith("residual_"):
            sizes[name] = (1, shape[1], 1, 1)
        elif name in ("text_embeds", "time_ids"):
            sizes[name] = (rows, shape[1])
    return {name: torch.zeros(size, device=device) for name, size in sizes.items()}


def works(network: Any, inputs: Mapping[str, Any]) -> list[Work]:
    """The operators of a call that launch something."""
    runner, program = network._runner, network.program
    hosts = launches.on_host(program)
    shapes: dict[str, tuple[int, ...]] = {}
    found: list[Work] = []
    for name, value in {**program.constants, **inputs, **network._columns(inputs)}.items():
        if isinstance(value, torch.Tensor):
            shapes[name] = tuple(value.shape)
    steps = list(runner._steps)
    try:
        for index, (node, compute, done) in enumerate(steps):
            runner._steps[index] = (node, _noting(node, compute, shapes), done)
        network(dict(inputs))
    finally:
        runner._steps[:] = steps
    for node in program.nodes:
        if node.op in launches.VIEWS or set(node.outputs) <= hosts:
            continue
        found.append(work(program, node, shapes))
    return found


def _noting(node: Node, compute: Any, shapes: dict[str, tuple[int, ...]]) -> Any:
    def run(*operands: Any) -> Any:
        result = compute(*operands)
        results = (result,) if len(node.outputs) == 1 else result
        for name, value in zip(node.outputs, results, strict=True):
            if isinstance(value, torch.Tensor):
                shapes[name] = tuple(value.shape)
        return result

    return run


def work(program: Program, node: Node, shapes: Mapping[str, tuple[int, ...]]) -> Work:
    read = [shapes[name] for name in dict.fromkeys(node.inputs) if name in shapes]
    out = [shapes[name] for name in node.outputs if name in shapes]
    elements = float(sum(np.prod(shape) for shape in (*read, *out)))
    flops = 0.0
    if node.op in PRODUCTS:
        flops = 2.0 * np.prod(out[0]) * shapes[node.inputs[1]][1]
    elif node.op in ("Widen", "WidenNorm"):
        columns, depth = shapes[node.inputs[1 if node.op == "Widen" else 7]][1:]
        flops = 2.0 * np.prod(out[0]) / (depth + columns) * depth * columns
    elif node.op == "WideConv":
        wide, columns = shapes[node.inputs[1]], shapes[node.inputs[2]][1]
        pixels = np.prod(out[0]) / out[0][1]
        flops = 2.0 * pixels * (np.prod(wide) + columns * out[0][1])
    elif node.op == "Conv":
        flops = 2.0 * np.prod(out[0]) * np.prod(shapes[node.inputs[1]][1:])
    elif node.op == "MatMul":
        flops = 2.0 * np.prod(out[0]) * shapes[node.inputs[0]][-1]
    elif node.op == "Attention":
        flops = 4.0 * np.prod(shapes[node.inputs[0]]) * shapes[node.inputs[1]][-2]
    alone = Program([node], program.inputs, program.outputs, program.constants)
    source = shapes.get(node.inputs[0], ()) if node.inputs else ()
    counted = launches.count(alone, {node.outputs[0]: int(np.prod(source[2:]))} if len(source) == 4 else None)
    kind = next(iter(counted), node.op)
    return Work(kind, sum(counted.values()), flops, elements)


def by_kind(found: list[Work]) -> dict[str, list[Work]]:
    kinds: dict[str, list[Work]] = {}
    for one in found:
        kinds.setdefault(one.kind, []).append(one)
    return dict(sorted(kinds.items(), key=lambda item: -sum(w.flops for w in item[1])))


def table(found: list[Work], gpus: Mapping[str, Gpu], measured: Mapping[str, float] | None = None) -> list[str]:
    """Lines: each kind's launches, GFLOP, MB and predicted milliseconds; measured: milliseconds by kind beside them."""
    head = f"{'kind':22} {'launches':>8} {'GFLOP':>8} {'MB':>8} " + " ".join(f"{name:>8}" for name in gpus)
    lines = [head + (f" {'measured':>9}" if measured is not None else "") + "   ms"]
    views: list[tuple[str, list[Work]]] = [(VIEWS, [])] if measured is not None else []
    for kind, own in [*by_kind(found).items(), *views, ("all", found)]:
        flops, elements = sum(w.flops for w in own), sum(w.elements for w in own)
        cells = [f"{1e3 * sum(w.seconds(gpu) for w in own):8.2f}" for gpu in gpus.values()]
        line = f"{kind:22} {sum(w.launches for w in own):8} {flops / 1e9:8.1f} {2e-6 * elements:8.1f} " + " ".join(
            cells
        )
        if measured is not None:
            time = sum(measured.values()) if kind == "all" else measured.get(kind, 0.0)
            line += f" {time:9.2f}"
        lines.append(line)
    return lines


def drawn(network: Any, device: str) -> Any:
    """The network of shapes with random weights on a device: products of 1/√depth, vectors about 0, in place."""
    for program in (network.program, *([network._once.program] if network._once is not None else [])):
        given = {name: value for name, value in program.constants.items() if isinstance(value, torch.Tensor)}
        program.constants |= numbers(given, device)
    if network.wide is not None:
        network.wide._downs = numbers(network.wide._downs, device)
        for weight in network.wide._weights.values():
            weight.tensor = numbers({"": weight.tensor}, device)[""]
    if device == "cuda":
        backend.channels_last(network.program)
    return network


def numbers(shapes: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Random numbers for what has none, as strided; of matrices 1/√depth in size."""
    generator = torch.Generator(device).manual_seed(0)

    def filled(value: Any) -> Any:
        if value.device.type != "meta":
            return value.to(device)
        scale = value[0].numel() ** -0.5 if value.ndim > 1 else 1.0
        found = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return found.normal_(generator=generator).mul_(scale)

    return {name: filled(value) for name, value in shapes.items()}


def measure(network: Any, inputs: Mapping[str, Any], *, times: int = 3) -> dict[str, float]:
    """Milliseconds of the device by kind, or of the CPU where the network is there: each operator under a name of its own."""
    from torch.profiler import ProfilerActivity, profile, record_function

    runner, program = network._runner, network.program
    on_cuda = next(iter(inputs.values())).device.type == "cuda"
    steps = list(runner._steps)

    hosts = launches.on_host(program)

    def named(node: Node, compute: Any) -> Any:
        counted = launches.count(Program([node], program.inputs, program.outputs, program.constants))
        launches_one = node.op not in launches.VIEWS and not set(node.outputs) <= hosts
        kind = f"kind {next(iter(counted), node.op) if launches_one else VIEWS}"

        def run(*operands: Any) -> Any:
            with record_function(kind):
                return compute(*operands)

        return run

    network(dict(inputs))
    try:
        runner._steps[:] = [(node, named(node, compute), done) for node, compute, done in steps]
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
        with profile(activities=activities) as seen:
            for _ in range(times):
                network(dict(inputs))
            if on_cuda:
                torch.cuda.synchronize()
    finally:
        runner._steps[:] = steps
    events = [event for event in seen.key_averages() if event.key.startswith("kind ")]
    return {
        event.key.removeprefix("kind "): (event.device_time_total if on_cuda else event.cpu_time_total) / times / 1e3
        for event in events
    }


def replayed(network: Any, inputs: Mapping[str, Any]) -> list[float]:
    """Milliseconds of a recorded call on the GPU, as the backend records it: quartiles."""
    from bench_step import milliseconds

    given = {**inputs, **network.once(dict(inputs))}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            network(dict(given))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        network(dict(given))
    return milliseconds(graph.replay)
