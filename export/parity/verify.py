"""Proof that a bundle equals its source: the same prompts and noise through diffusers' pipeline and through the engine.

    component    each network on the same inputs, relative L2 error of its outputs (ControlNets: parity_control.py)
    step         the latents after the first step
    trajectory   the latents after every step, the worst one
    image        PSNR of the 8-bit image; finite, and not one flat colour unless the reference is

Errors are ‖ours − reference‖ / ‖reference‖. Limits are per precision and stated in LIMITS with their reasons. `spread` is
the reference against itself with one thread, which sums in another order: no engine can be held to less than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CLIPTokenizer

from stepforge.export.lora.merge import read_all, with_adapters
from stepforge.export.models.source import Source, load
from stepforge.export.parity import control as parity_control
from stepforge.runtime.backends import AUTO, Arrays, Backend, Graph, open_backend
from stepforge.runtime.bundle import UNET, VAE_DECODER, Bundle, ComponentId, read, update
from stepforge.runtime.engine import Engine
from stepforge.runtime.engine.adapters import no_adapter
from stepforge.runtime.engine.controls import no_residuals
from stepforge.runtime.errors import BackendError, CheckpointError
from stepforge.runtime.request import Control, Progress, Request

Array = NDArray[np.float32]
PROMPTS = ("a photograph of a cat sitting on a wooden table", "an oil painting of a red house by the sea")
MAX_PSNR = 120.0  # stands for identical images


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest errors, and the smallest PSNR in dB, that count as parity."""

    component: float
    step: float
    trajectory: float
    psnr: float
    reason: str


