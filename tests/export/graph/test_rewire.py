"""Residual inputs and reuse variants on the graphs of one tiny UNet, against the same UNet in torch with hooks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from stepforge.export.build import graphs_of
from stepforge.export.cli import parse_controls
from stepforge.export.graph import modules, trace
from stepforge.export.graph.bank import add_bank, used_modules
from stepforge.export.graph.rewire import Variants, cut_variants, resolve_probes
from stepforge.export.models.networks import modules_of
from stepforge.runtime.bundle import Component
from stepforge.runtime.engine.adapters import Buffers, no_adapter, row_inputs
from stepforge.runtime.engine.conditions.controls import no_residuals
from stepforge.runtime.errors import CheckpointError, RequestError

ROUNDING = 2e-5  # relative to the largest value: fp32, other summation order, some 60 layers


@pytest.fixture(scope="module")
def unet(tiny_sd1: Path) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(tiny_sd1 / "unet").eval()


@pytest.fixture(scope="module")
def traced(unet: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Component]:
    """The graphs with their probes."""
    from diffusers import UNet2DConditionModel

    folder = tmp_path_factory.mktemp("traced")
    copy = UNet2DConditionModel.from_config(unet.config)
    copy.load_state_dict(unet.state_dict())
    entry = trace.save(modules.denoiser(copy, probe=True), folder)
    return folder, replace(entry, modules=used_modules(folder / entry.graph, modules_of(copy)))


Settle = Callable[..., tuple[Path, Component]]


@pytest.fixture
def settle(traced: tuple[Path, Component], tmp_path: Path) -> Settle:
    def run(**options: Any) -> tuple[Path, Component]:
        folder = Path(shutil.copytree(traced[0], tmp_path / "graphs"))
        options = {"control": False, "reuse": Variants(), **options}
        return folder, resolve_probes(graphs_of(folder, traced[1]), traced[1], **options)

    return run


def run(graph: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {k: v for k, v in inputs.items() if k in wanted}), strict=True))


def sample(seed: int, rows: int = 2) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "sample": random.standard_normal((rows, 4, 15, 24), dtype=np.float32),
        "timestep": np.linspace(900, 100, rows, dtype=np.float32),
        "encoder_hidden_states": random.standard_normal((rows, 77, 32), dtype=np.float32),
    }


def in_torch(unet: Any, inputs: dict[str, Any], **more: Any) -> Any:
    with torch.no_grad():
        return unet(*(torch.from_numpy(inputs[name]) for name in sample(0)), **more).sample.numpy()


def close(ours: Any, theirs: Any) -> bool:
    return float(np.abs(ours - theirs).max()) <= ROUNDING * float(np.abs(theirs).max())


@pytest.mark.slow
def test_residuals_are_those_of_diffusers_and_zeros_may_be_small(settle, unet):
    folder, entry = settle(control=True)
    inputs, small = sample(0), no_residuals(entry)
    sizes = [(15, 24), (15, 24), (8, 12), (8, 12), (8, 12)]
    random = np.random.default_rng(1)
    values = [
        random.standard_normal((2, value.shape[1], *size), dtype=np.float32)
        for value, size in zip(small.values(), sizes, strict=True)
    ]
    given = [torch.from_numpy(value) for value in values]
    theirs = in_torch(unet, inputs, down_block_additional_residuals=given[:-1], mid_block_additional_residual=given[-1])
    for graph in graphs_of(folder, entry):
        ours = run(graph, inputs | dict(zip(small, values, strict=True)))
        assert list(ours) == ["prediction"]
        assert close(ours["prediction"], theirs)
        without = run(graph, inputs | small)["prediction"]
        full = dict(zip(small, map(np.zeros_like, values), strict=True))
        assert np.array_equal(without, run(graph, inputs | full)["prediction"])
        assert close(without, in_torch(unet, inputs))
        assert not close(without, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("branch", [0, 1, 2])
def test_deepcache_of_every_branch(settle, unet, branch):
    """A skipping step against the UNet with the deep half of the branch's first up layer put in by a hook."""
    folder, entry = settle(control=True, reuse=Variants(branch))
    (name,) = [tensor.name for tensor in entry.outputs[1:]]
    assert name == "deep"
    first, second = sample(0), sample(1)
    zeros = no_residuals(entry)
    variant = cut_variants(folder, entry, ["deepcache"])["deepcache"]
    resnets = [resnet for block in unet.up_blocks for resnet in block.resnets]
    channels = int(entry.outputs[1].shape[1])
    seen: list[torch.Tensor] = []

    def keep(module: Any, args: Any) -> Any:
        if not seen:
            seen.append(args[0][:, :channels].clone())
            return None
        return (torch.cat([seen[0], args[0][:, channels:]], dim=1), *args[1:])

    hook = resnets[-1 - branch].register_forward_pre_hook(keep)
    try:
        in_torch(unet, first)
        theirs = in_torch(unet, second)
    finally:
        hook.remove()
    for whole, part in zip(graphs_of(folder, entry), graphs_of(folder, variant), strict=True):
        outputs = run(whole, first | zeros)
        assert close(outputs["deep"], seen[0].numpy())
        ours = run(part, second | zeros | {"deep": outputs["deep"]})
        assert list(ours) == ["prediction"]
        assert close(ours["prediction"], theirs)
        assert not close(run(whole, second | zeros)["prediction"], theirs)
    residuals = [t.name for t in variant.inputs if t.name.startswith("residual_")]
    assert residuals == [f"residual_{index}" for index in range(branch + 1)]


