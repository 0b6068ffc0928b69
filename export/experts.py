"""Experts into a bundle: each denoiser's graphs, the refiner's text, and weights that equal the model's stored once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx

from stepforge.export.expert_source import AESTHETIC_IDS, Expert, read_expert, same_weights
from stepforge.export.graph import modules
from stepforge.export.models.source import Source
from stepforge.export.models.tokenizer import tokenizer_json
from stepforge.export.stages import Add, Tokenize
from stepforge.runtime.bundle import TEXT_ENCODERS, UNET, Component, ComponentId, ExpertCard, ModelCard, TextEncoder
from stepforge.runtime.errors import CheckpointError
from stepforge.runtime.plan.switch import default_switch

Windowed = tuple[Path, tuple[str, float, float | None] | None]  # model, and unit, start, end of where it runs
COPIED = 1 << 24  # bytes read at a time
ALIGNED = 64


def read_experts(given: Mapping[str, Windowed], base: Source) -> dict[str, Expert]:
    """The experts of an export, examined. Raises CheckpointError."""
    found = {name: read_expert(name, Path(path), base, window) for name, (path, window) in given.items()}
    if len({expert.unit for expert in found.values()}) > 1:
        raise CheckpointError("the windows of all experts are in fractions of the timesteps, or all in sigma")
    try:
        default_switch({name: ExpertCard(one.unit, one.start, one.end) for name, one in found.items()})
    except ValueError as error:
        raise CheckpointError(f"experts: {error}") from error
    return found


def export_expert(
    name: str, expert: Expert, source: Source, base: ModelCard, add: Add, tokenize: Tokenize, *, probe: bool
) -> ExpertCard:
    """Export an expert's networks. probe: with the inner values of ControlNets and reuse variants, see `modules.Denoiser`."""
    card = ExpertCard(expert.unit, expert.start, expert.end)
    key = replace(UNET, name=name)
    if expert.text is None:
        add(key, expert.unet, lambda network: modules.denoiser(network, probe=probe))
        return card
    add(key, expert.unet, partial(modules.denoiser, ids=AESTHETIC_IDS))
    second, text = base.text_encoders[1], expert.text
    shared = tokenizer_json(text.tokenizer, None) == tokenizer_json(source.tokenizers[1], source.pads[1])
    if shared and same_weights(text.load, source.text_encoders[1]):
        encoder: TextEncoder = second
    else:
        own = ComponentId("text_encoder", f"{name}_{TEXT_ENCODERS[1].name}")
        encoder = tokenize(text.tokenizer, None, own)
        add(own, text.load, partial(modules.text_encoder, length=encoder.max_length, penultimate=True))
    return replace(card, text_encoders=(encoder,), zero_empty_negative=text.zero_empty_negative, aesthetic=True)


def share_weights(
    folder: Path, base: Component, components: Mapping[ComponentId, Component], name: str
) -> dict[ComponentId, Component]:
    """An expert's components with graphs beside the base's, which read the base's weights where theirs are the same.

    What differs lies in `<name>.data`. components: the expert's network and its variants; their own files go. Nothing is
    changed where no weight is the same.
    """
    home = Path(base.graph).parent
    known = dict(_external(folder / base.graph))
    moved: dict[tuple[str, int], tuple[str, int]] = {}
    graphs = [graph for entry in components.values() for graph in (entry.graph, *entry.derived.values())]
    same = False
    with (folder / home / f"{name}.data").open("wb") as out:
        for graph in graphs:
            for weight, tensor in _external(folder / graph):
                place = _place(tensor)
                if place in moved:
                    continue
                here, other = (folder / graph).parent, known.get(weight)
                if other is not None and _equal(here, tensor, folder / home, other):
                    moved[place] = _place(other)
                    same = True
                    continue
                out.write(bytes(-out.tell() % ALIGNED))
                moved[place] = f"{name}.data", out.tell()
                for chunk in _chunks(here, tensor):
                    out.write(chunk)
        size = out.tell()
    own = folder / home / f"{name}.data"
    if not same or not size:
        own.unlink()
    if not same:
        return dict(components)
    names = {graph: (home / f"{name}.{Path(graph).name}").as_posix() for graph in graphs}
    for graph, to in names.items():
        model = onnx.load(str(folder / graph), load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                location, offset = moved[_place(tensor)]
                for entry in tensor.external_data:
                    entry.value = {"location": location, "offset": str(offset)}.get(entry.key, entry.value)
        (folder / to).write_bytes(model.SerializeToString(deterministic=True))
    old = (folder / graphs[0]).parent
    for file in old.iterdir():
        file.unlink()
    old.rmdir()
    return {
        key: replace(entry, graph=names[entry.graph], derived={k: names[g] for k, g in entry.derived.items()})
        for key, entry in components.items()
    }


def _external(graph: Path) -> Iterator[tuple[str, onnx.TensorProto]]:
    for tensor in onnx.load(str(graph), load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor.name, tensor


def _place(tensor: onnx.TensorProto) -> tuple[str, int]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return entries["location"], int(entries.get("offset", 0))


def _chunks(folder: Path, tensor: onnx.TensorProto) -> Iterator[bytes]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    left = int(entries["length"])
    with (folder / entries["location"]).open("rb") as file:
        file.seek(int(entries.get("offset", 0)))
        while left:
            chunk = file.read(min(left, COPIED))
            if not chunk:
                raise CheckpointError(f"the weights of {tensor.name} end early")
            left -= len(chunk)
            yield chunk


def _equal(folder: Path, tensor: onnx.TensorProto, other_folder: Path, other: onnx.TensorProto) -> bool:
    if tensor.data_type != other.data_type or list(tensor.dims) != list(other.dims):
        return False
    pairs = zip(_chunks(folder, tensor), _chunks(other_folder, other), strict=True)
    return all(mine == theirs for mine, theirs in pairs)