LIMITS = {
    "fp32": Limits(
        1e-4, 1e-4, 1e-4, 60.0, "same arithmetic, other summation order: 1e-6 a network, amplified over the steps"
    ),
    "fp16": Limits(
        1e-2, 1e-2, 5e-2, 30.0, "weights and activations rounded to 11 bits: 5e-4 an operation, over some 1,000 of them"
    ),
    "bf16": Limits(
        5e-2, 5e-2, 1e-1, 30.0, "activations rounded to 8 bits: 4e-3 an operation; the image is the same to the eye"
    ),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison. `value` is an error, or for images a PSNR in dB, which must not fall below its limit."""

    backend: str
    precision: str
    level: str
    name: str
    value: float
    limit: float
    passed: bool


@dataclass(frozen=True, slots=True)
class Reference:
    """What diffusers' pipeline did with one prompt."""

    latents: list[Array]  # after every network evaluation, [C, h, w]
    image: NDArray[np.uint8]


def verify(
    bundle_path: str | Path,
    model_path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    controls: Mapping[str, str | Path] | None = None,
    backends: Sequence[str] = (),
    precisions: Sequence[str] = (),
    prompts: Sequence[str] = PROMPTS,
    steps: int = 20,
    guidance: float = 7.5,
    seed: int = 0,
    progress: Callable[[str], None] = lambda stage: None,
    store: bool = True,
) -> dict[str, Any]:
    """Run every check and return the verdict, which is also stored in the bundle.

    loras: what the bundle has merged; the reference gets them merged too. controls: the bundle's ControlNets, each of which
    draws the first prompt with a drawn hint, as `parity_control` says. backends, precisions: all that this machine can
    run unless given. Raises BundleError, CheckpointError, AdapterError, BackendError.
    """
    bundle = read(bundle_path)
    source = load(model_path, tokenizer=tokenizer, prediction_type=prediction_type)
    source = with_adapters(source, read_all(source, loras))
    if bundle.source.get("sha256") != source.provenance.get("sha256"):
        raise CheckpointError(f"{bundle_path} was exported from other weights than {model_path}")
    if (merged := bundle.source.get("adapters", [])) != source.provenance.get("adapters", []):
        needed = " ".join(f"--lora {one['file']}:{one['strength']:g}" for one in merged) or "no --lora"
        raise CheckpointError(f"{bundle_path} was exported with other adapters; verify it with {needed}")
    nets = parity_control.sources(bundle, source, controls or {})
    configurations = list(_configurations(bundle, backends, precisions))
    progress("reference: loading")
    pipeline = reference_pipeline(source)
    references = []
    for prompt in prompts:
        progress(f"reference: {prompt!r}")
        references.append(run_reference(pipeline, prompt, bundle, steps, guidance, seed))
    progress("reference: spread")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    again = run_reference(pipeline, prompts[0], bundle, steps, guidance, seed)
    torch.set_num_threads(threads)
    hint = parity_control.drawn_hint(bundle)
    shown: dict[str, Reference] = {}
    for net in nets:
        progress(f"reference: ControlNet {net.name}")
        controlled = parity_control.pipeline_with(pipeline, net)
        shown[net.name] = run_reference(controlled, prompts[0], bundle, steps, guidance, seed, image=hint)
    checks: list[Check] = []
    for backend, precision in configurations:
        progress(f"{backend} {precision}")
        opened = _OpenOnce(open_backend(backend, bundle, precision=precision))
        limits = LIMITS[bundle.precision if precision == "fp32" else precision]
        with Engine(bundle, opened) as engine:
            values = list(component_errors(bundle, pipeline, opened, references[0], prompts[0], steps, engine))
            for net in nets:
                values += parity_control.component_errors(bundle, net, opened, references[0], steps, engine, hint)
            for name, value in values:
                passed = value <= limits.component
                checks.append(Check(backend, precision, "component", name, value, limits.component, passed))
            options: dict[str, Any] = {"steps": steps, "guidance": guidance, "seed": seed, "prompt_syntax": "plain"}
            for prompt, reference in zip(prompts, references, strict=True):
                checks += _check(engine, Request(prompt=prompt, **options), reference, prompt, limits)
            for name, reference in shown.items():
                request = Request(prompt=prompts[0], controls=(Control(name=name, image=hint),), **options)
                checks += _check(engine, request, reference, f"with ControlNet {name}", limits)
    verdict = _verdict(checks, references[0], again, prompts, steps, guidance, seed)
    if store:
        update(bundle, lambda now: replace(now, verdict=verdict))
    return verdict


def _configurations(bundle: Bundle, backends: Sequence[str], precisions: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What to check: all that was asked for, or all that this machine can run."""
    found = False
    for backend in backends or AUTO:
        for precision in precisions or ("fp32", "bf16"):
            try:
                open_backend(backend, bundle, precision=precision)
            except BackendError:
                if backends and precisions:
                    raise
                continue
            found = True
            yield backend, precision
    if not found:
        raise BackendError("none of the asked backends and precisions can run here; see `stepforge doctor`")


def reference_pipeline(source: Source) -> Any:
    """diffusers' own pipeline in fp32, from the source's networks."""
    tokenizers = [CLIPTokenizer.from_pretrained(folder, local_files_only=True) for folder in source.tokenizers]
    encoders = [loader(torch.float32) for loader in source.text_encoders]
    config = dict(source.scheduler)
    parts = {
        "unet": source.unet(torch.float32),
        "vae": source.vae(torch.float32),
        "scheduler": getattr(diffusers, config["_class_name"]).from_config(config),
        "text_encoder": encoders[0],
        "tokenizer": tokenizers[0],
    }
    if source.family == "sdxl":
        pipeline = diffusers.StableDiffusionXLPipeline(
            **parts,
            text_encoder_2=encoders[1],
            tokenizer_2=tokenizers[1],
            force_zeros_for_empty_prompt=source.force_zeros_for_empty_prompt,
            add_watermarker=False,
        )
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_reference(
    pipeline: Any, prompt: str, bundle: Bundle, steps: int, guidance: float, seed: int, **more: Any
) -> Reference:
    """One image of the reference, with the latents after every step."""
    trajectory: list[Array] = []

    def note(_: Any, index: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        trajectory.append(values["latents"][0].float().numpy().copy())
        return {}

    output = pipeline(
        prompt,
        width=bundle.card.width,
        height=bundle.card.height,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=note,
        output_type="np",
        **more,
    )
    return Reference(trajectory, (output.images[0] * 255).round().astype(np.uint8))


class _OpenOnce:
    """A backend that keeps what it opened, so that the engine and the component checks share one copy."""

    def __init__(self, inner: Backend) -> None:
        self.name, self.precision, self.versions = inner.name, inner.precision, inner.versions
        self._inner = inner
        self._graphs: dict[ComponentId, Graph] = {}

    def bank_dtype(self, component: ComponentId) -> Any:
        return self._inner.bank_dtype(component)

    def open(self, component: ComponentId, banks: Arrays | None = None) -> Graph:
        if component not in self._graphs:
            self._graphs[component] = self._inner.open(component, banks)
        return self._graphs[component]


def _check(engine: Engine, request: Request, reference: Reference, name: str, limits: Limits) -> Iterator[Check]:
    """A request's latents and image against the reference's."""
    backend, precision = engine.backend.name, engine.backend.precision
    ours: list[Array] = []

    def note(progress: Progress) -> None:
        ours.append(progress.latents())

    image = np.asarray(engine.generate(request, on_step=note).images[0])
    if len(ours) != len(reference.latents):
        raise CheckpointError(f"the reference ran {len(reference.latents)} evaluations, the plan {len(ours)}")
    errors = [relative_error(a, b) for a, b in zip(ours, reference.latents, strict=True)]
    yield Check(backend, precision, "step", name, errors[0], limits.step, errors[0] <= limits.step)
    yield Check(
        backend, precision, "trajectory", name, max(errors), limits.trajectory, max(errors) <= limits.trajectory
    )
    quality = psnr(image, reference.image)
    flat = np.ptp(image) == 0 and np.ptp(reference.image) > 0
    yield Check(backend, precision, "image", name, quality, limits.psnr, quality >= limits.psnr and not flat)


@torch.no_grad()
def component_errors(
    bundle: Bundle, pipeline: Any, backend: Backend, reference: Reference, prompt: str, steps: int, engine: Engine
) -> Iterator[tuple[str, float]]:
    """Each network on the same inputs: text encoders on the prompt, denoiser along the trajectory, decoder at its end."""
    networks = [(pipeline.text_encoder, pipeline.tokenizer)]
    if bundle.card.family == "sdxl":
        networks.append((pipeline.text_encoder_2, pipeline.tokenizer_2))
    contexts, pooled = [], None
    for key, (network, tokenizer) in zip(bundle.text_encoders, networks, strict=True):
        ids = tokenizer(
            ["", prompt], padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        ).input_ids  # fmt: skip
        expected = network(ids, output_hidden_states=True)
        hidden = expected.hidden_states[-2] if bundle.card.family == "sdxl" else expected[0]
        outputs = backend.open(key)({"input_ids": ids.numpy(), **_no_adapter(bundle, key)})
        yield key.label, relative_error(outputs["hidden_states"], hidden.numpy())
        if "pooled" in outputs:
            pooled = expected[0]
            yield f"{key.label} pooled", relative_error(outputs["pooled"], pooled.numpy())
        contexts.append(hidden)
    context = torch.cat(contexts, dim=-1)
    plan = engine.plan(Request(prompt="", steps=steps))
    denoiser = backend.open(UNET)
    for index in sorted({0, len(plan.steps) // 2, len(plan.steps) - 1}):
        step = plan.steps[index]
        latents = reference.latents[index - 1] if index else reference.latents[0]
        sample = torch.from_numpy(np.stack([latents, latents]) * np.float32(step.scale_in))
        timestep = torch.full((2,), step.t)
        inputs = {
            "sample": sample.numpy(), "timestep": timestep.numpy(), "encoder_hidden_states": context.numpy(),
            **_no_adapter(bundle, UNET), **no_residuals(bundle.components[UNET]),
        }  # fmt: skip
        conditions = {}
        if pooled is not None:
            size = [bundle.card.height, bundle.card.width]
            conditions = {"text_embeds": pooled, "time_ids": torch.tensor([[*size, 0.0, 0.0, *size]] * 2)}
            inputs |= {name: value.numpy() for name, value in conditions.items()}
        expected = pipeline.unet(sample, timestep, context, added_cond_kwargs=conditions or None).sample
        yield f"denoiser t={step.t:g}", relative_error(denoiser(inputs)["prediction"], expected.numpy())
    latents = reference.latents[-1][None]
    expected = pipeline.vae.decode(torch.from_numpy(latents) / pipeline.vae.config.scaling_factor).sample
    yield VAE_DECODER.label, relative_error(backend.open(VAE_DECODER)({"latents": latents})["pixels"], expected.numpy())


def _no_adapter(bundle: Bundle, component: ComponentId) -> Arrays:
    return no_adapter(2) if bundle.components[component].bank is not None else {}


def relative_error(ours: NDArray[Any], reference: NDArray[Any]) -> float:
    """‖ours − reference‖ / ‖reference‖, in double precision; infinite if ours is not finite."""
    a, b = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    value = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-12))
    return value if math.isfinite(value) else math.inf


def psnr(ours: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """Peak signal to noise ratio of 8-bit images, in dB; MAX_PSNR if they are identical."""
    mse = float(np.mean((ours.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return MAX_PSNR if mse == 0 else min(MAX_PSNR, 10 * math.log10(255**2 / mse))


def _verdict(
    checks: Sequence[Check],
    reference: Reference,
    again: Reference,
    prompts: Sequence[str],
    steps: int,
    guidance: float,
    seed: int,
) -> dict[str, Any]:
    spread = max(relative_error(a, b) for a, b in zip(again.latents, reference.latents, strict=True))
    runs = sorted({(check.backend, check.precision) for check in checks})
    parts = []
    for backend, precision in runs:
        own = [check for check in checks if (check.backend, check.precision) == (backend, precision)]
        worst = min(check.value for check in own if check.level == "image")
        parts.append(f"{backend} {precision} {'passed' if all(c.passed for c in own) else 'FAILED'}, {worst:.1f} dB")
    libraries = ("diffusers", "torch", "transformers", "openvino", "onnxruntime")
    return {
        "passed": all(check.passed for check in checks),
        "summary": "; ".join(parts),
        "prompts": list(prompts),
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "spread": {"trajectory": spread, "psnr": psnr(again.image, reference.image)},
        "limits": {name: asdict(limits) for name, limits in LIMITS.items()},
        "checks": [{**asdict(check), "value": _plain(check.value)} for check in checks],
        "versions": {name: version(name) for name in libraries},
    }


def _plain(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else "inf"
