"""LoRA's first product as a TensorRT plugin: where it stands in a graph, and what NVIDIA's own layer makes of it.

TensorRT cannot be run here. Its Python layer for plugins is a wheel of plain Python, which runs on the bindings of TensorRT
for RTX (`make test-engines`); what it hands on to the library, kernel, launch and arguments, is looked at there.
"""

import importlib
import sys
from enum import IntEnum
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from stepforge.export.engines import build as building
from stepforge.export.engines import plugin
from stepforge.export.engines.build import Order, build_plans
from stepforge.export.engines.lower import lowered
from stepforge.kernels import bounds
from stepforge.runtime.backends.tensorrt.library import LIBRARIES, BuildOptions, Library
from stepforge.runtime.backends.tensorrt.profiles import Use, profiles
from stepforge.runtime.bundle import UNET, read
from stepforge.runtime.errors import BackendError

ROWS, SIDE = 3, 16


def graph_and_banks(bundle):
    entry = bundle.components[UNET]
    return bundle.file(entry.graph), [t.name for t in entry.inputs if ".lora_" in t.name]


def test_every_linear_layer_with_adapters_has_a_site(tiny_sd1_banks, tmp_path):
    """What the plugin takes the place of is what it computes: each product against the kernel's reference."""
    bundle = read(tiny_sd1_banks)
    graph, banks = graph_and_banks(bundle)
    found = plugin.sites(graph, banks)
    shared = bundle.components[UNET].bank.shared
    kinds = {module.path: module.kind for module in bundle.components[UNET].modules}
    assert {site.bank for site in found} == {f"{path}.lora_A" for path in shared if kinds[path] == "linear"}
    for precision in ("fp16", "bf16"):
        (folder := tmp_path / precision).mkdir()
        low = plugin.sites(lowered(graph, precision, banks, folder), banks)
        assert [(site.product, site.bank) for site in low] == [(site.product, site.bank) for site in found]
    model = onnx.load(graph)
    for name in {name for site in found for name in (site.product, site.x)}:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    random = np.random.RandomState(0)
    given = {
        t.name: random.standard_normal(
            [{"rows": ROWS, "tokens": 77}.get(s, SIDE) if isinstance(s, str) else s for s in t.shape]
        ).astype(np.float32)
        for t in bundle.components[UNET].inputs
    }
    given["timestep"], given["adapter"] = np.array([1, 500, 999], np.float32), np.array([2, 0, 1], np.int64)
    names = [value.name for value in session.get_outputs()]
    values = dict(zip(names, map(torch.from_numpy, session.run(names, given)), strict=True))
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    for site in found:
        strength = tensors["adapter_strength"].flatten()
        exact, bound = bounds.bank_shrink(values[site.x], tensors[site.bank], tensors["adapter"], strength)
        assert ((values[site.product].double() - exact).abs() <= bound).all(), site


class Pretended(Library):
    """tensorrt 10 without its package."""

    def __init__(self, name):
        self.name, self.traits, self.version, self.is_lean = name, LIBRARIES[name], "10.8.0", False
        self.module = SimpleNamespace()


@pytest.mark.parametrize(
    ("name", "precision", "options", "why"),
    [
        ("tensorrt-rtx", "bf16", {"targets": ("sm_89",)}, "tensorrt-rtx has no plugins; build without --lora-plugin"),
        ("tensorrt", "bf16", {"version_compatible": True}, "leave --version-compatible out"),
        ("tensorrt", "bf16", {}, "tensorrt 10.8.0 has no plugins that are compiled ahead of time; update it"),
        ("tensorrt", "fp32", {}, "--lora-plugin multiplies in fp16 or bf16"),
    ],
)
def test_where_it_cannot_be_had(tiny_sd1_banks, monkeypatch, name, precision, options, why):
    bundle = read(tiny_sd1_banks)
    monkeypatch.setattr(building, "Library", Pretended)
    if precision == "fp32":
        monkeypatch.setattr(Pretended, "plugins", lambda self: None)
    order = Order(name, precision, Use.parse(bundle, ("1..2",), None), BuildOptions(lora_plugin=True, **options))
    with pytest.raises(BackendError, match=why) as caught:
        next(build_plans(bundle, order))
    assert "\n" not in str(caught.value)


