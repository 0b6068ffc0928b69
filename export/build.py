"""A model to a bundle: export each network, write the manifest, publish the directory in one step."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stepforge.export.expert_source import Expert
from stepforge.export.experts import Windowed, export_expert, read_experts, share_weights
from stepforge.export.graph import modules, trace
from stepforge.export.graph.bank import TARGETS, add_bank, transformer_only, used_modules
from stepforge.export.graph.check import open_graphs
from stepforge.export.graph.control import split
from stepforge.export.graph.footprint import TILED, footprint
from stepforge.export.graph.rewire import RESIDUAL, Variants, check_branch, cut_variants, resolve_probes, variant
from stepforge.export.lora.merge import read_all, with_adapters
from stepforge.export.memory import check_fits
from stepforge.export.models.controlnet import ControlSource, load_control
from stepforge.export.models.files import check_names
from stepforge.export.models.load import load
from stepforge.export.models.networks import modules_of
from stepforge.export.models.pixel.feedforward import FeedForward
from stepforge.export.models.scheduler import scheduler_card
from stepforge.export.models.source import Source, Upscaler
from stepforge.export.models.tokenizer import Pad
from stepforge.export.models.weights import Loader
from stepforge.export.parts import load_vae, text_trace, write_tokenizer
from stepforge.export.publish import check_out, staged
from stepforge.export.stages import export_network, export_stage, networks_of, read_upscalers, told
from stepforge.runtime.bundle import (
    MANIFEST,
    NAME,
    TEXT_ENCODERS,
    UNET,
    VAE_DECODER,
    VAE_ENCODER,
    WEIGHT_PRECISIONS,
    Bundle,
    Component,
    ComponentId,
    ControlCard,
    ExpertCard,
    ModelCard,
    StageCard,
    TextEncoder,
    read,
    sha256,
    write_manifest,
)
from stepforge.runtime.bundle.steps import steps_file, written
from stepforge.runtime.errors import CheckpointError
from stepforge.runtime.files import printable

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]  # stage, stages done, stages in all

DTYPES = dict(zip(WEIGHT_PRECISIONS, (torch.float32, torch.float16), strict=True))
LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir")
MOST_SLOTS, HIGHEST_RANK = 64, 512
NO_VARIANTS = Variants()


@dataclass(frozen=True, slots=True)
class BankOptions:
    """LoRA banks to build into the denoiser and the text encoders. Raises CheckpointError for impossible sizes."""

    slots: int  # adapter sets that can be in use at a time
    rank: int = 16  # highest rank of a set, all its adapters together
    targets: str = "all"  # layers of the denoiser: "all", or "transformer" for what trainers change by default

    def __post_init__(self) -> None:
        if not 1 <= self.slots <= MOST_SLOTS:
            raise CheckpointError(f"lora slots are {self.slots}; from 1 to {MOST_SLOTS} are possible")
        if not 1 <= self.rank <= HIGHEST_RANK:
            raise CheckpointError(f"the lora rank is {self.rank}; from 1 to {HIGHEST_RANK} are possible")
        if self.targets not in TARGETS:
            raise CheckpointError(f"lora targets {self.targets!r} are unknown; choose one of {', '.join(TARGETS)}")


def export_bundle(
    model_path: str | Path,
    out: str | Path,
    *,
    precision: str = "fp32",
    tokenizer: str | Path | None = None,
    name: str | None = None,
    prediction_type: str | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    bank: BankOptions | None = None,
    controls: Mapping[str, str | Path] | None = None,
    upscalers: Mapping[str, str | Path] | None = None,
    experts: Mapping[str, Windowed] | None = None,
    reuse: Variants = NO_VARIANTS,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Export a diffusers folder or single-file checkpoint to the bundle directory `out`.

    precision: of the weights and the arithmetic inside the graphs; inputs and outputs are float32 always.
    tokenizer, prediction_type: see `models.load.load`. name: how requests call the model; its file name by default.
    loras: files and strengths to merge into the weights. bank: take LoRA files as run-time inputs as well.
    controls: ControlNets by the name that requests use, see `models.controlnet.load_control`. upscalers:
    super-resolution models by the name of their stage, see `stages.read_upscalers`. experts: further
    denoisers by name, each a model and where it runs, see `expert_source.read_expert`. reuse: variants of the
    denoiser for approximate plans. overwrite: replace a bundle at `out`; without it nothing is replaced, also not what appears
    there during the export. `out` appears complete or not at all.
    Raises CheckpointError for the model and its ControlNets, for a graph that an installed engine does not load and for an
    export that does not fit into memory or onto the disk, AdapterError for a LoRA, BundleError for `out`.
    """
    out = Path(out)
    if precision not in DTYPES:
        raise CheckpointError(f"precision {precision!r} is unknown; choose one of {', '.join(DTYPES)}")
    check_out(out, overwrite)
    named = [path for path, _ in (*loras, *(experts or {}).values())]
    check_names(name, [model_path, *named], (controls or {}).values(), (upscalers or {}).values())
    source = load(model_path, tokenizer=tokenizer, prediction_type=prediction_type)
    for kind, lines in (("assumed", source.assumed), ("corrected", source.corrected)):
        for line in lines:
            log.warning("%s: %s %s", printable(source.name), kind, printable(line, 400))
    check_branch(reuse, source.empty[UNET]())
    source = with_adapters(source, read_all(source, loras))
    check_fits({key: make() for key, make in source.empty.items()}, DTYPES[precision], out)
    nets = read_controls(source, controls or {})
    stages, others = read_upscalers(upscalers or {}), read_experts(experts or {}, source)
    with staged(out, overwrite=overwrite) as folder:
        export = _Export(source, nets, stages, others, folder, precision, bank, reuse, progress)
        bundle = export.run(name or source.name)
    return replace(bundle, path=out)


