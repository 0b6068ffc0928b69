"""Proof that a bundle equals its model: the same prompts and noise through diffusers' pipeline and through the engine.

The reference is a second opinion: diffusers' own loaders read the model's files (loaders.py). What they do not say, and
stepforge's reading has to, stands in the verdict as assumed.

    setting      image size: 0, or infinite where the model's own is another
    component    each network on what diffusers' pipeline fed it, relative L2 error of its outputs (components.py)
    step         latents after the first step
    trajectory   latents after every step, the worst one
    image        PSNR of the 8-bit image; finite, and not one flat colour unless the reference is

Each super-resolution stage is compared on a drawn picture in the same way (stages.py).

Errors are ‖ours − reference‖ / ‖reference‖. Limits are per precision and stated in LIMITS with their reasons. `spread` is
the reference against itself with one thread, which sums in another order: no engine can be held to less than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from stepforge.export.build import release
from stepforge.export.lora.merge import read_all, with_adapters
from stepforge.export.models.load import load
from stepforge.export.models.source import Source
from stepforge.export.parity.adapters import merge_adapters
from stepforge.export.parity.components import component_errors
from stepforge.export.parity.control import exported_controls
from stepforge.export.parity.experts import ExpertReference, check_experts, run_experts
from stepforge.export.parity.loaders import load_pipeline
from stepforge.export.parity.measures import psnr, relative_error
from stepforge.export.parity.pixel import run_base, text_modules
from stepforge.export.parity.reference import Reference, References, Settings, inversion_prompts, run_references
from stepforge.export.parity.stages import StageReference, check_stages, run_stages
from stepforge.export.parity.staging import assumed_tokenizer
from stepforge.runtime.arrays import Float32
from stepforge.runtime.backends import Arrays, Backend, Graph, open_backend, runnable
from stepforge.runtime.bundle import INT8, Bundle, ComponentId, Size, read, update
from stepforge.runtime.engine import Engine
from stepforge.runtime.errors import BackendError, CheckpointError
from stepforge.runtime.request import Control, Progress, Request

PROMPTS = ("a photograph of a cat sitting on a wooden table", "an oil painting of a red house by the sea")
LIBRARIES = (  # whose versions a verdict names
    "diffusers", "torch", "transformers", "openvino", "onnxruntime", "onnxruntime-gpu",
)  # fmt: skip


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
    INT8: Limits(
        6e-2,
        6e-2,
        3e-1,
        20.0,
        "activations rounded to 8 bits of one range for all steps; judged by what is drawn, see docs",
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


def verify(
    bundle_path: str | Path,
    model_path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
    config: str | Path | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    controls: Mapping[str, str | Path] | None = None,
    upscalers: Mapping[str, str | Path] | None = None,
    experts: Mapping[str, str | Path] | None = None,
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

    tokenizer, prediction_type: as for the export. config: a diffusers folder whose configs hold for a single file of another
    geometry than the published models'. loras: what the bundle has merged; the reference gets them merged too. controls: the
    bundle's ControlNets, each of which draws the first prompt with a drawn hint. upscalers: the
    models of its super-resolution stages, each of which enlarges a drawn picture. experts: the
    models of its experts, which draw the first prompt as the bundle switches between them. backends, precisions: all
    that this machine can run unless given. Raises RequestError, BundleError, CheckpointError, AdapterError, BackendError.
    """
    for prompt in prompts:
        Request(prompt=prompt, steps=steps, guidance=guidance, seed=seed)
    bundle, model = read(bundle_path), Path(model_path)
    if config is not None and model.is_dir():
        raise CheckpointError(f"{model} is a folder and has configs of its own; give a config for a single file")
    source = load(model, tokenizer=tokenizer, prediction_type=prediction_type)
    merged = read_all(source, loras)
    check_origin(bundle, with_adapters(source, merged))
    places = {name: Path(path) for name, path in (controls or {}).items()}
    nets = exported_controls(bundle, source, places)
    others = {name: Path(path) for name, path in (experts or {}).items()}
    enlarged = {name: Path(path) for name, path in (upscalers or {}).items()}
    check_stages(bundle, enlarged)
    check_experts(bundle, others)
    runs = _configurations(bundle, backends, precisions)

    progress("reference: loading")
    loaded = load_pipeline(
        model,
        source,
        tokenizer=None if tokenizer is None else Path(tokenizer),
        prediction_type=prediction_type,
        config=None if config is None else Path(config),
    )
    loaded = loaded.assuming(*merge_adapters(loaded.pipeline, loras, merged))
    for stage, path in enlarged.items():
        loaded = loaded.assuming(*(f"stage {stage}: {line}" for line in assumed_tokenizer(path / "tokenizer")))
    settings = Settings((*prompts, *inversion_prompts(loaded.pipeline, prompts)), steps, guidance, seed)
    if source.family == "if":
        known = run_base(loaded, bundle, settings, progress)
    else:
        known = run_references(loaded, [(net, places[net.name]) for net in nets], bundle, settings, progress)
    switched = run_experts(bundle, loaded.pipeline, with_adapters(source, merged), others, settings, progress)
    text = text_modules(loaded.pipeline) if source.family == "if" else {}
    del loaded
    staged = run_stages(bundle, text, enlarged, settings, progress)
    release()  # SDXL's pipeline and an engine of it do not fit 24 GB together
    checks: list[Check] = []
    for backend, precision in runs:
        progress(f"{backend} {precision}")
        checks += compare(bundle, open_backend(backend, bundle, precision=precision), known, settings, staged, switched)
    verdict = _verdict(checks, known, settings)
    if store:
        update(bundle, lambda now: replace(now, verdict=verdict))
    return verdict


