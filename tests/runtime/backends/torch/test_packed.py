"""Layers that run as one product, and residuals in their epilogue: structure, values, and copies that follow their slots."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stepforge.runtime.backends import Banks, open_backend
from stepforge.runtime.backends.torch import lowrank as torch_lowrank
from stepforge.runtime.backends.torch.banks import DeviceBanks
from stepforge.runtime.backends.torch.lora import LoraPasses, Stack, View, fuse_lowrank_geglu, fuse_residual
from stepforge.runtime.backends.torch.passes.packed import pack_attention
from stepforge.runtime.backends.torch.program import Node, Program
from stepforge.runtime.backends.torch.run import Runner
from stepforge.runtime.bundle import TEXT_ENCODERS, UNET, ComponentId, read

CPU = torch.device("cpu")
BANKS = (".lora_A", ".lora_B")
DEEPCACHE = ComponentId("denoiser", "unet", "deepcache")


def opened(path, name="torch", component=UNET, seed=1):
    """A component with banks of random numbers, slot 0 of zeros; and the banks."""
    bundle = read(path)
    entry = bundle.components[component]
    random = np.random.RandomState(seed)
    banks = Banks({}, np.zeros(3, np.int64))
    for tensor in entry.inputs:
        if tensor.name.endswith(BANKS):
            banks[tensor.name] = (0.1 * random.standard_normal(tensor.shape)).astype(np.float32)
            banks[tensor.name][0] = 0
    return open_backend(name, bundle, precision="fp32", threads=1).open(component, banks), banks


def step(rows=3):
    random = np.random.RandomState(rows)
    return {
        "sample": random.standard_normal((rows, 4, 16, 24)).astype(np.float32),
        "timestep": np.linspace(999, 1, rows).astype(np.float32),
        "encoder_hidden_states": random.standard_normal((rows, 77, 32)).astype(np.float32),
        "adapter": np.array([2, 0, 1]),
        "adapter_strength": np.array([0.7, 1.0, -0.5], np.float32).reshape(-1, 1, 1),
    }


# structure


def test_what_runs_as_one_in_a_whole_network(tiny_sd1_banks):
    """Four transformer blocks, wide and bare: q, k, v of each are one product, and k, v of the prompt."""
    graph, _ = opened(tiny_sd1_banks)
    for network in graph.networks[:2]:
        program = network.program
        assert Counter(node.attributes["num_outputs"] for node in program.nodes if node.op == "Split") == {3: 4, 2: 4}
    bare, wide = (network.program for network in graph.networks[:2])
    found = Counter(node.op for node in wide.nodes)
    assert (found["WideConv"], found["LowrankConv"], found["LowrankLinear"], found["LowrankGeglu"]) == (24, 0, 0, 0)
    assert found["Linear"] >= 15  # the layers of the bare network, and what shrinks
    readers = Counter(node.inputs[0] for node in bare.nodes if node.op == "Linear")
    assert {
        x: count for x, count in readers.items() if count > 1
    } == {}  # time embeddings and prompts are one product too


def test_weights_are_held_once(tiny_sd1_control_bundle):
    """By the networks with and without LoRA and by reuse variants: in wide rows where a layer has adapters. Not so: shortcuts
    on concatenations, whose halves the bare network multiplies apart, and the time embedding's products of a variant."""
    bundle = read(tiny_sd1_control_bundle)
    backend = open_backend("torch", bundle, precision="fp32", threads=1)
    held = []
    for name in (UNET, DEEPCACHE):
        entry = bundle.components[name]
        banks = {t.name: np.zeros(t.shape, np.float32) for t in entry.inputs if t.name.endswith(BANKS)}
        for network in backend.open(name, banks).networks[:2]:
            tensors = dict(network.program.constants)
            if network.wide is not None:
                tensors |= {name: weight.tensor for name, weight in network.wide._weights.items()}
            held.append(
                {
                    value.untyped_storage().data_ptr()
                    for name, value in tensors.items()
                    if isinstance(value, torch.Tensor) and value.numel() >= 1024
                    if "conv_shortcut" not in name and "time_emb_proj" not in name
                }
            )
    bare, wide, *variants = held
    assert len(wide) >= 40
    assert bare <= wide
    assert all(variant <= wide for variant in variants)


