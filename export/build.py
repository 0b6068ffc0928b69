"""A model to a bundle: export each network, write the manifest, publish the directory in one step."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stepforge.export.graph import trace
from stepforge.export.graph.bank import TARGETS, add_bank, transformer_only, used_modules
from stepforge.export.graph.control import split
from stepforge.export.graph.rewire import RESIDUAL, Reuse, cut_variants, settle_probes, variant
from stepforge.export.lora.merge import read_all, with_adapters
from stepforge.export.models.controlnet import ControlSource, load_control
from stepforge.export.models.load import load
from stepforge.export.models.networks import modules_of
from stepforge.export.models.scheduler import scheduler_card
from stepforge.export.models.source import Source
from stepforge.export.models.tokenizer import tokenizer_json
from stepforge.runtime.bundle import (
    MANIFEST,
    NAME,
    PRECISIONS,
    Bundle,
    Component,
    ControlCard,
    ModelCard,
    TextEncoder,
    read,
    sha256,
    write_manifest,
)
from stepforge.runtime.errors import BundleError, CheckpointError

Progress = Callable[[str, int, int], None]  # stage, stages done, stages in all

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir")
MOST_SLOTS, HIGHEST_RANK = 64, 512
NO_REUSE = Reuse()


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
    reuse: Reuse = NO_REUSE,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Export a diffusers folder or single-file checkpoint to the bundle directory `out`.

    precision: of the weights and the arithmetic inside the graphs; inputs and outputs are float32 always.
    tokenizer, prediction_type: see `checkpoint.load`. name: how requests call the model; its file name by default.
    loras: files and strengths to merge into the weights. bank: take LoRA files as run-time inputs as well.
    controls: ControlNets by the name that requests use, see `control_checkpoint.load_control`. reuse: variants of the
    denoiser for approximate plans. `out` appears complete or not at all.
    Raises CheckpointError for the model and its ControlNets, AdapterError for a LoRA, BundleError for `out`.
    """
    out = Path(out)
    if precision not in PRECISIONS:
        raise CheckpointError(f"precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    check_out(out, overwrite)
    tell = progress or (lambda stage, done, total: None)
    source = load(model_path, tokenizer=tokenizer, prediction_type=prediction_type)
    source = with_adapters(source, read_all(source, loras))
    nets = read_controls(source, controls or {})
    with staged(out) as folder:
        bundle = _write(source, nets, folder, precision, name or source.name, bank, reuse, tell)
    return replace(bundle, path=out)


def read_controls(source: Source, controls: Mapping[str, str | Path]) -> list[ControlSource]:
    """The ControlNets of an export, examined against the model. Raises CheckpointError."""
    if not controls:
        return []
    if bad := [name for name in controls if not NAME.fullmatch(name) or "." in name]:
        raise CheckpointError(f"ControlNet name {bad[0]!r} is not allowed; use letters, digits, - and _")
    config = dict(source.empty["denoiser/unet"]().config)
    return [load_control(path, config, source.vae_scale, name) for name, path in controls.items()]


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse to replace anything but a bundle, and that only when asked."""
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise BundleError(f"{out} exists; choose another place or pass --overwrite")
    if out.is_symlink() or not (out / MANIFEST).is_file():
        raise BundleError(f"{out} exists and is not a bundle; only a bundle is overwritten")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A directory beside `out` that takes its place when the block ends well, and is removed when it does not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield folder
        for path in (*folder.rglob("*"), folder):
            path.chmod(0o755 if path.is_dir() else 0o644)
            _sync(path)
        _publish(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _publish(folder: Path, out: Path) -> None:
    if out.exists():
        old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old."))
        out.replace(old)  # an empty directory may be replaced
        folder.replace(out)
        shutil.rmtree(old)
    else:
        folder.replace(out)
    _sync(out.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(
    source: Source,
    controls: Sequence[ControlSource],
    folder: Path,
    precision: str,
    name: str,
    bank: BankOptions | None,
    reuse: Reuse,
    tell: Progress,
) -> Bundle:
    dtype = DTYPES[precision]
    total = len(source.text_encoders) + len(controls) + 3
    components: dict[str, Component] = {}
    stages = iter(range(total))
    encoders = []

    def add(component: str, load_network: Callable[[torch.dtype], Any], make: Callable[[Any], trace.Traced]) -> Any:
        """Load one network, export it, and let go of it; keeps its config."""
        tell(component, next(stages), total)
        network = load_network(dtype)
        config = network.config
        traced = make(network)
        entry = prefixed(component, trace.save(traced, folder / component))
        if component in source.empty:
            entry = replace(entry, modules=used_modules(folder / entry.graph, modules_of(network)))
            if traced.probes:
                entry = settle_probes(graphs_of(folder, entry), entry, control=bool(controls), reuse=reuse)
            entry = entry if bank is None else adaptable(entry, folder, component, bank)
        components[component] = entry
        del network
        release()
        return config

    for index, (loader, tokens) in enumerate(zip(source.text_encoders, source.tokenizers, strict=True)):
        suffix = f"_{index + 1}" if index else ""
        encoders.append(_tokenizer(tokens, folder, suffix))
        length = encoders[-1].max_length

        def make(network: Any, length: int = length) -> trace.Traced:
            if length > (longest := network.config.max_position_embeddings):
                raise CheckpointError(f"the tokenizer makes {length} tokens, the text encoder takes {longest}")
            return trace.text_encoder(network, length, penultimate=source.family == "sdxl")

        add(f"text_encoder{suffix}", loader, make)
    probe = bool(controls or reuse.names)
    unet = add("denoiser/unet", source.unet, lambda network: trace.denoiser(network, probe=probe))
    components |= _variants(folder, components, reuse.names)
    for control in controls:
        tell(f"control/{control.name}", next(stages), total)
        components |= _control(control, folder, dtype, reuse)
    vae = add("vae_decoder", lambda dtype: _vae(source, dtype), trace.vae_decoder)
    _check_fit(unet, vae, components)
    scale = 2 ** (len(vae.block_out_channels) - 1)
    height, width = (unet.sample_size,) * 2 if isinstance(unet.sample_size, int) else unet.sample_size
    card = ModelCard(
        name=name,
        family=source.family,
        width=width * scale,
        height=height * scale,
        latent_channels=unet.in_channels,
        vae_scale=scale,
        size_multiple=scale * 2 ** (len(unet.block_out_channels) - 1),
        scaling_factor=vae.scaling_factor,
        text_encoders=tuple(encoders),
        zero_empty_negative=source.force_zeros_for_empty_prompt,
    )
    tell("manifest", next(stages), total)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    provenance = dict(source.provenance)
    if controls:
        provenance["controls"] = {control.name: dict(control.provenance) for control in controls}
    bundle = Bundle(
        path=folder,
        card=card,
        scheduler=scheduler_card(source.scheduler).to_dict(),
        components=components,
        precision=precision,
        versions={library: importlib.metadata.version(library) for library in ("stepforge", *LIBRARIES)},
        source=provenance,
        files={path.relative_to(folder).as_posix(): (path.stat().st_size, sha256(path)) for path in files},
        controls={
            control.name: ControlCard(bool(control.config.get("global_pool_conditions"))) for control in controls
        },
    )
    write_manifest(bundle)
    tell("done", total, total)
    return bundle


def _variants(folder: Path, components: Mapping[str, Component], names: Sequence[str]) -> dict[str, Component]:
    """The reuse variants of the denoiser, by component."""
    cut = cut_variants(folder, components["denoiser/unet"], names)
    return {f"denoiser/unet.{name}": entry for name, entry in cut.items()}


def _control(control: ControlSource, folder: Path, dtype: torch.dtype, reuse: Reuse) -> dict[str, Component]:
    """A ControlNet's components. Where the denoiser skips, the residuals beyond DeepCache's branch have no reader."""
    network = control.network(dtype)
    parts = {}
    for part, traced in zip(("hint", "residuals"), split(network), strict=True):
        component = f"control/{control.name}/{part}"
        parts[component] = entry = prefixed(component, trace.save(traced, folder / component))
        if part == "residuals" and reuse.deepcache is not None:
            unread = [t.name for t in entry.outputs if int(t.name.removeprefix(RESIDUAL)) > reuse.deepcache]
            parts[f"{component}.deepcache"] = variant(folder, entry, "deepcache", (), unread)
    del network
    release()
    return parts


def graphs_of(folder: Path, entry: Component) -> list[Path]:
    return [folder / graph for graph in (entry.graph, *entry.derived.values())]


def adaptable(entry: Component, folder: Path, component: str, bank: BankOptions) -> Component:
    """The component with LoRA banks as inputs of its graphs, which are rewritten in the bundle's folder."""
    narrow = bank.targets == "transformer" and component.startswith("denoiser/")
    targets = transformer_only(entry.modules) if narrow else entry.modules
    banks, tensors = add_bank(graphs_of(folder, entry), targets, bank.slots + 1, bank.rank)
    return replace(entry, bank=banks, inputs=(*entry.inputs, *tensors))


def with_banks(plain: str | Path, out: str | Path, bank: BankOptions) -> Bundle:
    """A copy of a bundle that takes LoRA files at run time; its networks are not traced again. Raises BundleError."""
    source, out = read(plain), Path(out)
    check_out(out, overwrite=False)
    with staged(out) as folder:
        shutil.copytree(source.path, folder, dirs_exist_ok=True)
        components = {
            name: adaptable(entry, folder, name, bank) if entry.modules else entry
            for name, entry in source.components.items()
        }
        variants = [name.removeprefix("denoiser/unet.") for name in components if name.startswith("denoiser/unet.")]
        components |= _variants(folder, components, variants)
        files = {name: ((folder / name).stat().st_size, sha256(folder / name)) for name in source.files}
        bundle = replace(source, path=folder, components=components, files=files, verdict=None)
        write_manifest(bundle)
    return replace(bundle, path=out)


def prefixed(component: str, entry: Component) -> Component:
    """A component whose graphs are named from the bundle's root."""
    derived = {backend: f"{component}/{graph}" for backend, graph in entry.derived.items()}
    return replace(entry, graph=f"{component}/{entry.graph}", derived=derived)


def _tokenizer(tokens: Path, folder: Path, suffix: str) -> TextEncoder:
    text, card = tokenizer_json(tokens)
    path = f"tokenizer{suffix}/tokenizer.json"
    (folder / path).parent.mkdir()
    (folder / path).write_text(text, encoding="utf-8")
    return TextEncoder(component=f"text_encoder{suffix}", tokenizer=path, **card)


def _vae(source: Source, dtype: torch.dtype) -> Any:
    """SDXL's VAE overflows in fp16 unless its config says otherwise; diffusers decodes with it in fp32 too."""
    if dtype == torch.float16 and source.family == "sdxl":
        vae = source.vae(torch.float32)
        return vae if vae.config.force_upcast else vae.half()
    return source.vae(dtype)


def _check_fit(unet: Any, vae: Any, components: dict[str, Component]) -> None:
    if unet.in_channels != vae.latent_channels:
        raise CheckpointError(f"the UNet takes {unet.in_channels} channels, the VAE makes {vae.latent_channels}")
    widths = [
        component.outputs[0].shape[-1] for name, component in components.items() if name.startswith("text_encoder")
    ]
    if sum(int(width) for width in widths) != unet.cross_attention_dim:
        raise CheckpointError(
            f"the text encoders make {' + '.join(map(str, widths))} numbers a token, the UNet takes "
            f"{unet.cross_attention_dim}"
        )


def release() -> None:
    """Give the memory of the last network back to the system, before the next one is read."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
