"""What integers gain a processor at best: `python benchmarks/bench_int8_layers.py`, some ten seconds on one core.

Three equal layers of SD1.5's sizes, a SiLU before each, in fp32, bf16 where the processor has it, and INT8, by OpenVINO and
ONNX Runtime: no network of such layers gains more. Outputs are compared with fp32's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
from bench_int8 import FLAGS, has
from harness import interleaved, machine

from stepforge.export.int8.rewrite import Range, write_quantized
from stepforge.export.parity.measures import relative_error
from stepforge.runtime.backends import available_threads

SHAPES = {  # activation, weight
    "conv 3x3, 640 channels, 16x16": ((2, 640, 16, 16), (640, 640, 3, 3)),
    "conv 3x3, 320 channels, 32x32": ((2, 320, 32, 32), (320, 320, 3, 3)),
    "linear 1280 to 1280, 256 tokens": ((2, 256, 1280), (1280, 1280)),
    "linear 320 to 320, 1024 tokens": ((2, 1024, 320), (320, 320)),
}
DEPTH = 3


def write(path: Path, given: tuple[int, ...], shape: tuple[int, ...]) -> None:
    random = np.random.RandomState(0)
    nodes, weights, last = [], [], "x"
    for k in range(DEPTH):
        fan_in = np.prod(shape[1:] if len(shape) == 4 else shape[:1])
        weight = (random.standard_normal(shape) * 2 / np.sqrt(fan_in)).astype(np.float32)
        weights.append(onnx.numpy_helper.from_array(weight, f"layer{k}.weight"))
        nodes.append(onnx.helper.make_node("Sigmoid", [last], [f"s{k}"]))
        nodes.append(onnx.helper.make_node("Mul", [last, f"s{k}"], [f"a{k}"]))
        kind, more = ("Conv", {"pads": [1, 1, 1, 1]}) if len(shape) == 4 else ("MatMul", {})
        nodes.append(onnx.helper.make_node(kind, [f"a{k}", f"layer{k}.weight"], [f"y{k}"], **more))
        last = f"y{k}"
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, given) for name in ("x", last)]
    graph = onnx.helper.make_graph(nodes, "layers", ends[:1], ends[1:], weights)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)


def runners(plain: Path, quantised: Path, x: np.ndarray, threads: int) -> dict[str, Callable[[], np.ndarray]]:
    found: dict[str, Callable[[], np.ndarray]] = {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    core = openvino.Core()
    hints = {"fp32": "f32", **({"bf16": "bf16"} if has("avx512_bf16") else {})}
    for precision, hint, path in (*((p, h, plain) for p, h in hints.items()), ("int8", "f32", quantised)):
        config = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads}
        request = core.compile_model(path, "CPU", config).create_infer_request()
        found[f"openvino {precision}"] = lambda request=request: request.infer({"x": x}, share_inputs=True)[0]
        if precision != "bf16":
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            found[f"onnxruntime {precision}"] = lambda session=session: session.run(None, {"x": x})[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=available_threads())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        plain, quantised = Path(folder) / "plain.onnx", Path(folder) / "int8.onnx"
        for name, (given, shape) in SHAPES.items():
            write(plain, given, shape)
            x = np.random.RandomState(1).standard_normal(given).astype(np.float32)
            ranges = {f"layer{k}": Range(-0.2785, 6.0) for k in range(DEPTH)}
            write_quantized(plain, quantised, ranges, ranges)
            functions = runners(plain, quantised, x, args.threads)
            truth = functions["openvino fp32"]()
            errors = {
                runner: float(f"{relative_error(function(), truth):.2g}") for runner, function in functions.items()
            }
            times = interleaved(functions, runs=args.runs)
            report[name] = {
                runner: {
                    "ms, median": round(1e3 * t.median, 3),
                    "lowest": round(1e3 * t.low, 3),
                    "error": errors[runner],
                }
                for runner, t in times.items()
            }
            for engine in ("openvino", "onnxruntime"):
                ratio = times[f"{engine} fp32"].low / times[f"{engine} int8"].low
                report[name][f"{engine}, int8 faster than fp32, lowest to lowest"] = round(ratio, 2)
    report |= {"processor has": [flag for flag in FLAGS if has(flag)], "threads": args.threads, "machine": machine()}
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