def read_controls(source: Source, controls: Mapping[str, str | Path]) -> list[ControlSource]:
    """The ControlNets of an export, examined against the model. Raises CheckpointError."""
    if not controls:
        return []
    if bad := [name for name in controls if not NAME.fullmatch(name) or "." in name]:
        raise CheckpointError(f"ControlNet name {bad[0]!r} is not allowed; use letters, digits, - and _")
    config = dict(source.empty[UNET]().config)
    return [load_control(path, config, source.vae_scale, name) for name, path in controls.items()]


class _Export:
    """One export on its way: components are traced one at a time into a folder."""

    def __init__(
        self,
        source: Source,
        controls: Sequence[ControlSource],
        upscalers: Mapping[str, Upscaler | FeedForward],
        experts: Mapping[str, Expert],
        folder: Path,
        precision: str,
        bank: BankOptions | None,
        reuse: Variants,
        progress: Progress | None,
    ) -> None:
        self.source, self.controls, self.upscalers, self.experts = source, controls, upscalers, experts
        self.folder, self.precision = folder, precision
        self.dtype, self.bank, self.reuse = DTYPES[precision], bank, reuse
        self.components: dict[ComponentId, Component] = {}
        self.progress, self.done = progress, 0
        networks = len(source.text_encoders) + 1 + len(controls) + 2 * (source.vae is not None) + len(experts)
        self.stages = networks + sum(map(networks_of, upscalers.values())) + len(("manifest", "check"))

    def run(self, name: str) -> Bundle:
        encoders = self.text_encoders()
        unet = self.denoiser()
        for control in self.controls:
            self.control(control)
        vae = self.decoder()
        card = self.card(name, encoders, unet, vae)
        stages = {stage: self.stage(stage, upscaler, card) for stage, upscaler in self.upscalers.items()}
        experts = {key: self.expert(key, expert, card) for key, expert in self.experts.items()}
        self.tell("manifest")
        bundle = self.bundle(card, stages, experts)
        self.tell("check")
        open_graphs(bundle)
        write_manifest(bundle)
        self.tell("done")
        return bundle

    def tell(self, stage: str) -> None:
        if self.progress is not None:
            self.progress(stage, self.done, self.stages)
        self.done += 1

    def add(self, key: ComponentId, loader: Loader, make: Callable[[Any], trace.Traced]) -> Any:
        """Load one network, export it, and let go of it; returns its config."""
        self.tell(str(key))
        network = loader(self.dtype)
        config = getattr(network, "config", None)
        traced = make(network)
        entry = prefixed(key, trace.save(traced, self.folder / key.folder))
        if key.role in TILED:
            entry = replace(entry, footprint=footprint(self.folder / entry.graph, config))
        if key in self.source.empty or (key.role == "denoiser" and not key.stage):
            entry = replace(entry, modules=used_modules(self.folder / entry.graph, modules_of(network)))
            if traced.probes:
                graphs = graphs_of(self.folder, entry)
                entry = resolve_probes(graphs, entry, control=bool(self.controls), reuse=self.reuse)
            entry = entry if self.bank is None else adaptable(entry, self.folder, key, self.bank)
        self.components[key] = entry
        del network, traced
        release()
        return config

    def text_encoders(self) -> tuple[TextEncoder, ...]:
        """Tokenizers and text encoders; cards of both."""
        cards = []
        networks = list(zip(self.source.text_encoders, self.source.tokenizers, self.source.pads, strict=True))
        for key, (loader, tokens, pad) in zip(TEXT_ENCODERS, networks, strict=False):
            card = write_tokenizer(tokens, pad, self.folder, key, t5=self.source.family == "if")
            self.add(key, loader, text_trace(self.source.family, card.max_length))
            cards.append(card)
        return tuple(cards)

    def denoiser(self) -> Any:
        """The denoiser and its reuse variants; the denoiser's config."""
        probe = bool(self.controls or self.reuse.names)
        config = self.add(UNET, self.source.unet, lambda network: modules.denoiser(network, probe=probe))
        self.components |= _variants(self.folder, UNET, self.components[UNET], self.reuse.names)
        return config

    def expert(self, name: str, expert: Expert, base: ModelCard) -> ExpertCard:
        """A further denoiser; the weights that it has in common with the first stand on disk once."""
        key, probe = replace(UNET, name=name), bool(self.controls or self.reuse.names)

        def tokenize(tokens: Path, pad: Pad | None, encoder: ComponentId) -> TextEncoder:
            return write_tokenizer(tokens, pad, self.folder, encoder)

        before = len(self.components)
        card = export_expert(name, expert, self.source, base, self.add, tokenize, probe=probe)
        self.stages += len(self.components) - before - 1  # a text encoder of its own
        if expert.text is None:
            own = {key: self.components[key]}
            own |= _variants(self.folder, key, own[key], self.reuse.names)
            self.components |= share_weights(self.folder, self.components[UNET], own, name)
        return card

    def control(self, control: ControlSource) -> None:
        """A ControlNet's two components. Where the denoiser skips, residuals beyond DeepCache's branch have no reader."""
        keys = ComponentId("control_hint", control.name), ComponentId("control_residuals", control.name)
        self.tell(keys[1].label)
        network = control.network(self.dtype)
        for key, traced in zip(keys, split(network), strict=True):
            entry = prefixed(key, trace.save(traced, self.folder / key.folder))
            self.components[key] = entry
            if key.role == "control_residuals" and self.reuse.deepcache is not None:
                unread = [t.name for t in entry.outputs if int(t.name.removeprefix(RESIDUAL)) > self.reuse.deepcache]
                self.components[replace(key, variant="deepcache")] = variant(
                    self.folder, entry, "deepcache", (), unread
                )
        del network, traced
        release()

    def decoder(self) -> Any:
        """The VAE decoder, and the encoder if the VAE has one; the VAE's config. None for a model of pixels."""
        if self.source.vae is None:
            return None
        load, halves = partial(load_vae, self.source), []

        def decoder(vae: Any) -> trace.Traced:
            halves.append(vae.encoder is not None)
            return modules.vae_decoder(vae)

        config = self.add(VAE_DECODER, load, decoder)
        if halves[0]:
            self.add(VAE_ENCODER, load, modules.vae_encoder)
        else:
            self.stages -= 1
        return config

    def stage(self, name: str, upscaler: Upscaler | FeedForward, base: ModelCard) -> StageCard:
        if isinstance(upscaler, FeedForward):
            return export_network(name, upscaler, self.add)
        t5 = upscaler.source.family == "if"

        def tokenize(tokens: Path, pad: Pad | None, key: ComponentId) -> TextEncoder:
            return write_tokenizer(tokens, pad, self.folder, key, t5=t5)

        return export_stage(name, upscaler, self.source, base, self.add, tokenize, load_vae)

    def card(self, name: str, encoders: tuple[TextEncoder, ...], unet: Any, vae: Any) -> ModelCard:
        scale = self.source.vae_scale
        height, width = (unet.sample_size,) * 2 if isinstance(unet.sample_size, int) else unet.sample_size
        return ModelCard(
            name=name,
            family=self.source.family,
            width=width * scale,
            height=height * scale,
            latent_channels=unet.in_channels if vae is None else vae.latent_channels,
            vae_scale=scale,
            size_multiple=self.source.size_multiple or scale,
            scaling_factor=1.0 if vae is None else vae.scaling_factor,
            text_encoders=encoders,
            zero_empty_negative=self.source.force_zeros_for_empty_prompt,
        )

    def bundle(self, card: ModelCard, stages: Mapping[str, StageCard], experts: Mapping[str, ExpertCard]) -> Bundle:
        """The manifest of what the folder holds."""
        scheduler = scheduler_card(self.source.scheduler)
        for stage, own in {"": scheduler, **{name: card.scheduler for name, card in stages.items()}}.items():
            if own is not None and own.table is not None:
                (self.folder / steps_file(stage)).parent.mkdir()
                (self.folder / steps_file(stage)).write_bytes(written(own.table.counts))
        provenance = dict(self.source.provenance)
        provenance |= {"assumed": list(self.source.assumed), "corrected": list(self.source.corrected)}
        if self.controls:
            provenance["controls"] = {control.name: dict(control.provenance) for control in self.controls}
        if self.upscalers:
            provenance["upscalers"] = {name: told(upscaler) for name, upscaler in self.upscalers.items()}
        if self.experts:
            provenance["experts"] = {name: dict(expert.provenance) for name, expert in self.experts.items()}
        return Bundle(
            path=self.folder,
            card=card,
            scheduler=scheduler,
            components=self.components,
            precision=self.precision,
            versions={library: importlib.metadata.version(library) for library in ("stepforge", *LIBRARIES)},
            source=provenance,
            files=_hashed(self.folder),
            controls={
                control.name: ControlCard(bool(control.config.get("global_pool_conditions")))
                for control in self.controls
            },
            stages=stages,
            experts=experts,
        )