# from here on: NVIDIA's layer


class Expression:
    """A dimension as TensorRT gives it to plugins: a value that only constants tell."""

    def __init__(self, value, known):
        self.value, self.known = value, known

    def is_constant(self):
        return self.known

    def get_constant_value(self):
        assert self.known
        return self.value


class Builder:
    """Evaluates expressions for one set of shapes."""

    def constant(self, value):
        return Expression(value, True)

    def operation(self, kind, first, second):
        assert kind.name == "CEIL_DIV", kind
        return Expression(-(-first.value // second.value), first.known and second.known)


class Registry:
    def __init__(self):
        self.creators = {}

    def register_creator(self, creator, namespace):
        self.creators[namespace, creator.name] = creator

    def get_creator(self, name, version, namespace):
        return next(iter(self.creators.values()))


@pytest.fixture
def nvidia(monkeypatch):
    """`tensorrt.plugin` of the wheel tensorrt-cu13-bindings over the bindings of TensorRT for RTX; in plain Python what these
    lack."""
    wheel = find_spec("tensorrt_bindings")
    if wheel is None or find_spec("tensorrt_rtx") is None:
        pytest.skip("needs tensorrt-rtx and tensorrt-cu13-bindings: make test-engines")
    rtx = importlib.import_module("tensorrt_rtx")
    plain = {name: type(name, (), {}) for name in ("IPluginV3QuickAOTBuild", "ISymExpr", "IPluginV3", "IPluginV3QuickCore",
             "IPluginV3QuickBuild", "IPluginV3QuickRuntime", "IPluginCreatorV3Quick")}  # fmt: skip
    registry = Registry()
    own = {
        **plain, "IDimensionExpr": Expression, "get_plugin_registry": lambda: registry,
        "QuickPluginCreationRequest": IntEnum("Request", "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT"),
        "PluginFieldCollection": list, "DimsExprs": lambda count: [None] * count, "Logger": rtx.Logger,
    }  # fmt: skip
    base = ModuleType("tensorrt")
    base.__dict__.update({**vars(rtx), **own, "__name__": "tensorrt", "__path__": [str(Path(wheel.origin).parent)]})
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorrt", base)
    plugins = importlib.import_module("tensorrt.plugin")
    yield base, plugins
    for name in [name for name in sys.modules if name.startswith("tensorrt.")]:
        del sys.modules[name]


class Network:
    """A network of TensorRT for RTX that takes plugins: asks each as TensorRT does while it builds, keeps what it would launch,
    and computes it by layers of its own."""

    def __init__(self, network, module, sizes):
        self.network, self.module, self.sizes, self.launches = network, module, sizes, []

    def __getattr__(self, name):
        return getattr(self.network, name)

    def add_plugin_v3(self, inputs, shape_inputs, made):
        module, builder = self.module, Builder()
        kinds = [t.dtype for t in inputs]
        known = [tuple(t.shape) for t in inputs]
        real = [tuple(self.sizes[at] if size == -1 else size for at, size in enumerate(shape)) for shape in known]
        (out,) = made.get_output_data_types(kinds, [len(shape) for shape in known])
        dims = [[Expression(r, k != -1) for k, r in zip(*pair, strict=True)] for pair in zip(known, real, strict=True)]
        ((*shape,),) = made.get_output_shapes(dims, [], builder)
        described = []
        for kind, sizes in zip((*kinds, out), (*known, [d.value for d in shape]), strict=True):
            desc = module.DynamicPluginTensorDesc()
            desc.desc.type, desc.desc.dims, desc.desc.format = kind, module.Dims(sizes), module.TensorFormat.LINEAR
            described.append(desc)
        offered = made.get_supported_format_combinations(described, len(inputs))
        assert [one.type for one in offered] == [*kinds, out]
        made.configure_plugin(described[: len(inputs)], described[len(inputs) :])
        assert made.get_valid_tactics() == []
        made.set_tactic(0)
        launch, numbers = SimpleNamespace(), Numbers()
        made.get_launch_params(dims, described, len(inputs), launch, numbers, builder)
        name, code = made.get_kernel(
            [d.desc for d in described[: len(inputs)]], [d.desc for d in described[len(inputs) :]]
        )
        values = {key: expression.expr.value for key, expression in vars(launch).items()}
        self.launches.append(
            (real, [d.value for d in shape], values, [n.expr.value for n in numbers.values], name, code.decode())
        )
        x, bank, adapter, strength = inputs
        gathered = self.network.add_gather(bank, adapter, 0).get_output(0)
        none = module.MatrixOperation.NONE
        product = self.network.add_matrix_multiply(x, none, gathered, none).get_output(0)
        scale = self.network.add_cast(strength, x.dtype).get_output(0)
        return self.network.add_elementwise(product, scale, module.ElementWiseOperation.PROD)


class Numbers:
    """IntegerArguments: nbSymExprs, and items."""

    def __init__(self):
        self.values = []

    def __setitem__(self, at, value):
        assert at == len(self.values)
        self.values.append(value)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [89, 90])
def test_nvidias_layer_launches_our_kernel_as_we_do(nvidia, tiny_sd1_banks, tmp_path, arch):
    """Types, shapes, grid, integers and their order, for shapes unknown to the kernel; PTX that ptxas takes; and a network
    with the plugins in it that is built to the end, with every bank among its inputs."""
    from stepforge.kernels.aot import ptx
    from stepforge.kernels.bank import bank_shrink_kernel
    from stepforge.kernels.dispatch.tiles import bank_tile

    module, plugins = nvidia
    bundle = read(tiny_sd1_banks)
    graph, banks = graph_and_banks(bundle)
    low = lowered(graph, "bf16", banks, tmp_path)
    found = plugin.sites(low, banks)
    library = Library("tensorrt-rtx")
    logger = module.Logger(module.Logger.ERROR)
    builder = module.Builder(logger)
    network = library.network(builder)
    assert module.OnnxParser(network, logger).parse_from_file(str(low))
    pretended = Network(network, module, sizes=(ROWS, 77, None))
    plugin.insert(pretended, module, plugins, found, arch)
    assert len(pretended.launches) == len(found)
    assert bank_shrink_kernel.arg_names[:8] == ["x", "bank", "adapter", "strength", "tokens", "K", "R", "s"]
    for given, out, launch, numbers, name, code in pretended.launches:
        (rows, tokens, depth), (_, inner, ranks), *_ = given
        assert (depth, out) == (inner, [rows, tokens, ranks])
        tile = bank_tile(ranks)
        assert numbers == [tokens, depth, ranks]
        assert (launch["grid_x"], launch["grid_y"], launch["grid_z"]) == (
            -(-tokens // tile.block_m), rows, -(-ranks // tile.block_n),
        )  # fmt: skip
        assert (launch["block_x"], launch["block_y"], launch["block_z"]) == (32 * tile.warps, 1, 1)
        assert 0 < launch["shared_mem"] <= plugin.MOST_SHARED
        assert f".entry {name}(" in code
        assert f".reqntid {launch['block_x']}" in code
        assert ptx.parameters(code) == ["u64"] * 4 + ["u32"] * 3 + ["u64"]
        assert ptx.assemble(code, arch)
    config = builder.create_builder_config()
    library.configure(config, BuildOptions(targets=("sm_89",)))
    for shapes in profiles(bundle, UNET, Use.parse(bundle, ("1..4",), "64")):
        profile = builder.create_optimization_profile()
        for name, limits in shapes.items():
            profile.set_shape(name, limits.low, limits.best, limits.high)
        config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None, (
        "without the products that the plugin computes"
    )
    assert set(banks) <= {network.get_input(at).name for at in range(network.num_inputs)}