def check_origin(bundle: Bundle, source: Source) -> None:
    """Raises CheckpointError unless the bundle was exported from just these weights and merged adapters."""
    if bundle.source.get("sha256") != source.provenance.get("sha256"):
        raise CheckpointError(f"{bundle.path} was exported from other weights than those of {source.name}")
    if (merged := bundle.source.get("adapters", [])) != source.provenance.get("adapters", []):
        needed = " ".join(f"--lora {one['file']}:{one['strength']:g}" for one in merged) or "no --lora"
        raise CheckpointError(f"{bundle.path} was exported with other adapters; verify it with {needed}")


def _configurations(bundle: Bundle, backends: Sequence[str], precisions: Sequence[str]) -> list[tuple[str, str]]:
    """Backends and precisions to check: all that were asked for, or all that this machine can run.

    Raises BackendError for a backend or precision that was asked for and runs here in no combination.
    """
    quantised = (INT8,) * any(entry.has_int8 for entry in bundle.components.values())
    refused: dict[str, BackendError] = {}
    found: list[tuple[str, str]] = []
    for backend in backends or runnable():
        for precision in precisions or ("fp32", "bf16", *quantised):
            try:
                open_backend(backend, bundle, precision=precision)
            except BackendError as error:
                if backends and precisions:
                    raise
                refused |= {backend: error, precision: error}
                continue
            found.append((backend, precision))
    runs = {name for pair in found for name in pair}
    for asked in (*backends, *precisions):
        if asked not in runs:
            raise refused[asked]
    if not found:
        raise BackendError("no backend can run here; see `stepforge doctor`")
    return found


def compare(
    bundle: Bundle,
    backend: Backend,
    references: References,
    settings: Settings,
    stages: Mapping[str, StageReference] | None = None,
    experts: ExpertReference | None = None,
) -> Iterator[Check]:
    """One backend and precision against the references."""
    stages = stages or {}
    opened = _OpenOnce(backend)
    limits = LIMITS[bundle.precision if backend.precision == "fp32" else backend.precision]
    with Engine(bundle, opened) as engine:
        if (size := references.size) is not None:
            ours = Size(bundle.card.width, bundle.card.height)
            name = f"image size {ours.width}x{ours.height}, diffusers {size.width}x{size.height}"
            yield _limited(backend, "setting", name, 0.0 if ours == size else math.inf, 0.0)
        calls = [*references.calls, *(call for stage in stages.values() for call in stage.calls)]
        calls += experts.calls if experts is not None else []
        for name, error in component_errors(bundle, calls, opened):
            yield _limited(backend, "component", name, error, limits.component)
        for request, reference, name in _requests(references, settings):
            yield from _trajectory(engine, request, reference, name, limits)
        if experts is not None:
            yield from _trajectory(
                engine, experts.request, experts.reference, f"experts {experts.request.experts}", limits
            )
        for name, stage in stages.items():
            yield from _trajectory(engine, stage.request, stage.reference, f"stage {name}", limits)


