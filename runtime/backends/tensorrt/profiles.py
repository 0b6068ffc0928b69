"""Optimisation profiles: the shapes that each component of a bundle is built for.

A profile limits every dynamic size of every input. They follow from the declared use, rows of a call and sides of an image,
through the sizes that the manifest names: "height" of a denoiser are latents, "8*height" of a decoder pixels.
A component with residual inputs gets two profiles for each range of rows: without a ControlNet each residual is
[1, C, 1, 1], which is free of cost when it is built as such, and with one it has the shape that the ControlNet gives.
Where the manifest does not say how large an input is that another component computes (what reuse variants keep), OpenVINO's
shape inference over that component's graph does.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepforge.runtime.backends.signature import SIZE
from stepforge.runtime.backends.tensorrt.plans import Profile, Shapes
from stepforge.runtime.bundle import Bundle, ComponentId, ModelCard
from stepforge.runtime.errors import BackendError

RANGE = re.compile(r"(\d{1,6})(?:\.\.(\d{1,6}))?")
RESIDUAL = "residual_"
MOST_CHUNKS = 4  # longest prompt, in chunks of the text encoder's length
MOST_ROWS, MOST_SIDE = 64, 16384
TILES = 4  # tiles of pictures may have sides this many times smaller than the smallest picture

Sizes = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Range:
    low: int
    high: int

    @classmethod
    def parse(cls, name: str, text: str, most: int) -> Range:
        """ "LOW..HIGH" or one number. Raises BackendError."""
        match = RANGE.fullmatch(text.strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2] or match[1]) <= most:
            raise BackendError(
                f"{name} {text[:40]!r} is not understood; give LOW..HIGH or one number, from 1 to {most}"
            )
        return cls(int(match[1]), int(match[2] or match[1]))

    def nearest(self, value: int) -> int:
        return min(max(value, self.low), self.high)


@dataclass(frozen=True, slots=True)
class Use:
    """Rows of a call, a profile for each range that is tuned for its highest number, and sides of the base model's images."""

    rows: tuple[Range, ...]
    size: Range

    @classmethod
    def parse(
        cls, bundle: Bundle, rows: Sequence[str], size: str | None, said: tuple[str, str] = ("--rows", "--size")
    ) -> Use:
        """The model's own size where none is given. said: where the two were stated. Raises BackendError."""
        ranges = tuple(Range.parse(said[0], text, MOST_ROWS) for text in rows)
        card = bundle.card
        sides = Range.parse(said[1], size, MOST_SIDE) if size else Range(*sorted((card.width, card.height)))
        if off := [side for side in (sides.low, sides.high) if side % card.size_multiple]:
            raise BackendError(f"{said[1]} {off[0]} is no multiple of {card.size_multiple}, which {card.name} needs")
        return cls(ranges, sides)


def profiles(bundle: Bundle, component: ComponentId, use: Use) -> tuple[Profile, ...]:
    """The profiles of a component. Raises BackendError where a size is not known."""
    entry = bundle.components[component]
    residuals = [t.name for t in entry.inputs if t.name.startswith(RESIDUAL)]
    found = []
    for rows in use.rows:
        low, best, high = (_sizes(bundle, component, use, at, count)
                           for at, count in ((0, rows.low), (1, rows.high), (2, rows.high)))  # fmt: skip
        shapes = [_shapes(bundle, component, sizes) for sizes in (low, best, high)]
        full = {name: Shapes(*(shape[name] for shape in shapes)) for name in shapes[0]}
        bare = {name: tuple(int(s) if not isinstance(s, str) else 1 for s in t.shape)
                for t in entry.inputs if (name := t.name) in residuals}  # fmt: skip
        if residuals:
            found.append(full | {name: Shapes(shape, shape, shape) for name, shape in bare.items()})
        # the smallest residual stays possible beside full ones: a ControlNet may fill some of them alone
        found.append({n: Shapes(bare[n], s.best, s.high) if n in bare else s for n, s in full.items()})
    return tuple(found)