def attention(layers, op="Linear"):
    """Attention of three layers (x, weight, bias) of tokens [rows, 5, 8], in heads of 3."""
    nodes, constants = [], {"heads": np.array([0, 5, 2, 3]), "flat": np.array([0, 5, 6])}
    for at, (x, width, bias) in enumerate(layers):
        constants[f"w{at}"] = torch.randn(width, 8)
        operands = [x, f"w{at}"]
        if bias:
            constants[f"b{at}"] = torch.randn(width)
            operands.append(f"b{at}")
        nodes += [
            Node(op, tuple(operands), (f"y{at}",)),
            Node("Reshape", (f"y{at}", "heads"), (f"h{at}",)),
            Node("Transpose", (f"h{at}",), (f"t{at}",), {"perm": (0, 2, 1, 3)}),
        ]
    nodes.append(Node("Attention", ("t0", "t1", "t2", ""), ("y",), {"scale": 3**-0.5}))
    return Program(nodes, ("x", "z"), ("y",), constants)


@pytest.mark.parametrize(
    ("layers", "products"),
    [
        ([("x", 6, False)] * 3, 1),
        ([("x", 6, True)] * 3, 1),
        ([("x", 6, True), ("z", 6, True), ("z", 6, True)], 2),
        ([("x", 6, False), ("x", 6, True), ("x", 6, False)], 2),
        ([("x", 6, False), ("z", 6, True), ("z", 6, False)], 3),
    ],
)
def test_which_layers_run_as_one(layers, products):
    """Those of one x, all with a bias or all without."""
    torch.manual_seed(7)
    program = attention(layers)
    inputs = {"x": torch.randn(2, 5, 8), "z": torch.randn(2, 5, 8)}
    before = Runner(program)(inputs)["y"]
    assert pack_attention(program, LoraPasses()) == (products < 3)
    assert sum(node.op == "Linear" for node in program.nodes) == products
    torch.testing.assert_close(Runner(program)(inputs)["y"], before, rtol=1e-5, atol=1e-5)
    assert not pack_attention(program, LoraPasses())


@pytest.mark.parametrize(("changed", "products"), [({}, 1), ({"strength": "s2"}, 2), ({"rank": 2}, 2)])
def test_which_layers_with_lora_run_as_one(changed, products):
    """Those of one strength and rank; the views that are stacked are inputs no more."""
    program = attention([("x", 6, False)] * 3)
    views = {}
    for at in range(3):
        ours = {"strength": "s1", "rank": 4, **(changed if at == 1 else {})}
        pair = (View("A", "down", 4 * at, 4 * at + 4), View(f"B{at}", "up", 0, 4))
        views |= {view.name: view for view in pair}
        operands = ("x", f"w{at}", "", *(view.name for view in pair), "adapter", ours["strength"])
        program.nodes[3 * at] = Node("LowrankLinear", operands, (f"y{at}",), {"rank": ours["rank"]})
    program.inputs = ("x", "adapter", "s1", "s2", *views)
    lora = LoraPasses(views=views)
    assert pack_attention(program, lora)
    layers = [node for node in program.nodes if node.op == "LowrankLinear"]
    assert len(layers) == products
    assert sorted(name for node in layers for name in node.inputs[3:5]) == sorted(lora.views)
    assert set(program.inputs) == {"x", "adapter", "s1", "s2", *lora.views}


def test_heads_are_views_of_the_product(monkeypatch):
    """Nothing is copied on the way to attention."""
    program = attention([("x", 6, False)] * 3)
    pack_attention(program, LoraPasses())
    runner = Runner(program)
    seen = []
    at = next(i for i, (node, _, _) in enumerate(runner._steps) if node.op == "Attention")
    node, compute, done = runner._steps[at]
    runner._steps[at] = (node, lambda *heads: seen.extend(heads[:3]) or compute(*heads), done)
    runner({"x": torch.randn(2, 5, 8), "z": torch.zeros(1)})
    assert len({head.untyped_storage().data_ptr() for head in seen}) == 1


def lowrank(name, residual="", out="y"):
    operands = ("x", "w", "", f"{name}a", f"{name}b", "adapter", "strength")
    return Node("LowrankLinear", (*operands, residual) if residual else operands, (out,), {"rank": 4})