def _requests(references: References, settings: Settings) -> Iterator[tuple[Request, Reference, str]]:
    """Requests of the engine, each with diffusers' run of the same and the name of the check."""
    options: dict[str, Any] = {"steps": settings.steps, "guidance": settings.guidance, "seed": settings.seed}
    options |= {"experts": "base"}  # alone
    options |= {"prompt_syntax": "plain", "init": references.init}
    for prompt, reference in references.plain.items():
        yield Request(prompt=prompt, **options), reference, prompt
    for net, reference in references.controlled.items():
        control = Control(name=net, image=references.hint)
        yield (Request(prompt=settings.prompts[0], controls=(control,), **options), reference, f"with ControlNet {net}")
    for init, reference in references.given:
        name = "from an image" if init.mask is None else "inpainting"
        yield Request(prompt=settings.prompts[0], **{**options, "init": init}), reference, name


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


def _trajectory(engine: Engine, request: Request, reference: Reference, name: str, limits: Limits) -> Iterator[Check]:
    """A request's latents and image against the reference's."""
    ours: list[Float32] = []

    def note(progress: Progress) -> None:
        ours.append(progress.latents())

    image = np.asarray(engine.generate(request, on_step=note).images[0])
    errors = [relative_error(a, b) for a, b in zip(ours, reference.latents, strict=False)]
    if errors:
        yield _limited(engine.backend, "step", name, errors[0], limits.step)
    if len(ours) != len(reference.latents):  # another sampler
        what = f"{name}: {len(ours)} evaluations, diffusers {len(reference.latents)}"
        yield _limited(engine.backend, "trajectory", what, math.inf, limits.trajectory)
    elif errors:  # feed-forward networks have no steps
        yield _limited(engine.backend, "trajectory", name, max(errors), limits.trajectory)
    quality = psnr(image, reference.image)
    flat = np.ptp(image) == 0 and np.ptp(reference.image) > 0
    passed = quality >= limits.psnr and not flat
    yield Check(engine.backend.name, engine.backend.precision, "image", name, quality, limits.psnr, passed)


def _limited(backend: Backend, level: str, name: str, error: float, limit: float) -> Check:
    return Check(backend.name, backend.precision, level, name, error, limit, error <= limit)


def _verdict(checks: Sequence[Check], references: References, settings: Settings) -> dict[str, Any]:
    first, again = references.plain[settings.prompts[0]], references.again
    spread = max(relative_error(a, b) for a, b in zip(again.latents, first.latents, strict=True))
    return {
        "passed": all(check.passed for check in checks),
        "summary": _summary(checks),
        "reference": {"loader": references.loader, "assumed": list(references.assumed)},
        **asdict(settings),
        "prompts": list(settings.prompts),
        "spread": {"trajectory": spread, "psnr": psnr(again.image, first.image)},
        "limits": {name: asdict(limits) for name, limits in LIMITS.items()},
        "checks": [{**asdict(check), "value": _plain(check.value)} for check in checks],
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):  # engines are alternatives
            found[name] = version(name)
    return found


def _summary(checks: Sequence[Check]) -> str:
    """Outcome and worst image of each backend and precision."""
    parts = []
    for run in sorted({(check.backend, check.precision) for check in checks}):
        own = [check for check in checks if (check.backend, check.precision) == run]
        worst = min(check.value for check in own if check.level == "image")
        parts.append(f"{' '.join(run)} {'passed' if all(c.passed for c in own) else 'FAILED'}, {worst:.1f} dB")
    return "; ".join(parts)


def _plain(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else "inf"