@pytest.mark.slow
def test_tgate_reads_no_prompt(settle, unet):
    folder, entry = settle(reuse=Variants(0, True))
    variant = cut_variants(folder, entry, ["tgate"])["tgate"]
    assert [t.name for t in variant.inputs if not t.name.startswith("text_")] == ["sample", "timestep"]
    assert [t.name for t in variant.outputs] == ["prediction", "deep"]
    first, second = sample(0), sample(1)
    kept: dict[Any, Any] = {}
    attentions = [module for name, module in unet.named_modules() if name.endswith(".attn2")]
    hooks = [m.register_forward_hook(lambda m, _, output: kept.setdefault(m, output)) for m in attentions]
    try:
        in_torch(unet, first)
        theirs = in_torch(unet, second)
    finally:
        for hook in hooks:
            hook.remove()
    for whole, part in zip(graphs_of(folder, entry), graphs_of(folder, variant), strict=True):
        texts = {key: value for key, value in run(whole, first).items() if key.startswith("text_")}
        assert len(texts) == len(attentions)
        assert close(run(part, second | texts)["prediction"], theirs)


@pytest.mark.slow
def test_nothing_asked_leaves_a_plain_denoiser(settle, unet):
    folder, entry = settle()
    for graph in graphs_of(folder, entry):
        outputs = run(graph, sample(0))
        assert list(outputs) == ["prediction"]
        assert close(outputs["prediction"], in_torch(unet, sample(0)))


@pytest.mark.slow
@pytest.mark.parametrize("reuse", [Variants(), Variants(1, True)])
def test_adapters_of_layers_whose_output_leaves_the_graph(settle, unet, reuse):
    """conv_out makes the prediction, an upsampler's convolution `deep`: readers are outputs of the graph, not nodes."""
    folder, entry = settle(reuse=reuse)
    bank, tensors = add_bank(graphs_of(folder, entry), entry.modules, 2, 2)
    entry = replace(entry, bank=bank, inputs=(*entry.inputs, *tensors))
    buffers = Buffers(bank, entry.modules, np.float32)
    random = np.random.default_rng(2)
    pair = [random.standard_normal(shape).astype(np.float32) for shape in ((2, 32 * 9), (4, 2))]
    buffers.fill(1, [({"conv_out": buffers.block("conv_out", *pair)}, 1.0)])
    inputs = sample(0)
    plain = in_torch(unet, inputs)
    weight = unet.conv_out.weight
    before = weight.detach().clone()
    weight.data += torch.from_numpy((pair[1] @ pair[0]).reshape(weight.shape))
    merged = in_torch(unet, inputs)
    weight.data.copy_(before)
    for graph in graphs_of(folder, entry):
        ours = run(graph, inputs | buffers.arrays | row_inputs([1, 0], [1.0, 0.0]))["prediction"]
        assert close(ours[0], merged[0])
        assert close(ours[1], plain[1])
        assert not close(plain[0], merged[0])
        assert close(run(graph, inputs | buffers.arrays | no_adapter(2))["prediction"], plain)


@pytest.mark.slow
@pytest.mark.long  # graph/test_trace.py has the plain network in fp16
def test_a_network_in_fp16_casts_at_its_borders(tiny_sd1, unet, tmp_path):
    """Inputs and outputs stay float32. 2 %: 11 bits an operation over some 60 layers."""
    from diffusers import UNet2DConditionModel

    half = UNet2DConditionModel.from_pretrained(tiny_sd1 / "unet", torch_dtype=torch.float16).eval()
    entry = trace.save(modules.denoiser(half, probe=True), tmp_path)
    entry = replace(entry, modules=modules_of(half))
    entry = resolve_probes(graphs_of(tmp_path, entry), entry, control=True, reuse=Variants(0, True))
    variants = cut_variants(tmp_path, entry, ["deepcache", "tgate"])
    inputs, zeros = sample(0), no_residuals(entry)
    theirs = in_torch(unet, inputs)
    for index, graph in enumerate(graphs_of(tmp_path, entry)):
        whole = run(graph, inputs | zeros)
        assert {value.dtype for value in whole.values()} == {np.dtype(np.float32)}
        assert np.abs(whole["prediction"] - theirs).max() <= 0.02 * np.abs(theirs).max()
        for variant in variants.values():
            again = run(graphs_of(tmp_path, variant)[index], inputs | zeros | whole)["prediction"]
            assert np.abs(again - whole["prediction"]).max() <= 0.02 * np.abs(theirs).max()


@pytest.mark.slow
def test_a_branch_that_the_network_does_not_have_is_refused(settle):
    with pytest.raises(CheckpointError, match="deepcache's branch is 3; this network has 0 to 2"):
        settle(reuse=Variants(3))


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], Variants()),
        (["tgate"], Variants(None, True)),
        ([" tgate "], Variants(None, True)),
        (["deepcache"], Variants(0)),
        (["deepcache(2)", "tgate"], Variants(2, True)),
    ],
)
def test_names_of_variants(texts, expected):
    assert Variants.parse(texts) == expected


@pytest.mark.parametrize("text", ["", "magic", "deepcache()", "deepcache(-1)", "deepcache(1000)", "tgate(0.5)"])
def test_unknown_variants_are_refused(text):
    with pytest.raises(CheckpointError, match=r"choose tgate, deepcache or deepcache\(BRANCH\)"):
        Variants.parse([text])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a=x", "a=y"], "--control a is given twice"),
        (["a"], "give NAME=PATH"),
        (["a="], "give NAME=PATH"),
    ],
)
def test_controls_of_the_command_line(texts, message):
    with pytest.raises(RequestError, match=message):
        parse_controls(texts)
    assert parse_controls(["a=x", "b=y/z=1"]) == {"a": Path("x"), "b": Path("y/z=1")}