def test_a_residual_is_fused_once_and_only_where_nothing_else_reads_the_layer():
    inputs = ("x", "r", "adapter", "strength", "a", "b")

    def rewritten(nodes, outputs=("s",)):
        program = Program(list(nodes), inputs, outputs, {"w": torch.zeros(6, 8)})
        changed = fuse_residual(program)
        assert not fuse_residual(program) or not changed
        return [(node.op, node.inputs[7:], node.outputs) for node in program.nodes]

    for operands in (("y", "r"), ("r", "y")):
        assert rewritten([lowrank(""), Node("Add", operands, ("s",))]) == [("LowrankLinear", ("r",), ("s",))]
    both = [lowrank("", out="y"), lowrank("", out="z"), Node("Add", ("y", "z"), ("s",))]
    assert rewritten(both) == [("LowrankLinear", (), ("z",)), ("LowrankLinear", ("z",), ("s",))]
    chain = [lowrank(""), Node("Add", ("y", "r"), ("z",)), lowrank("", out="y2"), Node("Add", ("z", "y2"), ("s",))]
    assert rewritten(chain) == [("LowrankLinear", ("r",), ("z",)), ("LowrankLinear", ("z",), ("s",))]
    fused = [lowrank("", residual="r"), Node("Add", ("y", "r"), ("s",))]
    assert rewritten(fused) == [("LowrankLinear", ("r",), ("y",)), ("Add", (), ("s",))]
    twice = [lowrank(""), Node("Add", ("y", "y"), ("s",))]
    assert rewritten(twice) == [("LowrankLinear", (), ("y",)), ("Add", (), ("s",))]
    taken = [lowrank(""), Node("Add", ("y", "r"), ("s",))]
    assert rewritten(taken, ("s", "y")) == [("LowrankLinear", (), ("y",)), ("Add", (), ("s",))]


def test_geglu_is_fused_where_nothing_else_reads_the_layer():
    inputs = ("x", "r", "adapter", "strength", "a", "b")

    def rewritten(layer, outputs=("s",)):
        program = Program([layer, Node("Geglu", ("y",), ("s",))], inputs, outputs, {"w": torch.zeros(6, 8)})
        changed = fuse_lowrank_geglu(program)
        return changed, [(node.op, node.inputs, dict(node.attributes)) for node in program.nodes]

    plain = lowrank("")
    assert rewritten(plain) == (True, [("LowrankGeglu", plain.inputs, {"rank": 4})])
    assert not rewritten(plain, ("s", "y"))[0]
    assert not rewritten(lowrank("", residual="r"))[0]


# values


def relative(found, truth):
    return np.linalg.norm(found.astype(np.float64) - truth) / np.linalg.norm(truth)


@pytest.mark.parametrize("slots", [[2, 0, 1], [0, 0, 0]], ids=["adapters", "none"])
def test_the_fast_tier_agrees_with_the_exact_one(tiny_sd1_control_bundle, slots):
    """In fp32 only the order of sums differs: 1e-5, for rows of other slots and strengths, the network and its variant."""
    inputs = {**step(), "adapter": np.array(slots)}
    for place in range(5):
        inputs[f"residual_{place}"] = np.zeros((1, 1, 1, 1), np.float32)
    truth = opened(tiny_sd1_control_bundle, "torch-exact")[0](inputs)
    found = opened(tiny_sd1_control_bundle)[0](inputs)
    assert set(found) == set(truth)
    assert all(relative(found[name], value) <= 1e-5 for name, value in truth.items())
    inputs["deep"] = truth["deep"]
    truth, found = (
        opened(tiny_sd1_control_bundle, name, DEEPCACHE)[0](inputs)["prediction"] for name in ("torch-exact", "torch")
    )
    assert relative(found, truth) <= 1e-5


