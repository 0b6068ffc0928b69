"""ControlNets in the engine against diffusers' pipelines, and what runs when: rows, steps, hints, failures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from stepforge import Engine, GenerationError, Request, RequestError, load
from stepforge.export.build import export_bundle
from stepforge.export.models.load import load as load_model
from stepforge.export.parity.loaders import source_pipeline
from stepforge.export.parity.measures import psnr, relative_error
from stepforge.export.parity.verify import LIMITS
from stepforge.runtime.backends import open_backend
from stepforge.runtime.bundle import ComponentId, read
from stepforge.runtime.request import Control

REAL = ("onnxruntime", *(pytest.param(name, marks=pytest.mark.long) for name in ("openvino", "torch")))
STEPS, GUIDANCE, SEED, PROMPT = 6, 4.0, 3, "a cat"
EVALUATIONS = STEPS + 1  # PNDM's


def picture(seed: int, width: int = 48, height: int = 80) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


HINTS = [picture(0), picture(1)]
A, B = {"name": "a", "image": HINTS[0]}, {"name": "b", "image": HINTS[1]}


def ask(*controls: Any, **options: Any) -> Request:
    common = {"prompt": PROMPT, "steps": STEPS, "guidance": GUIDANCE, "seed": SEED, "prompt_syntax": "plain"}
    return Request(**{**common, "controls": controls, **options})


def nets(folders: dict[str, Path], names: str) -> Any:
    from diffusers import ControlNetModel

    found = [ControlNetModel.from_pretrained(folders[name]) for name in names.split()]
    return found[0] if len(found) == 1 else found


def reference(pipeline: Any, controlnet: Any, images: Any, size: tuple[int, int] = (32, 32), **options: Any) -> Any:
    """Final latents and the 8-bit image of diffusers' ControlNet pipeline over the networks of a plain one."""
    from diffusers import (
        StableDiffusionControlNetPipeline,
        StableDiffusionXLControlNetPipeline,
        StableDiffusionXLPipeline,
    )

    parts = {**pipeline.components, "controlnet": controlnet}
    if isinstance(pipeline, StableDiffusionXLPipeline):
        made = StableDiffusionXLControlNetPipeline(**parts, add_watermarker=False)
    else:
        made = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    trajectory: list[Any] = []

    def note(_: Any, index: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        trajectory.append(values["latents"][0].numpy().copy())
        return {}

    output = made(
        PROMPT, image=images, width=size[0], height=size[1], num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(SEED), callback_on_step_end=note, output_type="np", **options,
    )  # fmt: skip
    return trajectory[-1], (output.images[0] * 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def pipeline(tiny_sd1: Path) -> Any:
    return source_pipeline(load_model(tiny_sd1))


@pytest.fixture(scope="module")
def xl_pipeline(tiny_sdxl: Path) -> Any:
    return source_pipeline(load_model(tiny_sdxl))


@pytest.fixture(scope="module")
def engines(request: pytest.FixtureRequest) -> Iterator[Callable[[str, str], Engine]]:
    opened: dict[tuple[str, str], Engine] = {}

    def engine(family: str, backend: str) -> Engine:
        if (family, backend) not in opened:
            bundle = request.getfixturevalue(f"tiny_{family}_control_bundle")
            opened[family, backend] = load(bundle, backend=backend, precision="fp32", max_rows=16)
        return opened[family, backend]

    yield engine
    for one in opened.values():
        one.close()


TWO = {"controlnet_conditioning_scale": [1.0, 1.0]}
# our controls, and what diffusers is given: networks, images and options
CASES: dict[str, tuple[list[Any], str, list[Any], dict[str, Any]]] = {
    "single": ([A], "a", HINTS[:1], {}),
    "two of unequal scale": (
        [{**A, "scale": 0.7}, {**B, "scale": 1.3}], "a b", HINTS, {"controlnet_conditioning_scale": [0.7, 1.3]},
    ),
    "window": (
        [{**A, "start": 0.2, "end": 0.7}], "a", HINTS[:1],
        {"control_guidance_start": 0.2, "control_guidance_end": 0.7},
    ),
    "guess mode": ([{**A, "guess_mode": True}], "a", HINTS[:1], {"guess_mode": True}),
    "two in windows, guess mode": (
        [{**A, "end": 0.6, "guess_mode": True}, {**B, "start": 0.3, "scale": 0.5, "guess_mode": True}], "a b", HINTS,
        {"controlnet_conditioning_scale": [1.0, 0.5], "control_guidance_start": [0.0, 0.3],
         "control_guidance_end": [0.6, 1.0], "guess_mode": True},
    ),
    "one net twice": ([A, {**A, "image": HINTS[1]}], "a a", HINTS, TWO),
}  # fmt: skip


def compare(ours: Any, theirs: Any) -> None:
    """The limits of export/parity/verify.py: the same arithmetic in another order, 1e-6 a network, amplified over the steps."""
    limits = LIMITS["fp32"]
    assert relative_error(ours.latents[0], theirs[0]) <= limits.trajectory
    assert psnr(np.asarray(ours.images[0]), theirs[1]) >= limits.psnr


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_parity_with_diffusers(engines, pipeline, tiny_sd1_controls, case, backends):
    controls, names, images, options = CASES[case]
    theirs = reference(pipeline, nets(tiny_sd1_controls, names), images if len(images) > 1 else images[0], **options)
    for backend in backends:
        compare(engines("sd1", backend).generate(ask(*controls)), theirs)
    plain = engines("sd1", backends[0]).generate(ask())
    assert psnr(np.asarray(plain.images[0]), theirs[1]) < 40  # else the comparison could not fail
    assert relative_error(plain.latents[0], theirs[0]) > 1e-2


@pytest.mark.slow
def test_parity_at_another_size(engines, pipeline, tiny_sd1_controls, backends):
    theirs = reference(pipeline, nets(tiny_sd1_controls, "a"), HINTS[0], size=(48, 24))
    for backend in backends:
        compare(engines("sd1", backend).generate(ask(A, width=48, height=24)), theirs)


@pytest.mark.slow
def test_parity_at_sides_that_no_level_divides(engines, pipeline, tiny_sd1_controls, tmp_path, monkeypatch, backends):
    """Latents of 17 x 23, as 1080 pixels are 135 latents, with a ControlNet and an adapter on layers that change the size."""
    layers = {
        name: pipeline.unet.get_submodule(name).weight
        for name in (
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
            "down_blocks.0.downsamplers.0.conv",
            "up_blocks.0.upsamplers.0.conv",
        )
    }
    torch.manual_seed(0)
    pairs = {}
    for name, weight in layers.items():
        pairs[name] = (
            0.3 * torch.randn(4, *weight.shape[1:]),
            0.3 * torch.randn(len(weight), 4, *[1] * (weight.ndim - 2)),
        )
    file = tmp_path / "change.safetensors"
    parts = {
        f"unet.{name}.lora_{ab}.weight": value
        for name, pair in pairs.items()
        for ab, value in zip("AB", pair, strict=True)
    }
    save_file(parts, file)
    # it wants multiples of 8 pixels, of which the tiny VAE makes multiples of 4 latents
    monkeypatch.setattr(diffusers.StableDiffusionControlNetPipeline, "check_inputs", lambda *args, **options: None)
    request = ask(A, width=46, height=34, adapters={"change": 0.5})
    plain = reference(pipeline, nets(tiny_sd1_controls, "a"), HINTS[0], size=(46, 34))
    saved = {name: weight.data.clone() for name, weight in layers.items()}
    try:
        for name, (down, up) in pairs.items():
            change = (up.flatten(1).double() @ down.flatten(1).double()).reshape(layers[name].shape)
            layers[name].data += 0.5 * change.float()
        theirs = reference(pipeline, nets(tiny_sd1_controls, "a"), HINTS[0], size=(46, 34))
    finally:
        for name, weight in layers.items():
            weight.data.copy_(saved[name])
    for backend in backends:
        engine = engines("sd1", backend)
        engine.adapters.load("change", file)
        compare(engine.generate(request), theirs)
    assert relative_error(plain[0], theirs[0]) > 1e-2


# "pooled": a ControlNet with global_pool_conditions is always in guess mode, but its residuals are not scaled by depth
XL_CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "single": (A, "a", {}),
    "window": (
        {**A, "start": 0.3, "end": 0.8, "scale": 0.8}, "a",
        {"control_guidance_start": 0.3, "control_guidance_end": 0.8, "controlnet_conditioning_scale": 0.8},
    ),
    "pooled, blue first": ({**A, "name": "pooled"}, "pooled", {}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("case", XL_CASES)
def test_parity_with_diffusers_xl(engines, xl_pipeline, tiny_sdxl_controls, case, backends):
    control, name, options = XL_CASES[case]
    theirs = reference(xl_pipeline, nets(tiny_sdxl_controls, name), HINTS[0], **options)
    for backend in backends:
        compare(engines("sdxl", backend).generate(ask(control)), theirs)
    assert relative_error(engines("sdxl", backends[0]).generate(ask()).latents[0], theirs[0]) > 1e-3


@pytest.fixture(scope="module")
def lora(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA of the UNet's attention, as diffusers saves it."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(9)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    network = get_peft_model(load_model(tiny_sd1).unet(torch.float32), config)
    state = {k.removeprefix("base_model.model."): 0.5 * v for k, v in get_peft_model_state_dict(network).items()}
    file = tmp_path_factory.mktemp("lora") / "style.safetensors"
    StableDiffusionPipeline.save_lora_weights(file.parent, unet_lora_layers=state, weight_name=file.name)
    return file


def styled(engine: Engine, lora: Path) -> Engine:
    if "style" not in engine.adapters.list():
        engine.adapters.load("style", lora)
    return engine


@pytest.mark.slow
def test_parity_with_a_lora_in_the_denoiser(engines, tiny_sd1, tiny_sd1_controls, lora, backends):
    adapted = source_pipeline(load_model(tiny_sd1))
    adapted.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name="style")
    adapted.set_adapters(["style"], [0.8])
    theirs = reference(adapted, nets(tiny_sd1_controls, "a"), HINTS[0])
    for backend in backends:
        compare(styled(engines("sd1", backend), lora).generate(ask(A, adapters={"style": 0.8})), theirs)
    assert relative_error(engines("sd1", backends[0]).generate(ask(A)).latents[0], theirs[0]) > 1e-3


class Recorder:
    """A backend that counts the rows of each call by component, and fails where told to."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.name, self.precision, self.versions = inner, inner.name, inner.precision, inner.versions
        self.calls: dict[str, list[int]] = {}
        self.poisoned, self.most = "", 0  # a component, and the rows of a call that it still bears

    def bank_dtype(self, component: ComponentId) -> Any:
        return self.inner.bank_dtype(component)

    def open(self, component: ComponentId, banks: Any = None) -> Any:
        graph, name = self.inner.open(component, banks), str(component)

        def run(inputs: Any) -> Any:
            first = next(name for name in ("sample", "image", "latents", "input_ids") if name in inputs)
            self.calls.setdefault(name, []).append(len(inputs[first]))
            if name == self.poisoned and self.calls[name][-1] > self.most:
                raise RuntimeError(f"first line\nno {name}")
            return graph(inputs)

        return run


@pytest.fixture(scope="module")
def recorded(tiny_sd1_control_bundle: Path) -> Iterator[tuple[Recorder, Engine]]:
    bundle = read(tiny_sd1_control_bundle)
    recorder = Recorder(open_backend("onnxruntime", bundle, precision="fp32"))
    with Engine(bundle, recorder, max_rows=16) as engine:
        yield recorder, engine


def test_hints_run_once_a_request_and_nets_only_in_their_windows(recorded):
    recorder, engine = recorded
    recorder.calls.clear()
    request = ask({**A, "end": 0.6}, {**B, "start": 0.3, "guess_mode": True}, {**B, "scale": 0.0}, images=3)
    result = engine.generate(request)
    rows = {name: sum(calls) for name, calls in recorder.calls.items()}
    within_a = sum((i + 1) / EVALUATIONS <= 0.6 for i in range(EVALUATIONS))
    within_b = sum(i / EVALUATIONS >= 0.3 for i in range(EVALUATIONS))
    assert (within_a, within_b) == (4, 4)
    assert rows["control/a/hint"] == rows["control/b/hint"] == 1
    assert rows["control/a/residuals"] == 3 * 2 * within_a
    assert rows["control/b/residuals"] == 3 * within_b  # conditional rows
    assert rows["denoiser/unet"] == 3 * 2 * EVALUATIONS
    stated = {**result.stats.rows}
    assert {f"control/{n}": stated[f"control/{n}"] for n in "ab"} == {
        "control/a": rows["control/a/residuals"], "control/b": rows["control/b/residuals"],
    }  # fmt: skip
    assert (stated["control/a/hint"], stated["control/b/hint"], stated["unet"]) == (1, 1, rows["denoiser/unet"])


def test_a_net_that_never_runs_costs_nothing(recorded):
    recorder, engine = recorded
    plain = engine.generate(ask())
    recorder.calls.clear()
    for control in ({**A, "scale": 0.0}, {**A, "sigma": (0.0, 1e-9)}, {**A, "scale": [0.0] * EVALUATIONS}):
        assert np.array_equal(engine.generate(ask(control)).latents, plain.latents)
    assert not any(name.startswith("control/") for name in recorder.calls)


def test_steps_before_the_window_are_the_plain_run_bit_for_bit(recorded):
    _, engine = recorded
    runs: list[list[Any]] = [[], []]
    engine.generate(ask(), on_step=lambda p: runs[0].append(p.latents()))
    engine.generate(ask({**A, "start": 0.5}), on_step=lambda p: runs[1].append(p.latents()))
    same = [np.array_equal(plain, controlled) for plain, controlled in zip(*runs, strict=True)]
    assert same == [True] * 4 + [False] * 3


def test_scales_by_step_are_windows_written_out(recorded):
    _, engine = recorded
    window = engine.generate(ask({**A, "start": 0.3, "end": 0.8, "scale": 0.5}))
    listed = engine.generate(ask({**A, "scale": [0, 0, 0, 0.5, 0.5, 0, 0]}))
    assert np.array_equal(window.latents, listed.latents)
    sigmas = [step.sigma for step in engine.plan(ask()).steps]
    low, high = sigmas[4], sigmas[2]
    assert [step.control for step in engine.plan(ask({**A, "sigma": [low, high]})).steps] == [
        (1.0,) if low < sigma <= high else (0.0,) for sigma in sigmas
    ]


def small(*controls: Any, **options: Any) -> Request:
    return ask(*controls, **{"steps": 4, "width": 32, "height": 32, **options})


MIXED = [
    small(A),
    small(B, seed=4, sampler="euler", steps=5),
    small(A, B, seed=5, guidance=1.0),
    small(A, {**A, "image": HINTS[1], "scale": 0.5}, seed=6),
    small(seed=7),
    small({**A, "guess_mode": True}, seed=8),
    small({**A, "start": 0.4}, {**B, "end": 0.5}, seed=9, adapters={"style": 0.8}),
    small(seed=10, adapters={"style": -0.5}),
    small({**B, "image": HINTS[0]}, seed=11, guidance=0.0, images=2),
    small(A, seed=12, width=48, height=24),
    small(A, seed=13, reuse="deepcache(2)"),
    small({**A, "guess_mode": True}, B, seed=14, reuse="tgate(0.5)", adapters={"style": 0.6}),
    small(seed=15, reuse="deepcache(3)+tgate(0.4)"),
]


@pytest.mark.slow
@pytest.mark.parametrize("backend", REAL)
def test_batch_mates_do_not_change_an_image(engines, lora, backend):
    """Within 1e-5: summation order may change with the number of rows."""
    engine = styled(engines("sd1", backend), lora)
    remembered = Counter({"text_encoder": 9, "control/a/hint": 9, "control/b/hint": 9})  # run for whoever asks first
    alone = [engine.generate(request) for request in MIXED]
    together = engine.generate(MIXED)
    for request, one, other in zip(MIXED, alone, together, strict=True):
        assert relative_error(other.latents, one.latents) <= 1e-5, request
        assert Counter(other.stats.rows) - remembered == Counter(one.stats.rows) - remembered


@pytest.mark.parametrize("part", ["hint", "residuals"])
def test_a_failing_net_fails_only_its_request(recorded, part):
    recorder, engine = recorded
    good = [ask(), ask({**A, "end": 0.5}, seed=4)]
    alone = [engine.generate(request) for request in good]
    recorder.poisoned = f"control/b/{part}"
    try:
        bad = engine.submit(ask({**B, "image": HINTS[1].rotate(90)}, A))  # an image that no request had before
        together = engine.generate(good)
        with pytest.raises(GenerationError, match=f"RuntimeError: no control/b/{part}") as caught:
            bad.result()
    finally:
        recorder.poisoned = ""
    assert "\n" not in str(caught.value)
    for one, other in zip(alone, together, strict=True):
        assert relative_error(other.latents, one.latents) <= 1e-5
        assert other.stats.rows["unet"] == one.stats.rows["unet"]
        assert other.stats.rows.get("control/a") == one.stats.rows.get("control/a")


def test_rows_of_a_call_that_failed_are_not_counted(recorded):
    """The denoiser fails on shared calls, so that each slot runs alone; its ControlNet is counted once a step."""
    recorder, engine = recorded
    recorder.poisoned, recorder.most = "denoiser/unet", 2
    try:
        result = engine.generate(ask(A, images=3))
    finally:
        recorder.poisoned, recorder.most = "", 0
    assert result.stats.rows["control/a"] == result.stats.rows["unet"] == 3 * 2 * EVALUATIONS


ARRAY = np.zeros((64, 64, 3), np.uint8)
BAD: dict[str, tuple[Any, str]] = {
    "unknown name": ({**A, "name": "c"}, "the bundle has no ControlNet 'c'; it has a, b"),
    "scale": ({**A, "scale": 11}, "the scale of ControlNet 'a' is 11; give a number up to"),
    "scale is nothing": ({**A, "scale": None}, "the scale of ControlNet 'a' is None; give a number"),
    "scale is text": ({**A, "scale": "much"}, "the scale of ControlNet 'a'"),
    "no scales": ({**A, "scale": []}, "the scale of ControlNet 'a'"),
    "too few scales": ({**A, "scale": [1.0, 0.5]}, f"ControlNet 'a' has 2 scales for {EVALUATIONS} network"),
    "window": ({**A, "start": 0.7, "end": 0.2}, "runs from 0.7 to 0.2; give 0 <= start < end <= 1"),
    "window outside": ({**A, "end": 1.5}, "runs from 0.0 to 1.5"),
    "sigmas": ({**A, "sigma": [5.0, 1.0]}, "give two, the lower first"),
    "one sigma": ({**A, "sigma": 5.0}, "give two, the lower first"),
    "guess mode": ({**A, "guess_mode": "yes"}, "give true or false"),
    "name": ({**A, "name": 3}, "the name of a ControlNet must be text, not int"),
    "unknown key": ({**A, "image": ARRAY, "strength": 1.0}, "a control has no 'strength'; give name and image, and"),
    "no image": ({"name": "a"}, "give name and image"),
    "no mapping": ("a", "give name and image"),
    "missing file": ({**A, "image": "nowhere.png"}, "nowhere.png"),
    "no picture": ({**A, "image": b"not a picture"}, "PNG, JPEG or WebP"),
    "preprocessor": ({**A, "preprocessor": "magic"}, "magic"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refusals(recorded, case):
    _, engine = recorded
    control, message = BAD[case]
    with pytest.raises(RequestError) as caught:
        engine.submit(ask(control))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bundle_without_controlnets_says_how_to_get_them(tiny_sd1_bundle):
    with (
        load(tiny_sd1_bundle, backend="onnxruntime") as engine,
        pytest.raises(RequestError, match="it was exported without any"),
    ):
        engine.submit(ask(A))


def test_controls_are_values():
    assert Control(name="a", image=ARRAY, scale=[1, 0.5]).scale == (1, 0.5)
    assert ask(A).controls == ask(Control(**A)).controls


@pytest.mark.parametrize(("name", "message"), [("a.b", "'a.b' is not allowed"), ("", "'' is not allowed")])
def test_names_that_would_not_be_components_are_refused(tiny_sd1, tiny_sd1_controls, tmp_path, name, message):
    from stepforge import CheckpointError

    with pytest.raises(CheckpointError, match=message):
        export_bundle(tiny_sd1, tmp_path / "out", controls={name: tiny_sd1_controls["a"]})
