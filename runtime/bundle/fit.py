"""Whether the parts of a manifest fit each other: files, components, and what networks read and give.

The signature of every network follows from the model card (the table is `_signature`), so that a decoder of four channels or
a text encoder of another width is refused before an engine loads anything. Engines hold networks to what is stated here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from stepforge.runtime.bundle.format import (
    TEXT_ENCODERS,
    UNET,
    VAE_DECODER,
    Bundle,
    Component,
    ComponentId,
    ExpertCard,
    ModelCard,
    Tensor,
)

ANY = "any"  # a size that only the network knows
ENCODERS = {"sd1": (1,), "sd2": (1,), "sdxl": (2,), "x4": (1,), "x2": (1,), "if": (0, 1)}  # numbers of text encoders
POOLED = ("sdxl", "x2")  # families that read pooled text
BESIDE = ("x4", "x2")  # families that read a smaller image beside the latents: RGB, or latents
IDS = ("input_ids", "attention_mask", "adapter")
MOST_BANKED = 1 << 37  # elements of all LoRA banks: half a terabyte, beyond any model
KEPT = re.compile(r"deep|text_\d{1,4}")  # activations that variants take from earlier steps
RESIDUAL = re.compile(r"residual_\d{1,4}")
LORA = re.compile(r".*\.lora_[AB]")

Shape = tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class _Signature:
    """Tensors by name; "any" in a shape is not compared."""

    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]
    ids: tuple[str, ...] = IDS  # what is int64


def check_fit(bundle: Bundle) -> None:
    """Raises ValueError in one line for the first thing that does not fit."""
    _check_model(bundle.card, "model")
    for name, stage in bundle.stages.items():
        if (stage.model is None) != (stage.kind == "network") or (stage.model is None) != (stage.scheduler is None):
            raise ValueError(
                f"stages.{name} is a {stage.kind}; networks have no model and scheduler, all others have both"
            )
        if stage.model is not None:
            _check_model(stage.model, f"stages.{name}.model")
    for name, expert in bundle.experts.items():
        _check_expert(bundle, name, expert)
    card = bundle.card
    if bundle.text_encoders != TEXT_ENCODERS[: len(card.text_encoders)]:
        raise ValueError(
            f"model.text_encoders are not {' and '.join(key.name for key in TEXT_ENCODERS)}, in this order"
        )
    _check_components(bundle)
    _check_files(bundle)
    for key, entry in bundle.components.items():
        try:
            _check_network(bundle, key, entry)
        except ValueError as error:
            raise ValueError(f"component {str(key)!r}: {error}") from None
    banked = sum(math.prod(shape) for entry in bundle.components.values() for shape in _banks(entry).values())
    if banked > MOST_BANKED:
        raise ValueError(f"its LoRA banks have {banked} elements; at most {MOST_BANKED} are possible")


def _check_model(card: ModelCard, where: str) -> None:
    if (count := len(card.text_encoders)) not in ENCODERS[card.family]:
        most = " or ".join(map(str, ENCODERS[card.family]))
        raise ValueError(f"{where}.text_encoders has {count} elements; {card.family} has {most}")
    if card.size_multiple % card.vae_scale:
        raise ValueError(f"{where}.size_multiple is {card.size_multiple}, no multiple of vae_scale {card.vae_scale}")


def _check_expert(bundle: Bundle, name: str, expert: ExpertCard) -> None:
    first = next(iter(bundle.experts.values()))
    if name in (UNET.name, "base") or expert.unit != first.unit:
        raise ValueError(f"experts.{name} has the base model's name, or another unit than the first of the experts")
    if expert.unit == "timesteps" and (expert.end is None or expert.end > 1):
        raise ValueError(f"experts.{name}.end is {expert.end}; timesteps end at 1")
    if expert.end is not None and expert.end <= expert.start:
        raise ValueError(f"experts.{name} ends at {expert.end}, before it starts")
    spans = sorted((e.start, math.inf if e.end is None else e.end) for e in bundle.experts.values())
    if any(after[0] < before[1] for before, after in pairwise(spans)):
        raise ValueError("experts overlap")


def _needed(card: ModelCard | None, stage: str) -> list[ComponentId]:
    """Networks that a model cannot do without."""
    if card is None:
        return [ComponentId("upscaler", "upscaler", stage=stage)]
    decoder = [] if card.family == "if" else [replace(VAE_DECODER, stage=stage)]
    return [*(encoder.component for encoder in card.text_encoders), replace(UNET, stage=stage), *decoder]


def _check_components(bundle: Bundle) -> None:
    needed = _needed(bundle.card, "")
    for name, stage in bundle.stages.items():
        needed += _needed(stage.model, name)
    for name, expert in bundle.experts.items():
        needed += [replace(UNET, name=name), *(encoder.component for encoder in expert.text_encoders)]
    for control in bundle.controls:
        needed += [ComponentId("control_hint", control), ComponentId("control_residuals", control)]
    needed += [key.whole for key in bundle.components]
    for key in needed:
        if key not in bundle.components:
            raise ValueError(f"it has no component {str(key)!r}")
    for key in bundle.components:
        if key.variant and key.role not in ("denoiser", "control_residuals"):
            raise ValueError(f"component {str(key)!r} is a variant, which a {key.role} has not")
        if key.stage and key.stage not in bundle.stages:
            raise ValueError(f"component {str(key)!r} belongs to no entry of stages")
        if key.role == "denoiser" and key.name not in (UNET.name, *(() if key.stage else bundle.experts)):
            raise ValueError(f"component {str(key)!r} belongs to no entry of experts")
        if key.role.startswith("control") and key.name not in bundle.controls:
            raise ValueError(f"component {str(key)!r} belongs to no entry of controls")


def _check_files(bundle: Bundle) -> None:
    cards: list[ModelCard | ExpertCard] = [*bundle.models, *bundle.experts.values()]
    named = [
        *(component.graph for component in bundle.components.values()),
        *(graph for component in bundle.components.values() for graph in component.derived.values()),
        *(encoder.tokenizer for card in cards for encoder in card.text_encoders),
    ]
    for name in named:
        if name not in bundle.files:
            raise ValueError(f"it uses {name!r} but does not list it under files")


def _check_network(bundle: Bundle, key: ComponentId, entry: Component) -> None:
    expected = _signature(bundle, key)
    _check_bank(entry)
    whole = bundle.components[key.whole]
    extra: dict[str, Shape] = {}
    if whole.bank:
        extra = {"adapter": ("rows",), "adapter_strength": ("rows", 1, 1), **_banks(whole)}
    if key.role == "denoiser":
        extra |= {name: ("any", "any", ANY, ANY) for name in _names(entry.inputs) if RESIDUAL.fullmatch(name)}
    if key.variant:
        extra |= {tensor.name: tensor.shape for tensor in whole.outputs if KEPT.fullmatch(tensor.name)}
    needed = ("sample",) if key.variant else (*expected.inputs, *_banks(whole))
    _check_tensors("input", entry.inputs, {**expected.inputs, **extra}, needed, expected.ids)
    outputs = dict(expected.outputs)
    if key.role == "denoiser":
        outputs |= {tensor.name: (ANY,) * len(tensor.shape) for tensor in entry.outputs if KEPT.fullmatch(tensor.name)}
    _check_tensors("output", entry.outputs, outputs, () if key.variant and key.role != "denoiser" else expected.outputs)


def _names(tensors: Iterable[Tensor]) -> list[str]:
    return [tensor.name for tensor in tensors]


def _signature(bundle: Bundle, key: ComponentId) -> _Signature:
    """What a network of this role reads and gives."""
    shapes = {other: _shapes(entry.outputs) for other, entry in bundle.components.items()}
    card = bundle.model(key.stage)
    if card is None:
        return _Signature({"image": ("rows", 3, "height", "width")}, {"pixels": ("rows", 3, ANY, ANY)})
    image: Shape = ("rows", card.latent_channels, "height", "width")
    reading = bundle.reading(key.stage, key.name)[0] if key.role == "denoiser" else card.text_encoders
    encoders = [encoder.component for encoder in reading]
    text = [shapes[encoder].get("hidden_states", ()) for encoder in encoders]
    width = sum(size for shape in text for size in shape[-1:] if isinstance(size, int))
    read: dict[str, Shape] = {"sample": image, "timestep": ("rows",)}
    if encoders:
        read["encoder_hidden_states"] = ("rows", "tokens", width)
    if card.family in POOLED:
        read["text_embeds"] = ("rows", *shapes[encoders[-1]].get("pooled", ())[1:])
    if card.family == "sdxl":
        expert = bundle.experts.get(key.name) if key.role == "denoiser" else None
        read["time_ids"] = ("rows", 6 if expert is None or not expert.aesthetic else 5)
    match key.role:
        case "text_encoder":
            further = [one for expert in bundle.experts.values() for one in expert.text_encoders if not key.stage]
            length = next((one.max_length for one in (*card.text_encoders, *further) if one.component == key), 0)
            given: dict[str, Shape] = {"hidden_states": ("rows", length, ANY)}
            last = [encoders[-1:], *([one.component for one in e.text_encoders[-1:]] for e in bundle.experts.values())]
            if card.family in POOLED and [key] in last:
                given["pooled"] = ("rows", ANY)
            ids: Shape = ("rows", length)
            masked = {"attention_mask": ids} if card.family == "if" else {}
            return _Signature({"input_ids": ids, **masked}, given)
        case "denoiser" if card.family == "if":
            return _pixel_denoiser(bundle, key, card, read)
        case "denoiser" if card.family in BESIDE:
            beside = card.latent_channels if card.family == "x2" else 3
            read["sample"] = ("rows", card.latent_channels + beside, "height", "width")
            if card.family == "x4":
                read["class_labels"] = ("rows",)
            return _Signature(read, {"prediction": image}, (*IDS, "class_labels"))
        case "denoiser":
            if not key.stage and bundle.reads_mask:
                read["sample"] = ("rows", 2 * card.latent_channels + 1, "height", "width")
            return _Signature(read, {"prediction": image})
        case "control_hint":
            by = card.vae_scale
            hint: Shape = ("rows", ANY, f"height/{by}", f"width/{by}")
            return _Signature({"image": ("rows", 3, "height", "width")}, {"hint": hint})
        case "control_residuals":
            hinted = shapes[ComponentId("control_hint", key.name)].get("hint", ())
            outputs: dict[str, Shape] = {}
            for other in bundle.denoisers:
                for tensor in bundle.components[other].inputs:
                    if RESIDUAL.fullmatch(tensor.name):
                        outputs[tensor.name] = ("rows", *tensor.shape[1:2], ANY, ANY)
            read |= {"hint": ("rows", *hinted[1:2], "height", "width"), "scale": ("rows", max(len(outputs), 1))}
            return _Signature(read, outputs)
        case "vae_encoder":
            by = card.vae_scale
            moments: Shape = ("rows", 2 * card.latent_channels, f"height/{by}", f"width/{by}")
            return _Signature({"pixels": ("rows", 3, "height", "width")}, {"moments": moments})
        case "upscaler":
            raise ValueError("a diffusion model has no upscaler")
        case "vae_decoder":
            by = card.vae_scale
            pixels: Shape = ("rows", 3, f"{by}*height", f"{by}*width")
            return _Signature({"latents": image}, {"pixels": pixels})


def _pixel_denoiser(bundle: Bundle, key: ComponentId, card: ModelCard, read: Mapping[str, Shape]) -> _Signature:
    """A denoiser of DeepFloyd IF: a stage also reads the smaller image and its noise level; a variance may follow the mean."""
    channels = card.latent_channels
    scheduler = bundle.stages[key.stage].scheduler if key.stage else bundle.scheduler
    doubled = any(tensor.shape[1:2] == (2 * channels,) for tensor in bundle.components[key].outputs)
    if scheduler is not None and scheduler.learned_range:
        doubled = True
    beside: dict[str, Shape] = {}
    if key.stage:
        beside = {"sample": ("rows", 2 * channels, "height", "width"), "class_labels": ("rows",)}
    given: Shape = ("rows", 2 * channels if doubled else channels, "height", "width")
    return _Signature({**read, **beside}, {"prediction": given})


def _shapes(tensors: Iterable[Tensor]) -> dict[str, Shape]:
    return {tensor.name: tensor.shape for tensor in tensors}


def _check_tensors(
    what: str, found: tuple[Tensor, ...], known: Mapping[str, Shape], needed: Iterable[str], ids: tuple[str, ...] = IDS
) -> None:
    names = set()
    for tensor in found:
        if tensor.name in names:
            raise ValueError(f"it states the {what} {tensor.name!r} twice")
        names.add(tensor.name)
        if tensor.name not in known:
            raise ValueError(f"it states the {what} {tensor.name!r}, which no network of its kind has")
        dtype = "int64" if tensor.name in ids else "float32"
        wanted = known[tensor.name]
        same = len(wanted) == len(tensor.shape) and all(
            a in (ANY, b) for a, b in zip(wanted, tensor.shape, strict=True)
        )
        if not same or tensor.dtype != dtype:
            raise ValueError(
                f"its {what} {tensor.name!r} is {tensor.dtype} {_text(tensor.shape)}; it must be {dtype} {_text(wanted)}"
            )
    for name in needed:
        if name not in names:
            raise ValueError(f"it has no {what} {name!r}")


def _text(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _check_bank(entry: Component) -> None:
    modules = {module.path: module for module in entry.modules}
    if len(modules) != len(entry.modules):
        raise ValueError("it has a module twice")
    for module in entry.modules:
        if len(module.shape) not in {"linear": (2,), "norm": (1,), "conv": (3, 4, 5)}[module.kind]:
            raise ValueError(f"its module {module.path!r} is {module.kind} of shape {_text(module.shape)}")
    if entry.bank is None:
        return
    seen: set[str] = set()
    for name, paths in entry.bank.shared.items():
        if (
            name != paths[0]
            or any(path not in modules or path in seen for path in paths)
            or len(set(paths)) < len(paths)
        ):
            raise ValueError(f"its bank names {name!r} for layers that are not in its modules, or twice")
        seen.update(paths)
        kinds = {modules[path].kind for path in paths}
        if (
            len({modules[path].shape[1:2] for path in paths}) > 1
            or kinds - {"linear", "conv"}
            or ("conv" in kinds and len(paths) > 1)
        ):
            raise ValueError(f"its bank's layers at {name!r} cannot share their inputs")


def _banks(entry: Component) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the LoRA inputs, see `format.Bank`."""
    found: dict[str, tuple[int, ...]] = {}
    if (bank := entry.bank) is None:
        return found
    modules = {module.path: module for module in entry.modules}
    for name, paths in bank.shared.items():
        outputs, inputs, *kernel = modules[name].shape
        if modules[name].kind == "conv":
            found[f"{name}.lora_A"] = (bank.slots, bank.rank * math.prod(kernel), inputs)
            found[f"{name}.lora_B"] = (bank.slots, outputs, bank.rank)
            continue
        found[f"{name}.lora_A"] = (bank.slots, inputs, bank.rank * len(paths))
        for path in paths:
            found[f"{path}.lora_B"] = (bank.slots, bank.rank, modules[path].shape[0])
    return found