def _sizes(bundle: Bundle, component: ComponentId, use: Use, at: int, rows: int) -> dict[str, int]:
    """Values of the names in a component's shapes. at: 0 the smallest, 1 the usual, 2 the largest."""
    scale, model = _scale(bundle, component.stage)
    sides = use.size.low, use.size.nearest(min(bundle.card.width, bundle.card.height)), use.size.high
    pixels = sides[at] * scale
    chunk = max((encoder.max_length for encoder in model.text_encoders), default=77)
    role = component.role
    if role in ("vae_encoder", "vae_decoder", "upscaler") and at == 0:
        pixels = max(pixels // TILES, 2 * model.vae_scale)
    positions = pixels if role in ("control_hint", "upscaler", "vae_encoder") else max(1, pixels // model.vae_scale)
    if role == "upscaler":  # it reads what the stage before it gives
        positions = max(bundle.stages[component.stage].least, pixels // bundle.stages[component.stage].scale)
    return {"rows": rows, "height": positions, "width": positions, "tokens": chunk * (1, 1, MOST_CHUNKS)[at]}


def _scale(bundle: Bundle, stage: str) -> tuple[int, ModelCard]:
    """How much larger a stage's images are than the base model's, and its model. Stages follow each other in their order."""
    scale, model = 1, bundle.card
    for name, card in bundle.stages.items():
        if not stage:
            break
        scale *= card.scale
        if name == stage:
            return scale, card.model or model
    return 1, model


def _shapes(bundle: Bundle, component: ComponentId, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shape of every input with a dynamic size."""
    entry = bundle.components[component]
    found, unknown = {}, []
    for tensor in entry.inputs:
        if all(isinstance(size, int) for size in tensor.shape):
            continue
        shape = _resolved(tensor.shape, sizes)
        if shape is None:
            unknown.append(tensor.name)
        else:
            found[tensor.name] = shape
    given = _computed(bundle, component, unknown, sizes) if unknown else {}
    if missing := [name for name in unknown if name not in given]:
        raise BackendError(f"{component} reads {missing[0]}, whose size follows from nothing that the bundle states")
    return found | {name: given[name] for name in unknown}


def _resolved(shape: Sequence[int | str], sizes: Sizes) -> tuple[int, ...] | None:
    found = []
    for size in shape:
        if isinstance(size, int):
            found.append(size)
            continue
        match = SIZE.fullmatch(size)
        if match is None or match[2] not in sizes:
            return None
        found.append(-(-sizes[match[2]] * int(match[1] or 1) // int(match[3] or 1)))
    return tuple(found)


def _computed(bundle: Bundle, component: ComponentId, names: Sequence[str], sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes of inputs that are outputs of others: residuals of a ControlNet, and what the network keeps for a variant."""
    found: dict[str, tuple[int, ...]] = {}
    for key, entry in bundle.components.items():
        if (
            key.role != "control_residuals"
            or key.stage != component.stage
            or key.variant not in ("", component.variant)
        ):
            continue
        if bundle.controls[key.name].global_pool:
            continue
        for tensor in entry.outputs:
            if tensor.name in names and (shape := _resolved(tensor.shape, sizes)) is not None:
                found.setdefault(tensor.name, shape)
    for tensor in bundle.components[component].inputs:  # only pooling ControlNets
        if tensor.name.startswith(RESIDUAL) and tensor.name in names and tensor.name not in found:
            found[tensor.name] = (sizes["rows"], int(tensor.shape[1]), 1, 1)
    rest = [name for name in names if name not in found]
    if rest and component.variant:
        found |= _inferred(bundle, component.whole, rest, sizes)
    return found


def _inferred(bundle: Bundle, whole: ComponentId, names: Sequence[str], sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes of outputs of a network, by OpenVINO, which reads its graph and none of its weights."""
    from stepforge.runtime.backends import loading
    from stepforge.runtime.backends.graph_file import checked_graph

    graph = bundle.components[whole].graph
    given = _shapes(bundle, whole, sizes)
    with loading("openvino", graph):
        model = _network(checked_graph(bundle, whole, graph).path)
        model.reshape({name: list(shape) for name, shape in given.items()})
        return {name: tuple(model.output(name).get_shape()) for name in names}


@functools.lru_cache(maxsize=1)
def _network(path: Path) -> Any:
    """Read once for all the sizes of a variant, and for the next variant."""
    from stepforge.runtime.backends.openvino import core

    return core().read_model(path)