def test_a_text_encoder_with_biases_agrees_with_the_exact_one(tiny_sd1_banks):
    inputs = {"input_ids": np.arange(154).reshape(2, 77) % 500, "adapter": np.array([2, 1])}
    inputs["adapter_strength"] = np.array([0.7, -0.5], np.float32).reshape(-1, 1, 1)
    fast, exact = (opened(tiny_sd1_banks, name, TEXT_ENCODERS[0])[0] for name in ("torch", "torch-exact"))
    found = Counter(node.op for node in fast.networks[True].program.nodes)
    assert (found["Widen"], found["Split"], found["LowrankLinear"]) == (12, 3, 0)
    for name, truth in exact(inputs).items():
        assert relative(fast(inputs)[name], truth) <= 1e-5


@pytest.mark.parametrize("path", ["reference", "addmm"])
def test_both_paths_of_layers_in_one(path, monkeypatch):
    """Against the formula in fp64; the residual has the result's shape, or is broadcast onto it."""
    monkeypatch.setattr(torch_lowrank, "_choice", lambda *args: (0, path))
    torch.manual_seed(6)
    x, w, bias, a, b = (torch.randn(shape) for shape in ((3, 5, 8), (12, 8), (12,), (2, 8, 8), (2, 12, 4)))
    slots, strength = torch.tensor([1, 0, 1]), torch.tensor([0.5, 2.0, -1.0]).reshape(3, 1, 1)
    for residual in (None, torch.randn(3, 5, 12), torch.randn(3, 1, 12), torch.randn(12)):
        found = torch_lowrank.linear(x, w, bias, a, b, slots, strength, residual, rank=4, slices=2)
        wide = [value.double() for value in (x, w, bias, a[slots], b[slots], strength)]
        x64, w64, bias64, a64, b64, strength64 = wide
        parts = [x64 @ a64[:, 4 * p : 4 * p + 4].mT @ b64[:, 6 * p : 6 * p + 6].mT for p in range(2)]
        expected = x64 @ w64.T + bias64 + strength64 * torch.cat(parts, -1)
        expected = expected if residual is None else expected + residual.double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["reference", "addmm"])
def test_both_paths_of_a_layer_with_geglu(path, monkeypatch):
    monkeypatch.setattr(torch_lowrank, "_choice", lambda *args: (0, path))
    torch.manual_seed(6)
    x, w, bias, a, b = (torch.randn(shape) for shape in ((3, 5, 8), (12, 8), (12,), (2, 4, 8), (2, 12, 4)))
    slots, strength = torch.tensor([1, 0, 1]), torch.tensor([0.5, 2.0, -1.0]).reshape(3, 1, 1)
    for given in (bias, None):
        found = torch_lowrank.geglu(x, w, given, a, b, slots, strength, rank=4)
        h = x.double() @ w.double().T + strength.double() * (x.double() @ a[slots].double().mT @ b[slots].double().mT)
        value, gate = (h if given is None else h + given.double()).chunk(2, -1)
        torch.testing.assert_close(found.double(), value * F.gelu(gate), rtol=1e-5, atol=1e-5)


# slots that are filled again


def test_another_adapter_and_back_again_gives_the_first_bits(tiny_sd1_banks):
    """Also where the CPU holds a copy of the banks: stacks."""
    graph, banks = opened(tiny_sd1_banks)
    _, others = opened(tiny_sd1_banks, seed=2)
    mine = {name: array.copy() for name, array in banks.items()}
    inputs = step()

    def fill(arrays, names, slot=2):
        for name in names:
            banks[name][slot] = arrays[name][slot]
        banks.versions[slot] += 1
        return np.array(graph(inputs)["prediction"])

    first = np.array(graph(inputs)["prediction"])
    path = "mid_block.attentions.0.transformer_blocks.0.attn1"
    for names in ([f"{path}.to_q.lora_A"], [f"{path}.to_k.lora_B"], list(banks)):  # of a stack, and all
        other = fill(others, names)
        assert np.abs(other[0] - first[0]).max() > 1e-4
        assert np.array_equal(other[1:], first[1:])  # rows of other slots
        assert np.array_equal(fill(mine, names), first)


