"""`--lora-plugin`: LoRA's first product by our Triton kernel inside a TensorRT engine, as a plugin compiled ahead of time.

    S = strength ⊙ x · A[adapter]        kernels/bank.py; of each linear layer with adapters, in place of Gather, MatMul and Mul

TensorRT takes the kernel as PTX when the engine is built (`tensorrt.plugin.aot_impl`) and launches it itself: to run the engine
needs neither Python, Triton nor this package. It passes input tensors, then integers, then outputs, and nothing else, so
that Triton's own parameters are cut off (`kernels/aot/ptx.py`) and strengths are a tensor. Convolutions keep their products.

The plugin takes the place of a product in the parsed network, so that the parser meets known operators alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from stepforge.runtime.errors import BackendError

NAMESPACE, NAME = "stepforge", "bank_shrink"
MOST_SHARED = 48 << 10  # bytes of shared memory that a kernel has without asking the driver for more
KINDS = {"HALF": "fp16", "BF16": "bf16"}
ADAPTER, STRENGTH = "adapter", "adapter_strength"


@dataclass(frozen=True, slots=True)
class Site:
    """A product that the plugin takes the place of: names of graph values."""

    product: str  # [rows, tokens, R], strength included
    x: str  # [rows, tokens, K]
    bank: str  # input [slots, K, R]


def sites(graph: Path, banks: Collection[str]) -> tuple[Site, ...]:
    """Products of linear layers with adapters in a graph with LoRA banks (export/graph/bank.py)."""
    model = onnx.load(graph, load_external_data=False).graph
    banks, of, scaled = frozenset(banks), {}, set()  # of: a value -> the bank that it is what rows use of
    found = []
    products: dict[str, tuple[str, str]] = {}
    for node in model.node:
        first = node.input[0] if node.input else ""
        if node.op_type == "Gather" and first in banks and node.input[1] == ADAPTER:
            of[node.output[0]] = first
        elif node.op_type == "Cast" and first in of:
            of[node.output[0]] = of[first]
        elif node.op_type == "Cast" and first == STRENGTH:
            scaled.add(node.output[0])
        elif node.op_type == "MatMul" and node.input[1] in of and of[node.input[1]].endswith(".lora_A"):
            products[node.output[0]] = first, of[node.input[1]]
        elif node.op_type == "Mul" and first in products and node.input[1] in {STRENGTH, *scaled}:
            found.append(Site(node.output[0], *products[first]))
    return tuple(found)


def insert(network: Any, module: Any, plugins: Any, chosen: Sequence[Site], arch: int) -> None:
    """Put the plugin in the place of each site's product. plugins: the package's module `plugin`. arch: compute capability
    that the kernel is compiled for, 89.

    Raises BackendError where the network is not what the graph says.
    """
    register(module, plugins, arch)
    make = getattr(getattr(plugins.op, NAMESPACE), NAME)
    layers = [network.get_layer(at) for at in range(network.num_layers)]
    tensors = {t.name: t for t in map(network.get_input, range(network.num_inputs))}
    tensors |= {t.name: t for layer in layers for t in map(layer.get_output, range(layer.num_outputs))}
    readers: dict[str, list[tuple[Any, int]]] = {}
    for layer in layers:
        for at in range(layer.num_inputs):
            if (tensor := layer.get_input(at)) is not None:
                readers.setdefault(tensor.name, []).append((layer, at))
    if lost := {name for site in chosen for name in (site.product, site.x, site.bank)} - tensors.keys():
        raise BackendError(
            f"the parsed network has no tensor {sorted(lost)[0]!r}, which the LoRA plugin takes the place of"
        )
    adapter = network.add_cast(tensors[ADAPTER], module.DataType.INT32).get_output(0)
    for site in chosen:
        x, bank = tensors[site.x], tensors[site.bank]
        if x.dtype != bank.dtype or x.dtype.name not in KINDS or len(x.shape) != 3:
            raise BackendError(f"the LoRA plugin takes no {x.dtype.name} {list(x.shape)} beside {bank.dtype.name}")
        given = make(x, bank, adapter, tensors[STRENGTH])(module.QuickPluginCreationRequest.STRICT_AOT)
        layer = network.add_plugin_v3(*given)
        if layer is None:
            raise BackendError(f"TensorRT takes no plugin in the place of {site.product}")
        layer.name = f"{site.bank}_shrink"
        for reader, at in readers.get(site.product, ()):
            reader.set_input(at, layer.get_output(0))


def register(module: Any, plugins: Any, arch: int) -> None:
    """Register the plugin with TensorRT in this process, once."""
    from stepforge.kernels.aot.main import build
    from stepforge.kernels.aot.programs import bank_program
    from stepforge.kernels.aot.ptx import bare

    def described(x, bank, adapter, strength):  # type: ignore[no-untyped-def]
        return plugins.from_shape_expr((x.shape_expr[0], x.shape_expr[1], bank.shape_expr[2]), x.dtype)

    def compiled(x, bank, adapter, strength, outputs, tactic):  # type: ignore[no-untyped-def]
        rows, tokens = x.shape_expr[0], x.shape_expr[1]
        depth, ranks = (bank.shape_expr[at].constant_value() for at in (1, 2))
        program = bank_program(arch, KINDS[x.dtype.name], ranks, depth)
        kernel, sizes = build(program), program.constants
        if kernel.metadata.shared > MOST_SHARED:
            raise BackendError(f"{program.name} needs {kernel.metadata.shared} bytes of shared memory")
        launch = plugins.KernelLaunchParams(
            grid_x=plugins.cdiv(tokens, sizes["BLOCK_M"]), grid_y=rows, grid_z=-(-ranks // sizes["BLOCK_R"]),
            block_x=32 * program.warps, shared_mem=kernel.metadata.shared,
        )  # fmt: skip
        numbers = plugins.SymIntExprs(3)
        for at, number in enumerate((tokens, depth, ranks)):
            numbers[at] = plugins.SymInt32(number)
        return kernel.metadata.name, bare(kernel.asm["ptx"]), launch, numbers

    # annotations as objects, which is what TensorRT reads
    inputs = dict.fromkeys(("x", "bank", "adapter", "strength"), plugins.TensorDesc)
    described.__annotations__ = {**inputs, "return": plugins.TensorDesc}
    result = tuple[str, str, plugins.KernelLaunchParams, plugins.SymIntExprs]
    compiled.__annotations__ = {**inputs, "outputs": tuple[plugins.TensorDesc], "tactic": int, "return": result}
    plugins.register(f"{NAMESPACE}::{NAME}")(described)
    plugins.aot_impl(f"{NAMESPACE}::{NAME}")(compiled)
