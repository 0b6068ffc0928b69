"""Whether the parts of a manifest fit each other: files, components, and what networks read and give.

The signature of every network follows from the model card (the table is `_signature`), so that a decoder of four channels or
a text encoder of another width is refused before an engine loads anything. Engines hold networks to what is stated here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from stepforge.runtime.bundle.format import (
    TEXT_ENCODERS,
    UNET,
    VAE_DECODER,
    Bundle,
    Component,
    ComponentId,
    ModelCard,
    Tensor,
)

ANY = "any"  # a size that only the network knows
ENCODERS = {"sd1": (1,), "sd2": (1,), "sdxl": (2,), "x4": (1,), "x2": (1,), "if": (0, 1)}  # numbers of text encoders
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
        if key.role.startswith("control") and key.name not in bundle.controls:
            raise ValueError(f"component {str(key)!r} belongs to no entry of controls")


def _check_files(bundle: Bundle) -> None:
    named = [
        *(component.graph for component in bundle.components.values()),
        *(graph for component in bundle.components.values() for graph in component.derived.values()),
        *(encoder.tokenizer for card in bundle.models for encoder in card.text_encoders),
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
    _check_tensors("input", entry.inputs, {**expected.inputs, **extra}, needed)
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
    encoders = [encoder.component for encoder in card.text_encoders]
    text = [shapes[encoder].get("hidden_states", ()) for encoder in encoders]
    width = sum(size for shape in text for size in shape[-1:] if isinstance(size, int))
    read: dict[str, Shape] = {
        "sample": image,
        "timestep": ("rows",),
        "encoder_hidden_states": ("rows", "tokens", width),
    }
    if card.family == "sdxl":
        pooled = shapes[encoders[-1]].get("pooled", ())
        read |= {"text_embeds": ("rows", *pooled[1:]), "time_ids": ("rows", 6)}
    match key.role:
        case "text_encoder":
            length = next((one.max_length for one in card.text_encoders if one.component == key), 0)
            given: dict[str, Shape] = {"hidden_states": ("rows", length, ANY)}
            if card.family == "sdxl" and key == encoders[-1]:
                given["pooled"] = ("rows", ANY)
            return _Signature({"input_ids": ("rows", length)}, given)
        case "denoiser":
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


def _shapes(tensors: Iterable[Tensor]) -> dict[str, Shape]:
    return {tensor.name: tensor.shape for tensor in tensors}


def _check_tensors(what: str, found: tuple[Tensor, ...], known: Mapping[str, Shape], needed: Iterable[str]) -> None:
    names = set()
    for tensor in found:
        if tensor.name in names:
            raise ValueError(f"it states the {what} {tensor.name!r} twice")
        names.add(tensor.name)
        if tensor.name not in known:
            raise ValueError(f"it states the {what} {tensor.name!r}, which no network of its kind has")
        dtype = "int64" if tensor.name in ("input_ids", "adapter") else "float32"
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
