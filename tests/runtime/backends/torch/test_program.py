"""The torch backend: operators against ONNX Runtime, passes that fire and that do not, tiers, precisions, banks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from stepforge.runtime.backends import Banks, open_backend
from stepforge.runtime.backends.torch import lowrank
from stepforge.runtime.backends.torch.banks import DeviceBanks
from stepforge.runtime.backends.torch.lora import LoraPasses, View, drop_lora
from stepforge.runtime.backends.torch.passes import exact as passes
from stepforge.runtime.backends.torch.precision import DTYPES, computed_in, lower
from stepforge.runtime.backends.torch.program import Node, Program, read, run_passes
from stepforge.runtime.backends.torch.run import Runner
from stepforge.runtime.bundle import UNET, VAE_DECODER
from stepforge.runtime.bundle import read as read_bundle
from stepforge.runtime.errors import BackendError

CPU = torch.device("cpu")
X = np.random.RandomState(0).standard_normal((2, 3, 4, 6)).astype(np.float32)


def program_of(nodes, outputs, constants=None, inputs=("x",), shapes=None):
    made = [Node(op, tuple(ins), tuple(outs), attributes) for op, ins, outs, attributes in nodes]
    values = {k: v if isinstance(v, np.ndarray) else torch.as_tensor(v) for k, v in (constants or {}).items()}
    return Program(made, tuple(inputs), tuple(outputs), values, frozenset(inputs), shapes or {})


def ops_of(program):
    return Counter(node.op for node in program.nodes)


def ints(*values):
    return np.array(values, np.int64)


SINGLE = [  # operator, constants, attributes
    ("Slice", (ints(1), ints(2**63 - 1), ints(-1), ints(1)), {}),
    ("Slice", (ints(-2), ints(-1)), {}),
    ("Slice", (ints(-1), ints(-(2**63)), ints(1), ints(-1)), {}),
    ("Gather", (np.array(2),), {"axis": 1}),
    ("Gather", (ints(2, 0),), {"axis": 1}),
    ("Gather", (np.array([[0, 1], [2, 0]]),), {"axis": 1}),
    ("Unsqueeze", (ints(0, -1),), {}),
    ("Reshape", (ints(0, -1, 6),), {}),
    ("Transpose", (), {"perm": [0, 2, 3, 1]}),
    ("ReduceMean", (ints(2, 3),), {"keepdims": 1}),
    ("ArgMax", (), {"axis": -1, "keepdims": 0}),
    ("Softmax", (), {"axis": -1}),
    ("Gelu", (), {}),
    ("Sigmoid", (), {}),
    ("Shape", (), {"start": 1, "end": 3}),
    ("Cast", (), {"to": TensorProto.INT32}),
    ("Resize", ("", np.array([1, 1, 2, 2], np.float32)),
     {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}),
    ("Conv", (np.ones((4, 3, 3, 3), np.float32), np.ones(4, np.float32)), {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    ("Conv", (np.ones((3, 1, 3, 3), np.float32),), {"pads": [0, 1, 2, 1], "group": 3}),
    ("LayerNormalization", (np.ones(6, np.float32), np.ones(6, np.float32)), {"axis": -1}),
    ("InstanceNormalization", (np.full(3, 2, np.float32), np.ones(3, np.float32)), {"epsilon": 1e-5}),
    ("MatMul", (np.arange(12, dtype=np.float32).reshape(6, 2),), {}),
]  # fmt: skip


@pytest.mark.parametrize("case", SINGLE, ids=lambda case: case[0])
def test_an_operator_computes_what_onnx_says(case, tmp_path):
    """ONNX Runtime is the authority; 1e-5 is for sums of 27 products in another order."""
    op, constants, attributes = case
    names = [f"c{i}" if not isinstance(value, str) else "" for i, value in enumerate(constants)]
    out_type = {"Shape": TensorProto.INT64, "ArgMax": TensorProto.INT64, "Cast": TensorProto.INT32}
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *names], ["y"], **attributes)],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)],
        [helper.make_tensor_value_info("y", out_type.get(op, TensorProto.FLOAT), None)],
        [onnx.numpy_helper.from_array(v, n) for n, v in zip(names, constants, strict=True) if n],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "one.onnx")
    expected = onnxruntime.InferenceSession(tmp_path / "one.onnx").run(None, {"x": X})[0]
    program = read(tmp_path / "one.onnx")
    (node,) = program.nodes
    found = Runner(program)._steps[0][1](
        *[{"": None, "x": torch.from_numpy(X), **program.constants}[n] for n in node.inputs]
    )
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5, atol=1e-5)


def test_host_arithmetic_stays_on_the_host():
    """Sizes are NumPy numbers: nothing of it would wait for a device."""
    program = program_of(
        [
            ("Shape", ["x"], ["s"], {"start": 2}),
            ("Gather", ["s", "zero"], ["h"], {}),
            ("Mul", ["h", "two"], ["m"], {}),
            ("Div", ["m", "two"], ["d"], {}),
            ("Unsqueeze", ["d", "at"], ["u"], {}),
            ("Concat", ["u", "rest"], ["to"], {"axis": 0}),
            ("Reshape", ["x", "to"], ["y"], {"allowzero": 1}),
        ],
        ["y"],
        {"zero": np.array(0), "two": np.array(2), "at": ints(0), "rest": ints(-1)},
    )
    assert Runner(program)({"x": torch.from_numpy(X)})["y"].shape == (4, 36)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (("Einsum", ["x"], ["y"], {}), "operator Einsum is unknown to the torch backend; it knows Add"),
        (("Gelu", ["x"], ["y"], {"alpha": 1}), "operator Gelu has the attribute alpha"),
    ],
)
def test_unknown_operators_are_named(node, message):
    with pytest.raises(BackendError, match=message):
        Runner(program_of([node], ["y"]))


def test_weights_from_elsewhere_are_refused(tiny_sd1_bundle, tmp_path):
    model = onnx.load(tiny_sd1_bundle / "vae_decoder/model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../secret" if entry.key == "location" else entry.value
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BackendError, match=r"its weights are in '\.\./secret', not beside it"):
        read(tmp_path / "model.onnx")


# passes: what they make of a graph, that they leave its near relatives alone, and that values stay


def attention(factor=0.5, perm=(0, 2, 1), axis=-1, mask=False):
    nodes = [
        ("Reshape", ["x", "three"], ["k1"], {}),
        ("Transpose", ["k1"], ["k2"], {"perm": perm}),
        ("Reshape", ["k2", "four"], ["kt"], {}),
        ("Mul", ["x", "c"], ["qs"], {}),
        ("Mul", ["kt", "c"], ["ks"], {}),
        ("MatMul", ["qs", "ks"], ["s"], {}),
        *([("Add", ["s", "mask"], ["s2"], {})] if mask else []),
        ("Softmax", ["s2" if mask else "s"], ["p"], {"axis": axis}),
        ("MatMul", ["p", "x"], ["y"], {}),
    ]
    constants = {"three": ints(6, 4, 6), "four": ints(2, 3, 6, 4), "c": [factor], "mask": torch.zeros(4, 4).triu(1) - 1}
    return program_of(nodes, ["y"], constants)


def norm(ones=1.0, silu=True):
    nodes = [
        ("Reshape", ["x", "groups"], ["g"], {}),
        ("InstanceNormalization", ["g", "ones", "zeros"], ["n"], {"epsilon": 1e-5}),
        ("Shape", ["x"], ["s"], {}),
        ("Reshape", ["n", "s"], ["r"], {}),
        ("Mul", ["r", "w"], ["m"], {}),
        ("Add", ["m", "b"], ["y0" if silu else "y"], {}),
        *([("Sigmoid", ["y0"], ["e"], {}), ("Mul", ["y0", "e"], ["y"], {})] if silu else []),
    ]
    constants = {
        "groups": ints(0, 3, -1),
        "ones": torch.full((3,), ones),
        "zeros": torch.zeros(3),
        "w": torch.randn(3, 1, 1),
        "b": torch.randn(3, 1, 1),
    }
    return program_of(nodes, ["y"], constants)


def geglu(swapped=False, axis=-1):
    halves = ["g", "v"] if swapped else ["v", "g"]
    nodes = [
        ("Split", ["x"], halves, {"axis": axis, "num_outputs": 2}),
        ("Gelu", ["g"], ["e"], {"approximate": "none"}),
        ("Mul", ["v", "e"], ["y"], {}),
    ]
    return program_of(nodes, ["y"])


def linear(gemm=False, shared=False):
    first = ("Gemm", ["x2", "w", "b"], ["y"], {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": int(not shared)})
    plain = [("MatMul", ["x", "w"], ["m"], {}), ("Add", ["m", "b"], ["y"], {})]
    nodes = [("Reshape", ["x", "flat"], ["x2"], {}), first] if gemm else plain
    return program_of(nodes, ["y", "m"] if shared and not gemm else ["y"],
                      {"w": torch.randn(6, 6), "b": torch.randn(6), "flat": ints(-1, 6)})  # fmt: skip


CASES = [
    (attention, {}, (passes.fuse_attention,), {"Attention": 1}),
    (attention, {"factor": 6**-0.25}, (passes.fuse_attention,), {"Attention": 1}),
    (attention, {"mask": True}, (passes.fuse_attention,), {"Attention": 1}),
    (norm, {}, (passes.fuse_group_norm, passes.fuse_silu), {"GroupNorm": 1, "Silu": 1}),
    (norm, {}, (passes.fuse_group_norm, passes.fuse_silu, passes.fuse_norm_silu), {"GroupNormSilu": 1}),
    (norm, {"silu": False}, (passes.fuse_group_norm, passes.fuse_norm_silu), {"GroupNormSilu": 1}),
    (geglu, {}, (passes.fuse_geglu,), {"Geglu": 1}),
    (linear, {}, (passes.fuse_linear, passes.add_bias), {"Linear": 1}),
    (linear, {"gemm": True}, (passes.fuse_linear,), {"Reshape": 1, "Linear": 1}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{len(case[2])}-{case[1]}")
def test_a_pass_fires_and_keeps_the_value(case):
    make, options, rewrites, expected = case
    torch.manual_seed(1)
    before = Runner(make(**options))({"x": torch.from_numpy(X)})["y"]
    torch.manual_seed(1)
    program = make(**options)
    for rewrite in rewrites:
        assert rewrite(program)
    assert ops_of(program) == expected
    torch.testing.assert_close(Runner(program)({"x": torch.from_numpy(X)})["y"], before, rtol=1e-5, atol=1e-5)
    assert not any(rewrite(program) for rewrite in rewrites)


NOT = [
    (attention, {"perm": (1, 0, 2)}, passes.fuse_attention),  # not kᵀ
    (attention, {"axis": -2}, passes.fuse_attention),
    (norm, {"ones": 2.0}, passes.fuse_group_norm),  # an instance norm with weights of its own
    (norm, {}, passes.fuse_norm_silu),  # before fuse_group_norm there is nothing to fuse
    (geglu, {"swapped": True}, passes.fuse_geglu),  # gate first
    (geglu, {"axis": 1}, passes.fuse_geglu),
    (geglu, {}, passes.fuse_silu),
    (linear, {}, passes.add_bias),
    (linear, {"gemm": True, "shared": True}, passes.fuse_linear),  # weight [in, out]
    (linear, {}, passes.copy_images),
]


@pytest.mark.parametrize("case", NOT, ids=lambda case: f"{case[2].__name__}-{case[0].__name__}-{case[1]}")
def test_a_pass_leaves_other_patterns_alone(case):
    make, options, rewrite = case
    program = make(**options)
    before = list(program.nodes)
    assert not rewrite(program)
    assert program.nodes == before


def test_a_bias_stays_where_the_bare_product_is_read():
    program = linear(shared=True)
    assert passes.fuse_linear(program)
    assert not passes.add_bias(program)


# LoRA


def lora(parts=2, x="x", rank=4):
    """q, k, ... of one x with their banks, as export/graph/bank.py writes them."""
    nodes = [
        ("Gather", ["A", "adapter"], ["a"], {"axis": 0}),
        ("MatMul", [x, "a"], ["h0"], {}),
        ("Mul", ["h0", "strength"], ["h"], {}),
        ("Split", ["h"], [f"h_{p}" for p in range(parts)], {"axis": -1, "num_outputs": parts}),
    ]
    constants = {}
    for p in range(parts):
        nodes += [
            ("MatMul", ["x", f"w{p}"], [f"m{p}"], {}),
            ("Gather", [f"B{p}", "adapter"], [f"b{p}"], {"axis": 0}),
            ("MatMul", [f"h_{p}", f"b{p}"], [f"t{p}"], {}),
            ("Add", [f"m{p}", f"t{p}"], [f"s{p}"], {}),
            ("Add", [f"s{p}", f"bias{p}"], [f"y{p}"], {}),
        ]
        constants |= {f"w{p}": torch.randn(8, 6), f"bias{p}": torch.randn(6)}
    banks = {"A": (3, 8, rank * parts), **{f"B{p}": (3, rank, 6) for p in range(parts)}}
    inputs = ["x", "z", "adapter", "strength", *banks]
    return program_of(nodes, [f"y{p}" for p in range(parts)], constants, inputs, banks), banks


def test_layers_that_share_a_bank_become_the_kernels_operator():
    torch.manual_seed(2)
    program, banks = lora()
    arrays = {name: np.random.RandomState(3).standard_normal(shape).astype(np.float32) for name, shape in banks.items()}
    rows = {
        "x": torch.randn(3, 5, 8),
        "adapter": torch.tensor([2, 0, 2]),
        "strength": torch.tensor([[[0.5]], [[1]], [[-2]]]),
    }
    expected = Runner(program)({**rows, **{name: torch.from_numpy(a) for name, a in arrays.items()}})
    made = LoraPasses()
    run_passes(program, (passes.fuse_linear, passes.add_bias))
    assert ops_of(program)["Linear"] == 2
    assert made.fuse_linear_lora(program)
    assert ops_of(program) == {"LowrankLinear": 2}
    placed = DeviceBanks(arrays, made.views.values(), (), device=CPU, dtype=torch.float32, shared={}, copied=False)
    found = Runner(program)({**rows, **placed.tensors})
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_what_is_added_can_be_left_out():
    """Inputs on either side, through a cast, and where the sum is an output; what reads one otherwise still does."""
    nodes = [
        ("Cast", ["r1"], ["r1 low"], {"to": 1}), ("Add", ["x", "r0"], ["a"], {}), ("Add", ["r1 low", "a"], ["b"], {}),
        ("Mul", ["b", "r0"], ["y"], {}), ("Add", ["b", "r1 low"], ["z"], {}),
    ]  # fmt: skip
    program = program_of(nodes, ["y", "z"], inputs=["x", "r0", "r1"])
    assert passes.drop_added(program, ["r0", "r1"])
    assert ops_of(program) == {"Mul": 1, "Identity": 1}
    found = Runner(program)({"x": torch.tensor([3.0]), "r0": torch.tensor([2.0])})
    assert {name: value.item() for name, value in found.items()} == {"y": 6.0, "z": 3.0}
    assert not passes.drop_added(program, ["r0"])


def test_lora_terms_can_be_left_out():
    program, banks = lora()
    torch.manual_seed(2)
    x = torch.randn(3, 5, 8)
    assert passes.fuse_linear(program)
    expected = {f"y{p}": x @ program.constants[f"w{p}.T"].T + program.constants[f"bias{p}"] for p in range(2)}
    assert drop_lora(program, banks)
    assert ops_of(program) == {"Linear": 2, "Add": 2}
    torch.testing.assert_close(Runner(program)({"x": x}), expected)
    assert not drop_lora(program, banks)
    program = program_of([("Add", ["x", "B"], ["y"], {})], ["y"], inputs=["x", "B"])
    assert not drop_lora(program, {"B"})  # a plain input
    assert ops_of(program) == {"Add": 1}


@pytest.mark.parametrize(("name", "limit"), [("torch", 1e-5), ("torch-exact", 0.0)])
def test_without_adapters_banks_change_nothing(tiny_sd1_bundle, tiny_sd1_banks, zero_step, name, limit):
    """Not a bit in the exact tier. In the fast one W lies in rows that are longer, so that products may sum in another
    order: 1e-5 is the limit of other sums everywhere here."""
    outputs = []
    for path in (tiny_sd1_bundle, tiny_sd1_banks):
        bundle = read_bundle(path)
        entry = bundle.components[UNET]
        banks = {t.name: np.ones(t.shape, np.float32) for t in entry.inputs if t.name.endswith((".lora_A", ".lora_B"))}
        rows = {"adapter": np.zeros(2, np.int64), "adapter_strength": np.ones((2, 1, 1), np.float32)} if banks else {}
        graph = open_backend(name, bundle, precision="fp32", threads=1).open(UNET, banks)
        outputs.append(np.array(graph({**zero_step, **rows})["prediction"]))
    assert np.linalg.norm(outputs[0] - outputs[1]) <= limit * np.linalg.norm(outputs[0])


@pytest.mark.parametrize("path", ["reference", "addmm"])
def test_both_paths_of_a_low_rank_layer(path, monkeypatch):
    """Rows with slots and strengths of their own, against the formula in fp64; fp32 sums of 8 products are within 1e-5."""
    monkeypatch.setattr(lowrank, "_choice", lambda *args: (0, path))
    torch.manual_seed(6)
    x, w, bias, a, b = (torch.randn(shape) for shape in ((3, 5, 8), (6, 8), (6,), (2, 4, 8), (2, 6, 4)))
    slots, strength = torch.tensor([1, 0, 1]), torch.tensor([0.5, 2.0, -1.0]).reshape(3, 1, 1)
    found = lowrank.linear(x, w, bias, a, b, slots, strength, rank=4)
    x, w, bias, a, b, strength = (value.double() for value in (x, w, bias, a, b, strength))
    expected = x @ w.T + bias + strength * (x @ a[slots].mT @ b[slots].mT)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_lora_of_another_value_or_of_a_high_rank_stays():
    for options in ({"x": "z"}, {"rank": 129, "parts": 1}):
        program, _ = lora(**options)
        run_passes(program, (passes.fuse_linear, passes.add_bias))
        assert not LoraPasses().fuse_linear_lora(program)
        assert LoraPasses(exact=True).fuse_linear_lora(program) == ("x" not in options)  # PEFT takes any rank


@pytest.mark.parametrize("kind", ["down", "up", "conv down", "conv up"])
def test_a_copied_bank_follows_its_slots(kind):
    """What CUDA keeps: padded copies, of which only changed slots are copied again."""
    shape = {"down": (3, 6, 8), "up": (3, 4, 6), "conv down": (3, 4 * 9, 5), "conv up": (3, 6, 4)}[kind]
    arrays = Banks({"A": np.zeros(shape, np.float32)}, np.zeros(3, np.int64))
    view = View("A", kind, *((4, 8) if kind == "down" else (0, 4)), taps=9)
    placed = DeviceBanks(arrays, [view], (), device=CPU, dtype=torch.float32, shared={}, copied=True)
    copy = placed.tensors[view.name]
    ranks = 1 if "down" in kind else 2
    assert copy.shape[ranks] == 16
    arrays["A"][:] = np.random.RandomState(0).standard_normal(shape)
    placed.refresh()  # the first time, all
    assert torch.equal(copy.narrow(ranks, 0, 4), view.of(torch.from_numpy(arrays["A"])))
    assert not copy.narrow(ranks, 4, 12).any()
    before = copy.clone()
    arrays["A"] += 1
    placed.refresh()  # nobody said that a slot changed
    assert torch.equal(copy, before)
    arrays.versions[2] += 1
    placed.refresh()
    assert torch.equal(copy[:2], before[:2])
    assert torch.equal(copy.narrow(ranks, 0, 4)[2], view.of(torch.from_numpy(arrays["A"]))[2])


# precisions and tiers


def test_what_must_stay_fp32_does():
    """bf16 knows no 999: the sine of a timestep is taken in fp32, and so is the scale of the VAE's latents."""
    program = program_of(
        [("Mul", ["t", "f"], ["a"], {}), ("Sin", ["a"], ["s"], {}), ("MatMul", ["s", "w"], ["y"], {}),
         ("Mul", ["x", "c"], ["z"], {}), ("Mul", ["z", "c"], ["z2"], {})],
        ["y", "z2"], {"f": torch.tensor([[0.999, 0.1]]), "w": torch.eye(2), "c": torch.tensor(1.2345)}, ["t", "x"],
    )  # fmt: skip
    lower(program, torch.bfloat16, CPU)
    inputs = {"t": torch.tensor([[999.0]]), "x": torch.tensor([3.1415])}
    found = Runner(program)(inputs)
    expected = (inputs["t"] * program.constants["f"]).sin().to(torch.bfloat16)
    assert torch.equal(found["y"], expected.float())
    low = torch.bfloat16
    scaled = (inputs["x"] * torch.tensor(1.2345)).to(low) * torch.tensor(1.2345).to(low)
    assert torch.equal(found["z2"], scaled.float())