def _hashed(folder: Path) -> dict[str, tuple[int, str]]:
    """Relative path -> (bytes, sha256) of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): (path.stat().st_size, sha256(path)) for path in files}


def _variants(folder: Path, key: ComponentId, entry: Component, names: Sequence[str]) -> dict[ComponentId, Component]:
    """The reuse variants of a denoiser."""
    return {replace(key, variant=name): cut for name, cut in cut_variants(folder, entry, names).items()}


def graphs_of(folder: Path, entry: Component) -> list[Path]:
    return [folder / graph for graph in (entry.graph, *entry.derived.values())]


def adaptable(entry: Component, folder: Path, key: ComponentId, bank: BankOptions) -> Component:
    """The component with LoRA banks as inputs of its graphs, which are rewritten in the bundle's folder."""
    narrow = bank.targets == "transformer" and key.role == "denoiser"
    targets = transformer_only(entry.modules) if narrow else entry.modules
    banks, tensors = add_bank(graphs_of(folder, entry), targets, bank.slots + 1, bank.rank)
    return replace(entry, bank=banks, inputs=(*entry.inputs, *tensors))


def with_banks(plain: str | Path, out: str | Path, bank: BankOptions) -> Bundle:
    """A copy of a bundle that takes LoRA files at run time; its networks are not traced again.

    Raises BundleError, and CheckpointError for a graph that an engine does not load then.
    """
    source, out = read(plain), Path(out)
    check_out(out, overwrite=False)
    with staged(out) as folder:
        shutil.copytree(source.path, folder, dirs_exist_ok=True)
        components = {
            key: adaptable(entry, folder, key, bank) if entry.modules else entry
            for key, entry in source.components.items()
        }
        for key in source.denoisers:
            components |= _variants(folder, key, components[key], source.variants(key))
        (folder / MANIFEST).unlink()
        bundle = replace(source, path=folder, components=components, files=_hashed(folder), verdict=None)
        open_graphs(bundle)
        write_manifest(bundle)
    return replace(bundle, path=out)


def prefixed(key: ComponentId, entry: Component) -> Component:
    """A component whose graphs are named from the bundle's root."""
    derived = {backend: f"{key.folder}/{graph}" for backend, graph in entry.derived.items()}
    return replace(entry, graph=f"{key.folder}/{entry.graph}", derived=derived)


def release() -> None:
    """Give the memory of the last network back to the system, before the next one is read."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
