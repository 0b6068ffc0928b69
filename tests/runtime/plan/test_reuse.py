"""Reuse variants: which evaluations are whole, and the images of an eager implementation with diffusers' modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stepforge import Engine, Request, RequestError, load
from stepforge.export.parity.measures import relative_error
from stepforge.export.parity.verify import LIMITS
from stepforge.runtime.backends.fake import fake_bundle
from stepforge.runtime.bundle import UNET, Bundle, ComponentId, read
from stepforge.runtime.bundle.scheduler import SchedulerCard
from stepforge.runtime.engine.noise import Generator
from stepforge.runtime.imaging.preprocess import hint_of
from stepforge.runtime.plan import Plan, Step
from stepforge.runtime.plan.compile import compile_plan
from stepforge.runtime.plan.reuse import Reuse, recordings, variants

REAL = ("onnxruntime", *(pytest.param(name, marks=pytest.mark.long) for name in ("openvino", "torch")))
D, T = "deepcache", "tgate"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Reuse()),
        ("deepcache(3)", Reuse(3)),
        ("deepcache( 3 , steps=0.4..1 )", Reuse(3, (0.4, 1.0))),
        ("tgate(0.5)", Reuse(gate=0.5)),
        ("tgate(0.5) + deepcache(2)", Reuse(2, gate=0.5)),
    ],
)
def test_the_grammar(text, expected):
    found = Reuse.parse(text)
    assert found == expected == Reuse.parse(str(found))
    assert bool(found) == bool(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("deep", "give deepcache"),
        ("deepcache", "give deepcache"),
        ("deepcache(2)+deepcache(3)", "give deepcache"),
        ("tgate(0.5)+", "give deepcache"),
        ("deepcache()", "deepcache takes interval, steps"),
        ("deepcache(1)", "whole number from 2 to 100"),
        ("deepcache(2.5)", "whole number from 2 to 100"),
        ("deepcache(3, 0.4..1)", "deepcache takes interval, steps"),
        ("deepcache(3, steps=0.7..0.2)", "not a part of the steps"),
        ("deepcache(3, steps=0..1.5)", "not a part of the steps"),
        ("deepcache(3, steps=...1..2)", "not a part of the steps"),
        ("tgate(0)", "between 0 and 1"),
        ("tgate(1)", "between 0 and 1"),
        ("tgate(half)", "'half' is not a number"),
    ],
)
def test_refusals(text, message):
    with pytest.raises(RequestError, match=message) as caught:
        Request(prompt="", reuse=text)
    assert "\n" not in str(caught.value)


def rows(weights: list[float]) -> list[Step]:
    return [Step(0.0, 1.0, 1.0, (1.0,), (0.0,), 0.0, (1.0, 0.0), guidance=w) for w in weights]


@pytest.mark.parametrize(
    ("text", "weights", "expected"),
    [
        ("deepcache(3)", [7.0] * 7, ["", D, D, "", D, D, ""]),
        ("deepcache(2, steps=0.5..1)", [7.0] * 8, ["", "", "", "", "", D, "", D]),
        ("deepcache(2, steps=0.25..0.75)", [7.0] * 8, ["", "", "", D, "", D, "", ""]),
        ("tgate(0.5)", [7.0] * 6, ["", "", "", T, T, T]),
        ("tgate(0.01)", [7.0] * 3, ["", T, T]),
        ("deepcache(2)+tgate(0.5)", [7.0] * 6, ["", D, "", D, T, D]),
        # one row of the two that were recorded
        ("deepcache(3)", [7.0, 1.0, 1.0, 1.0], ["", D, D, ""]),
        ("tgate(0.5)", [7.0, 7.0, 1.0, 0.0], ["", "", T, T]),
        # a row that was not recorded
        ("deepcache(3)", [1.0, 7.0, 7.0, 0.0], ["", "", D, ""]),
        ("tgate(0.5)", [7.0, 1.0, 0.0, 7.0, 1.0, 0.0], ["", "", "", "", T, T]),
        ("deepcache(2)+tgate(0.5)", [7.0, 7.0, 1.0, 7.0], ["", D, T, ""]),
    ],
)
def test_which_evaluations_are_whole(text, weights, expected):
    assert list(variants(Reuse.parse(text), rows(weights))) == expected


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (["", D, D, ""], ["deep", "", "", ""]),
        (["", "", T, T], ["", "text", "", ""]),
        (["", "", D, T, D], ["", "deep text", "", "deep", ""]),
        (["", "", ""], ["", "", ""]),
    ],
)
def test_recordings_are_what_later_evaluations_read(chosen, expected):
    steps = [replace(step, reuse=variant) for step, variant in zip(rows([7.0] * len(chosen)), chosen, strict=True)]
    assert list(recordings(steps)) == [frozenset(kept.split()) for kept in expected]


CARD = SchedulerCard(sampler="ddim", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def test_the_two_evaluations_of_a_heun_step_are_two():
    plan = compile_plan(Request(prompt="", sampler="heun", steps=4, reuse="deepcache(2)+tgate(0.5)"), CARD)
    assert [step.reuse for step in plan.steps] == ["", D, "", D, T, D, T]


def test_rows_that_a_guider_spares_are_not_recorded():
    """CFG-Zero* zeroes the first prediction and spares its unconditional row: the next evaluation cannot reuse it."""
    plan = compile_plan(Request(prompt="", steps=6, sampler="ddim", guider="zero_star", reuse="deepcache(3)"), CARD)
    assert [step.reuse for step in plan.steps] == ["", "", D, "", D, D]


# An eager implementation of the same algorithms: diffusers' UNet and ControlNets with hooks


class Eager:
    """Runs plans with diffusers' modules; T-GATE and DeepCache by hooks that keep activations and put them back."""

    def __init__(self, unet: Any, nets: dict[str, Any], branch: int) -> None:
        self.unet, self.nets = unet.eval(), nets
        self.variant, self.roles = "", [True]
        self.kept: dict[Any, tuple[list[bool], torch.Tensor]] = {}
        for name, module in unet.named_modules():
            if name.endswith(".attn2"):
                module.register_forward_hook(self._text)
        resnets = [resnet for block in unet.up_blocks for resnet in block.resnets]
        self.skip_channels = [conv.out_channels for conv in _skip_sources(unet)]
        self.branch = branch
        resnets[-1 - branch].register_forward_pre_hook(self._deep)

    def _text(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        if self.variant == T:
            roles, value = self.kept[module]
            if roles == self.roles:
                return value
            assert len(self.roles) == 1
            return value.mean(dim=0, keepdim=True)
        if self.variant == "":  # a skipping step runs the shallow attentions on its own text: nothing to keep
            self.kept[module] = (self.roles, output)
        return output

    def _deep(self, module: Any, args: Any) -> Any:
        joined = args[0]
        deep = joined.shape[1] - self.skip_channels[self.branch]
        if self.variant == D:
            roles, value = self.kept["deep"]
            value = value[[roles.index(role) for role in self.roles]]
            return (torch.cat([value, joined[:, deep:]], dim=1), *args[1:])
        self.kept["deep"] = (self.roles, joined[:, :deep].clone())
        return None

    @torch.no_grad()
    def run(self, plan: Plan, request: Request, contexts: dict[bool, torch.Tensor], pixels: list[Any]) -> Any:
        generator = Generator(request.seed)
        shape = (4, *(size // 2 for size in pixels[0].shape[-2:])) if pixels else (4, 16, 16)
        xs, ps = [torch.from_numpy(plan.init_noise * generator.normal(shape)).double()], []
        for step in plan.steps:
            self.roles = [role for role, unused in ((True, 0.0), (False, 1.0)) if step.guidance != unused]
            self.variant = step.reuse
            x = (xs[0] * step.scale_in).float().expand(len(self.roles), -1, -1, -1)
            context = torch.cat([contexts[role] for role in self.roles])
            t = torch.full((len(self.roles),), step.t)
            out = self.unet(x, t, context, **self._residuals(x, t, context, request, step, pixels)).sample.double()
            w = step.guidance
            ps.insert(0, out[0] if len(out) == 1 else out[1] + w * (out[0] - out[1]))
            assert not step.noise
            moved = sum(c * x for c, x in zip(step.keep, xs, strict=False))
            xs.insert(0, moved + sum(c * p for c, p in zip(step.gain, ps, strict=False)))
        return xs[0].numpy()

    def _residuals(self, x: Any, t: Any, context: Any, request: Request, step: Step, pixels: list[Any]) -> Any:
        total: list[torch.Tensor] = []
        for control, image, scale in zip(request.controls, pixels, step.control, strict=True):
            if not scale:
                continue
            rows = [r for r, role in enumerate(self.roles) if role or not control.guess_mode]
            down, mid = self.nets[control.name](
                x[rows], t[rows], context[rows], image.expand(len(rows), -1, -1, -1), conditioning_scale=scale,
                guess_mode=control.guess_mode, return_dict=False,
            )  # fmt: skip
            values = []
            for value in (*down, mid):
                full = torch.zeros(len(self.roles), *value.shape[1:])
                full[rows] = value
                values.append(full)
            total = values if not total else [a + b for a, b in zip(total, values, strict=True)]
        if not total:
            return {}
        return {"down_block_additional_residuals": total[:-1], "mid_block_additional_residual": total[-1]}


def _skip_sources(unet: Any) -> list[Any]:
    """The convolutions that give the skip connections their channels, in the order of the down path."""
    found = [unet.conv_in]
    for block in unet.down_blocks:
        found += [resnet.conv2 for resnet in block.resnets]
        found += [sampler.conv for sampler in block.downsamplers or ()]
    return found


@pytest.fixture(scope="module")
def eager(tiny_sd1: Path, tiny_sd1_controls: dict[str, Path]) -> Callable[[Any], Eager]:
    from diffusers import ControlNetModel, UNet2DConditionModel

    nets = {name: ControlNetModel.from_pretrained(folder).eval() for name, folder in tiny_sd1_controls.items()}

    def make(change: Callable[[Any], None] | None = None, branch: int = 0) -> Eager:
        unet = UNet2DConditionModel.from_pretrained(tiny_sd1 / "unet")
        if change is not None:
            change(unet)
        return Eager(unet, nets, branch)

    return make


@pytest.fixture(scope="module")
def engines(tiny_sd1_control_bundle: Path) -> Iterator[dict[str, Engine]]:
    """Engines by backend, opened when they are asked for."""

    class Opened(dict[str, Engine]):
        def __missing__(self, name: str) -> Engine:
            self[name] = load(tiny_sd1_control_bundle, backend=name, precision="fp32", max_rows=16)
            return self[name]

    opened = Opened()
    yield opened
    for engine in opened.values():
        engine.close()


def contexts(engine: Engine, request: Request) -> dict[bool, torch.Tensor]:
    cond, uncond = engine._worker.conditioner(request.prompt, request.negative, request.prompt_syntax)
    assert uncond is not None
    return {role: torch.from_numpy(c.context[None].copy()) for role, c in ((True, cond), (False, uncond))}


def pixels(request: Request) -> list[torch.Tensor]:
    return [torch.from_numpy(hint_of(c.image, c.preprocessor, 32, 32)[None]) for c in request.controls]


HINTS = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)) for i in range(2)]
A, B = {"name": "a", "image": HINTS[0]}, {"name": "b", "image": HINTS[1]}
COMMON = {"prompt": "a cat", "negative": "a dog", "steps": 7, "guidance": 4.0, "sampler": "ddim"}
CASES: dict[str, dict[str, Any]] = {
    "deepcache": {"reuse": "deepcache(3)"},
    "tgate": {"reuse": "tgate(0.5)"},
    "tgate, one row of two": {"reuse": "tgate(0.5)", "guidance": [4.0] * 4 + [1.0] * 3},
    "deepcache, one row of two": {"reuse": "deepcache(4)", "guidance": [4.0, 4.0, 1.0, 0.0, 4.0, 4.0, 0.0]},
    "both with a history": {"reuse": "deepcache(2)+tgate(0.4)", "sampler": "dpmpp_2m"},
    "deepcache, two nets": {"reuse": "deepcache(2)", "controls": [{**A, "scale": 0.7}, {**B, "start": 0.3}]},
    "tgate, guess mode": {"reuse": "tgate(0.4)", "controls": [{**A, "guess_mode": True}]},
    "both, window": {"reuse": "deepcache(3, steps=0.2..1)+tgate(0.5)", "controls": [{**A, "end": 0.6}, B]},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_images_are_those_of_the_eager_algorithm(engines, eager, case, backends):
    """The limit is parity's: the same arithmetic in another order, amplified over the steps.

    A random network hardly reads its prompt, so that T-GATE moves the latents by less than that: the error must also be a
    small part of what reuse changes.
    """
    request = Request(**{**COMMON, **CASES[case]})
    for engine in map(engines.__getitem__, backends):
        ours = engine.generate(request)
        assert {step.reuse for step in ours.plan.steps} > {""}
        theirs = eager().run(ours.plan, request, contexts(engine, request), pixels(request))
        whole = engine.generate(replace(request, reuse=""))
        changed = relative_error(whole.latents[0], theirs)
        assert relative_error(ours.latents[0], theirs) <= min(LIMITS["fp32"].trajectory, changed / 10)


@pytest.mark.slow
def test_reuse_with_a_lora(engines, eager, tiny_sd1, tmp_path, backends):
    """In the layers that a variant runs and in those that it does not; the reference has it merged by diffusers."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    states: list[Any] = []

    def merge(unet: Any) -> None:
        torch.manual_seed(9)
        targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_in", "conv_out"]
        network = get_peft_model(unet, LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))
        with torch.no_grad():
            for name, value in network.named_parameters():
                if "lora_" in name:
                    value.normal_().mul_(0.1)
        states.append(
            {k.replace("base_model.model.", "unet."): v for k, v in get_peft_model_state_dict(network).items()}
        )
        network.merge_and_unload()

    unet = eager(merge)
    save_file({key: value.contiguous() for key, value in states[0].items()}, tmp_path / "style.safetensors")
    request = Request(**{**COMMON, "reuse": "deepcache(2)+tgate(0.5)", "controls": [A], "adapters": {"style": 1.0}})
    for engine in map(engines.__getitem__, backends):
        engine.adapters.load("style", tmp_path / "style.safetensors")
        ours = engine.generate(request)
        theirs = unet.run(ours.plan, request, contexts(engine, request), pixels(request))
        assert relative_error(ours.latents[0], theirs) <= LIMITS["fp32"].trajectory
        assert relative_error(engine.generate(replace(request, adapters={})).latents[0], theirs) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("backend", REAL)
def test_batch_mates_do_not_change_an_image(engines, backend):
    """Within 1e-5: summation order may change with the number of rows."""
    common = {**COMMON, "width": 32, "height": 32}
    requests = [Request(**{**common, "seed": i, **options}) for i, options in enumerate(CASES.values())]
    requests += [replace(request, reuse="", seed=20 + i) for i, request in enumerate(requests[:3])]
    alone = [engines[backend].generate(request) for request in requests]
    together = engines[backend].generate(requests)
    for one, other in zip(alone, together, strict=True):
        assert relative_error(other.latents, one.latents) <= 1e-5, one.request


def test_rows_of_variants_are_counted_apart(engines):
    request = Request(**{**COMMON, "controls": [A], "reuse": "deepcache(3)+tgate(0.5)"})
    found = engines["onnxruntime"].generate(request).stats.rows
    found.pop("control/a/hint")  # 0 if another request had its hint encoded
    assert {name: count for name, count in found.items() if "unet" in name or name.startswith("control")} == {
        "unet": 2, "unet.deepcache": 8, "unet.tgate": 4, "control/a": 6, "control/a.deepcache": 8,
    }  # fmt: skip


def test_a_guider_that_spares_a_row_does_not_break_reuse(engines):
    for guider in ("zero_star", "adaptive(0.5)"):
        for reuse in ("deepcache(3)", "tgate(0.3)"):
            engines["onnxruntime"].generate(Request(**{**COMMON, "guider": guider, "reuse": reuse}))


def test_variants_hold_no_weights_and_only_what_they_run(tiny_sd1_control_bundle, tiny_sd1_bundle):
    import onnx

    bundle: Bundle = read(tiny_sd1_control_bundle)
    unet = bundle.components[UNET]
    data = [name for name in bundle.files if name.startswith("denoiser/") and name.endswith(".data")]
    assert data == ["denoiser/unet/model.onnx.data"]
    assert bundle.files[data[0]] == read(tiny_sd1_bundle).files[data[0]]  # as without control, reuse and banks
    nodes: dict[str, list[Any]] = {}
    for name, entry in bundle.components.items():
        if name.role != "denoiser":
            continue
        for graph in (entry.graph, *entry.derived.values()):
            model = onnx.load(bundle.file(graph), load_external_data=False)
            nodes.setdefault(name.variant, []).append({w for node in model.graph.node for w in node.input})
            assert {value.name for value in model.graph.input} == {tensor.name for tensor in entry.inputs}
            assert {value.name for value in model.graph.output} == {tensor.name for tensor in entry.outputs}
    for whole, deepcache, tgate in zip(*(nodes[variant] for variant in ("", "deepcache", "tgate")), strict=True):
        read_by = {"": whole, D: deepcache, T: tgate}
        cross = {
            v: {w for w in read if ".attn2." in w and w.endswith(("weight", "bias"))} for v, read in read_by.items()
        }
        deep = {v: {w for w in read if w.startswith(("unet.mid_block", "mid_block"))} for v, read in read_by.items()}
        assert cross[""]
        assert not cross[T]
        assert deep[""]
        assert deep[T]
        assert not deep[D]
        assert "encoder_hidden_states" not in tgate
    texts = {tensor.name for tensor in unet.outputs if tensor.name.startswith("text_")}
    assert texts
    assert {t.name for t in bundle.components[replace(UNET, variant="tgate")].inputs} >= texts
    (out,) = bundle.components[ComponentId("control_residuals", "a", "deepcache")].outputs
    assert out.name == "residual_0"


def test_a_bundle_without_variants_says_how_to_get_them(tiny_sd1_bundle):
    with (
        load(tiny_sd1_bundle, backend="onnxruntime") as engine,
        pytest.raises(RequestError, match="no variant 'deepcache'; export it with --reuse deepcache"),
    ):
        engine.submit(Request(prompt="", reuse="deepcache(2)"))


def test_adaptive_guidance_with_reuse_refuses_steps_of_guidance_0():
    card = fake_bundle().scheduler
    request = Request(prompt="", steps=4, guidance=[3, 3, 3, 0], guider="adaptive", reuse="deepcache(2)")
    with pytest.raises(RequestError, match="do not go with steps of guidance 0"):
        compile_plan(request, card)