@pytest.fixture(scope="module")
def zero_step():
    """Inputs of a denoiser at timestep 0, whose sines are 0 and 1 whatever the exporter made of the frequencies."""
    random = np.random.RandomState(4)
    return {
        "sample": random.standard_normal((2, 4, 16, 24)).astype(np.float32),
        "timestep": np.zeros(2, np.float32),
        "encoder_hidden_states": random.standard_normal((2, 77, 32)).astype(np.float32),
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_exact_tier_gives_the_bits_of_diffusers(tiny_sd1, tiny_sd1_bundle, zero_step, precision):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    dtype = DTYPES[precision]
    opened = open_backend("torch-exact", read_bundle(tiny_sd1_bundle), precision=precision, threads=1)
    unet = UNet2DConditionModel.from_pretrained(tiny_sd1 / "unet", torch_dtype=dtype).eval()
    vae = AutoencoderKL.from_pretrained(tiny_sd1 / "vae", torch_dtype=dtype).eval()
    sample, timestep, context = (torch.from_numpy(value) for value in zero_step.values())
    with torch.no_grad():
        expected = unet(sample.to(dtype), timestep, context.to(dtype)).sample.float().numpy()
        pixels = vae.decode((sample * (1 / vae.config.scaling_factor)).to(dtype)).sample.float().numpy()
    assert np.array_equal(opened.open(UNET)(zero_step)["prediction"], expected)
    found = opened.open(VAE_DECODER)({"latents": zero_step["sample"]})["pixels"]
    if precision == "fp32":
        assert np.array_equal(found, pixels)
    # in bf16 one of the 49,152 values of the attention's to_k rounded to its neighbour (the order of a sum is the layout's of
    # its input), and pixels were 0.0137 apart at most: two steps of bf16 below 2
    assert np.abs(found - pixels).max() <= 2**-6


def test_what_each_network_computes_in():
    """fp16 is for all but text encoders, and the VAEs whose values it cannot hold."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    for family, exact, precision, encoder, decoder in (
        ("sd1", False, "fp16", fp16, fp16), ("sd2", True, "fp16", fp16, fp16), ("x4", False, "fp16", fp32, bf16),
        ("sdxl", False, "fp16", fp32, bf16), ("sdxl", True, "fp16", fp32, fp32), ("sdxl", False, "bf16", bf16, bf16),
        ("sdxl", False, "fp32", fp32, fp32),
    ):  # fmt: skip
        roles = ("text_encoder", "denoiser", "control_residuals", "vae_encoder", "vae_decoder")
        found = [computed_in(role, family, precision, exact=exact) for role in roles]
        assert found == [fp32, DTYPES[precision], DTYPES[precision], encoder, decoder]


def test_a_decoder_in_bf16_is_within_the_limits_of_fp16(tiny_sdxl_bundle):
    """What SDXL's decoder computes in beside a denoiser in fp16: 1e-2 and 30 dB are what `verify` asks of fp16."""
    latents = {"latents": np.random.RandomState(0).standard_normal((2, 4, 16, 16)).astype(np.float32)}
    truth, found = (
        open_backend("torch", read_bundle(tiny_sdxl_bundle), precision=precision).open(VAE_DECODER)(latents)["pixels"]
        for precision in ("fp32", "bf16")
    )
    assert np.linalg.norm(found - truth) <= 1e-2 * np.linalg.norm(truth)
    assert np.square(found - truth).mean() <= 4 * 10**-3  # 30 dB of a range of 2


def test_fp32_is_fp32_whatever_was_set_before(tiny_sd1_bundle):
    """tf32 is off for the whole process, also where the second backend has another precision."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    before = cudnn.allow_tf32, cuda.matmul.allow_tf32
    cudnn.allow_tf32 = cuda.matmul.allow_tf32 = True
    try:
        for precision in ("fp32", "bf16"):
            open_backend("torch", read_bundle(tiny_sd1_bundle), precision=precision).open(VAE_DECODER)
            assert not cudnn.allow_tf32
            assert not cuda.matmul.allow_tf32
    finally:
        cudnn.allow_tf32, cuda.matmul.allow_tf32 = before


def test_tiers_differ_in_rounding_only(tiny_sd1_bundle, zero_step):
    """bf16 against fp32: rounding once instead of thrice must not be further off than rounding as diffusers does."""
    bundle = read_bundle(tiny_sd1_bundle)
    inputs = {**zero_step, "timestep": np.array([999, 500], np.float32)}
    outputs = {}
    for name, precision in (("torch-exact", "fp32"), ("torch", "fp32"), ("torch-exact", "bf16"), ("torch", "bf16")):
        graph = open_backend(name, bundle, precision=precision, threads=1).open(UNET)
        outputs[name, precision] = np.array(graph(inputs)["prediction"], np.float64)
    truth = outputs["torch-exact", "fp32"]
    error = {key: np.linalg.norm(value - truth) / np.linalg.norm(truth) for key, value in outputs.items()}
    assert error["torch", "fp32"] < 1e-5
    assert error["torch", "bf16"] < 1.1 * error["torch-exact", "bf16"] < 0.03


def test_every_pattern_of_a_whole_network_is_found(tiny_sd1_control_bundle):
    """Nothing of the exporter's attention, norms or banks is left to single operators but the vectors' banks."""
    bundle = read_bundle(tiny_sd1_control_bundle)
    opened = open_backend("torch", bundle, precision="fp32", threads=1)
    for name, entry in bundle.components.items():
        banks = {t.name: np.zeros(t.shape, np.float32) for t in entry.inputs if t.name.endswith((".lora_A", ".lora_B"))}
        graph = opened.open(name, banks or None)
        program = graph.networks[True].program
        found = ops_of(program)
        layers = found["Widen"] + found["WideConv"]
        assert not {"Softmax", "InstanceNormalization", "GroupNorm", "Gelu", "Gemm"} & set(found), name
        assert found["MatMul"] == found["Gather"] or not banks or name.role == "text_encoder"
        assert name.role != "denoiser" or layers >= 8
    assert ops_of(opened.open(UNET, None).networks[True].program)["Widen"] == 0


def test_variants_hold_their_weights_once(tiny_sd1_control_bundle):
    opened = open_backend("torch", read_bundle(tiny_sd1_control_bundle), precision="fp32", threads=1)
    whole, variant = (opened.open(replace(UNET, variant=v)).networks[True].program.constants for v in ("", "deepcache"))
    large = [name for name, value in variant.items() if isinstance(value, torch.Tensor) and value.numel() >= 1024]
    assert large
    assert all(variant[name] is whole[name] for name in large)


def test_fp16_needs_cuda(tiny_sd1_bundle, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="fp16 on CUDA only"):
        open_backend("torch", read_bundle(tiny_sd1_bundle), precision="fp16")


@pytest.mark.slow
def test_parity_with_diffusers(tiny_sd1, tiny_sd1_bundle, tmp_path):
    """The proof that `stepforge verify` makes, whose limit in fp32 is 60 dB."""
    from stepforge.export.parity.verify import verify

    verdict = verify(tiny_sd1_bundle, tiny_sd1, backends=["torch", "torch-exact"], precisions=["fp32"], prompts=["a cat"],
                     steps=6, store=False)  # fmt: skip
    assert verdict["passed"]
