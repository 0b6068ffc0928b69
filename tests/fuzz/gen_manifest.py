"""bundle.json with strange values: `read`, and what `info`, `plan` and `doctor` make of what is accepted."""

import io
import json
import random
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from mutate import json_text, mutated, nudged

from stepforge.runtime.backends.fake import fake_bundle
from stepforge.runtime.bundle import (
    MANIFEST,
    TEXT_ENCODERS,
    UNET,
    VAE_DECODER,
    Bank,
    Bundle,
    Component,
    ComponentId,
    ControlCard,
    Module,
    Preset,
    StageCard,
    Tensor,
    read,
    sha256,
    write_manifest,
)
from stepforge.runtime.cli.info import info
from stepforge.runtime.errors import BundleError, RequestError
from stepforge.runtime.plan.compile import check_variants, compile_plan, describe
from stepforge.runtime.request import Request
from stepforge.runtime.request.presets import resolve

ERRORS = (BundleError, RequestError)
QUICK, SOAK = 150, 6000

IMAGE = ("rows", 4, "height", "width")


def floats(**shapes: tuple[int | str, ...]) -> tuple[Tensor, ...]:
    return tuple(Tensor(name, "float32", shape) for name, shape in shapes.items())


def full_bundle(folder: Path) -> Bundle:
    """A bundle with everything that a manifest can have; its graphs are no graphs."""
    fake = fake_bundle(64)
    read_by = floats(sample=IMAGE, timestep=("rows",), encoder_hidden_states=("rows", "tokens", 16))
    residual = floats(residual_0=("residual_0_rows", 32, "residual_0_height", "residual_0_width"))
    rows = (Tensor("adapter", "int64", ("rows",)), *floats(adapter_strength=("rows", 1, 1)))
    banks = floats(**{"to_q.lora_A": (3, 16, 8), "to_q.lora_B": (3, 4, 16), "to_k.lora_B": (3, 4, 16)})
    modules = tuple(Module(path, "linear", (16, 16), False) for path in ("to_q", "to_k"))
    graph = "denoiser/unet/model.onnx"
    denoiser = Component(
        graph, (*read_by, *residual, *rows, *banks), floats(prediction=IMAGE, deep=("rows", 32, "deep_2", "deep_3")),
        {"onnxruntime": "denoiser/unet/derived.onnx"}, modules, Bank(3, 4, {"to_q": ("to_q", "to_k")}),
    )  # fmt: skip
    deep = Component(graph, (*read_by, *floats(deep=("rows", 32, "deep_2", "deep_3"))), floats(prediction=IMAGE))
    components = {
        TEXT_ENCODERS[0]: Component(
            "text_encoder/model.onnx",
            (Tensor("input_ids", "int64", ("rows", 77)),),
            floats(hidden_states=("rows", 77, 16)),
        ),
        UNET: denoiser,
        replace(UNET, variant="deepcache"): deep,
        ComponentId("control_hint", "edge"): Component(
            "control/edge/hint/model.onnx",
            floats(image=("rows", 3, "height", "width")),
            floats(hint=("rows", 8, "height/8", "width/8")),
        ),
        ComponentId("control_residuals", "edge"): Component(
            "control/edge/residuals/model.onnx",
            (*read_by, *floats(hint=("rows", 8, "height", "width"), scale=("rows", 1))),
            floats(residual_0=("rows", 32, "height/1", "width/1")),
        ),
        VAE_DECODER: Component(
            "vae_decoder/model.onnx", floats(latents=IMAGE), floats(pixels=("rows", 3, "8*height", "8*width"))
        ),
    }
    components[ComponentId("upscaler", "upscaler", stage="double")] = Component(
        "sr/double/upscaler/model.onnx",
        floats(image=("rows", 3, "height", "width")),
        floats(pixels=("rows", 3, "2*height", "2*width")),
    )
    beside = (
        *floats(sample=("rows", 7, "height", "width"), timestep=("rows",)),
        Tensor("class_labels", "int64", ("rows",)),
    )
    read_by_x4 = (*beside, *floats(encoder_hidden_states=("rows", "tokens", 16)))
    components[replace(UNET, stage="x4")] = Component(
        "sr/x4/denoiser/unet/model.onnx", read_by_x4, floats(prediction=IMAGE)
    )
    components[replace(VAE_DECODER, stage="x4")] = Component(
        "sr/x4/vae_decoder/model.onnx", floats(latents=IMAGE), floats(pixels=("rows", 3, "4*height", "4*width"))
    )
    encoder = replace(fake.card.text_encoders[0], tokenizer="tokenizer/tokenizer.json")
    names = [
        graph for entry in components.values() for graph in (entry.graph, *entry.derived.values())
    ] + [encoder.tokenizer]  # fmt: skip
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    x4 = fake.stages["x4"]
    assert x4.model is not None
    x4 = replace(x4, model=replace(x4.model, text_encoders=(encoder,)))
    bundle = replace(
        fake,
        path=folder,
        card=replace(fake.card, text_encoders=(encoder,)),
        components=components,
        files={name: ((folder / name).stat().st_size, sha256(folder / name)) for name in sorted(set(names))},
        controls={"edge": ControlCard()},
        stages={"double": StageCard("network", 2), "x4": x4},
        source={"kind": "test", "sha256": "0" * 64, "assumed": ["x"], "controls": {"edge": {"kind": "diffusers"}}},
        versions={"torch": "2"},
        verdict={"passed": True, "summary": "all", "steps": 20, "checks": [{"value": 1e-6}]},
        presets={"fast": Preset(guidance=(3.0, 2.0, 1.0), reuse="deepcache(2)", control_end=0.5, found={"rows": 3})},
    )
    write_manifest(bundle)
    return bundle


def start(folder: Path) -> tuple[Path, Any]:
    bundle = full_bundle(folder)
    return folder, json.loads((bundle.path / MANIFEST).read_text())


def case(rng: random.Random, base: tuple[Path, Any]) -> bytes:
    _, manifest = base
    if rng.random() < 0.5:
        return json.dumps(nudged(manifest, rng)).encode()
    return json_text(mutated(manifest, rng), rng)


def check(case: bytes, base: tuple[Path, Any]) -> None:
    folder, _ = base
    (folder / MANIFEST).write_bytes(case)
    bundle = read(folder)
    write_manifest(bundle)
    again = read(folder)
    assert again == bundle, "what was read is not what is written"
    assert again.digest == bundle.digest
    with redirect_stdout(io.StringIO()) as printed:
        info(folder)
        info(folder, as_json=True)
    assert all(c.isprintable() or c == "\n" for c in printed.getvalue()), "control characters reach the terminal"
    errors = []
    for preset in ("", *bundle.presets):
        try:
            request = resolve(Request(prompt="", steps=3, preset=preset), bundle)
            plan = compile_plan(request, bundle.scheduler)
            check_variants(plan, bundle)
            describe(plan)
            size = bundle.card.size(None, None)
            assert np.isfinite([[step.t, step.scale_in, *step.keep, *step.gain] for step in plan.steps]).all()
            assert all(bundle.card.latent_shape(size)), "a latent without elements"
        except RequestError as error:
            errors.append(error)
    if errors:
        raise errors[0]