def test_a_swap_waits_for_nothing_and_keeps_the_order(monkeypatch):
    """A device that does nothing until it is asked: A, B and A again are queued while no call has run, and each call still
    reads its own, bit for bit. So no block is written twice, and nothing is copied from memory that is not pinned."""
    queue, pinned, empty, copy = [], [], torch.empty, torch.Tensor.copy_

    def allocate(*shape, pin_memory=False, **options):
        found = empty(*shape, **options)
        pinned.extend([found] * pin_memory)
        return found

    def queued(target, source, non_blocking=False):
        is_pinned = any(source.untyped_storage().data_ptr() == p.untyped_storage().data_ptr() for p in pinned)
        assert non_blocking == is_pinned
        assert is_pinned or target.untyped_storage().data_ptr() not in device  # a copy that would wait
        if not non_blocking:
            return copy(target, source)
        queue.append(lambda: copy(target, source))
        return target

    arrays = Banks({"A": np.zeros((2, 5, 8), np.float32)}, np.zeros(2, np.int64))
    arrays |= {name: np.zeros((2, 4, 6), np.float32) for name in ("B0", "B1")}
    views = [Stack((View("B0", "up", 0, 4), View("B1", "up", 0, 4))), View("A", "down", 0, 4), View("A", "down", 4, 8)]
    placed = DeviceBanks(arrays, views, (), device=CPU, dtype=torch.float16, shared={}, copied=True)
    placed._is_cuda = True
    device = {tensor.untyped_storage().data_ptr() for tensor in placed.tensors.values()}
    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(torch.Tensor, "copy_", queued)
    random, sets, seen = np.random.RandomState(0), {}, []
    for letter in "ABA":
        if letter not in sets:
            sets[letter] = {name: random.standard_normal(array[1].shape) for name, array in arrays.items()}
        for name, values in sets[letter].items():
            arrays[name][1] = values
        arrays.versions[1] += 1
        placed.refresh()
        queue.append(lambda: seen.append({name: tensor.clone() for name, tensor in placed.tensors.items()}))
    assert not seen
    for done in queue:
        done()
    first, other, again = seen
    for view in views:
        assert torch.equal(first[view.name], again[view.name])
        assert not torch.equal(first[view.name], other[view.name])
        assert not first[view.name][0].any()
    held = torch.from_numpy(sets["A"]["A"][:, 4:].T).half()
    assert torch.equal(first[views[2].name][1, :4], held)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("rank", [8, 20])
def test_a_stack_is_a_copy_that_follows_its_slots(rank, copied):
    """On CUDA each part has ranks of zeros up to what the kernels take; on the CPU, where a single view is no copy, none."""
    arrays = Banks({"A": np.zeros((3, 5, 2 * rank), np.float32)}, np.zeros(3, np.int64))
    arrays |= {name: np.zeros((3, rank, 6), np.float32) for name in ("B0", "B1")}
    downs = Stack((View("A", "down", 0, rank), View("A", "down", rank, 2 * rank)))
    ups = Stack((View("B0", "up", 0, rank), View("B1", "up", 0, rank)))
    single = View("B0", "up", 0, rank)
    placed = DeviceBanks(arrays, [downs, ups, single], (), device=CPU, dtype=torch.float32, shared={}, copied=copied)
    padded = {8: 16, 20: 32}[rank] if copied else rank
    a, b = placed.tensors[downs.name], placed.tensors[ups.name]
    assert (a.shape, b.shape) == ((3, 2 * padded, 5), (3, 12, padded))
    random = np.random.RandomState(rank)
    for array in arrays.values():
        array[:] = random.standard_normal(array.shape)
    placed.refresh()
    expected = [torch.from_numpy(arrays["A"][:, :, part * rank : (part + 1) * rank]).mT for part in range(2)]
    assert torch.equal(a.unflatten(1, (2, -1))[:, :, :rank], torch.stack(expected, 1))
    assert not a.unflatten(1, (2, -1))[:, :, rank:].any()
    assert torch.equal(b[:, :6, :rank], torch.from_numpy(arrays["B0"]).mT)
    assert torch.equal(b[:, 6:, :rank], torch.from_numpy(arrays["B1"]).mT)
    assert not b[..., rank:].any()
    before = a.clone(), b.clone()
    arrays["A"] += 1
    arrays["B1"] += 1
    placed.refresh()  # nobody said that a slot changed
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])
    arrays.versions[1] += 1
    placed.refresh()
    assert [torch.equal(a[slot], before[0][slot]) for slot in range(3)] == [True, False, True]
    assert torch.equal(b[1, 6:, :rank], torch.from_numpy(arrays["B1"])[1].mT)
