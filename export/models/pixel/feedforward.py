"""Feed-forward super-resolution networks from single safetensors files, through spandrel: which architecture, and its weights.

spandrel recognises an architecture by the names of its weights and builds it from their shapes. Of its architectures those
are taken whose graph serves every picture size (NETWORKS).
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from stepforge.export.models.files import reading
from stepforge.export.models.stored import CONVERTERS_RAISE
from stepforge.export.models.weights import WHOLE_NUMBERS, State, first_line, header_state, read_weights
from stepforge.runtime.bundle import sha256
from stepforge.runtime.errors import CheckpointError
from stepforge.runtime.files import printable

NETWORKS = ("ESRGAN", "Compact", "SPAN")  # spandrel's names; ESRGAN: RRDBNet of all layouts, Real-ESRGAN's among them
REASONS = {  # what architectures do that an export cannot hold for every size
    "SwinIR": "its attention masks are fixed to one picture size",
    "Swin2SR": "its attention masks are fixed to one picture size",
    "HAT": "its attention masks are fixed to one picture size",
    "DAT": "its attention masks are fixed to one picture size",
}
MOST_LAYERS = 1000  # highest number in a weight's name: networks are built with as many layers
MOST_SCALE = 16
TORCHVISION = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
SPANDREL = "spandrel reads these networks: pip install --no-deps spandrel einops"


@dataclass(frozen=True, slots=True)
class FeedForward:
    """A feed-forward network as the exporter sees it. It reads RGB in 0..1 and makes RGB in 0..1."""

    name: str
    architecture: str  # spandrel's name
    path: Path
    scale: int  # pixels that it makes for one, a side
    size_multiple: int  # width and height that it reads are padded to multiples of this many pixels
    least: int  # ... and to at least this many
    supports_half: bool  # spandrel's word on fp16
    provenance: Mapping[str, Any]

    def load(self, dtype: torch.dtype) -> Any:
        """spandrel's descriptor with its weights, in eval mode; fp32 where fp16 is not supported."""
        dtype = dtype if self.supports_half else torch.float32
        state = read_weights([self.path], dtype)
        for name, weight in state.items():
            if weight.is_floating_point() and not torch.isfinite(weight).all():
                half = " in fp16" * (dtype == torch.float16)
                raise CheckpointError(f"{self.name}: {printable(name, 80)} holds NaN or infinity{half}")
        found = _descriptor(_architecture(_plain(state), self.path), state, self.path).to(dtype).eval()
        found.model.requires_grad_(False)
        return found


def read_feed_forward(path: Path) -> FeedForward:
    """Examine a network by its file's header; no weights are read. Raises CheckpointError."""
    with reading(path):
        state = header_state([path])
        if odd := [name for name, weight in state.items() if weight.dtype in WHOLE_NUMBERS]:
            raise CheckpointError(f"{path}: {printable(odd[0], 80)} holds whole numbers, which no such network has")
        architecture = _architecture(_plain(state), path)
        with torch.device("meta"):
            found = _descriptor(architecture, state, path)
        sizes = found.size_requirements
        if found.purpose != "SR" or (found.input_channels, found.output_channels) != (3, 3):
            raise CheckpointError(
                f"{path} is a {architecture} of scale {found.scale} from {found.input_channels} to "
                f"{found.output_channels} channels; super-resolution from RGB to RGB is supported"
            )
        if not 1 < found.scale <= MOST_SCALE or sizes.square:
            raise CheckpointError(
                f"{path} is a {architecture} of scale {found.scale}; from 2 to {MOST_SCALE} is possible"
            )
        return FeedForward(
            name=path.stem,
            architecture=architecture,
            path=path,
            scale=found.scale,
            size_multiple=sizes.multiple_of,
            least=max(sizes.minimum, 1),
            supports_half=found.supports_half,
            provenance={
                "kind": "spandrel",
                "architecture": architecture,
                "file": path.name,
                "sha256": {path.name: sha256(path)},
            },
        )


def _plain(state: State) -> State:
    """Weights by the names that spandrel knows."""
    return dict(spandrel().canonicalize_state_dict(state))


def _architecture(state: State, path: Path) -> str:
    """spandrel's name of a network. Raises CheckpointError for unknown ones and those that cannot be exported."""
    for name in state:
        if any(int(number) > MOST_LAYERS for number in re.findall(r"\d{1,20}", name)):
            raise CheckpointError(f"{path} holds {printable(name, 80)}; no network has more than {MOST_LAYERS} layers")
    supported = ", ".join(NETWORKS)
    for support in spandrel().MAIN_REGISTRY.architectures("detection"):
        if support.detect(state):
            name = str(support.architecture.id)
            if name not in NETWORKS:
                why = REASONS.get(name, "its graph was not shown to serve every picture size")
                raise CheckpointError(
                    f"{path} is a {name} network, which is not supported: {why}; supported: {supported}"
                )
            return name
    raise CheckpointError(f"{path} is no super-resolution network that spandrel knows; supported: {supported}")


def _descriptor(architecture: str, state: State, path: Path) -> Any:
    try:
        return spandrel().MAIN_REGISTRY[architecture].architecture.load(_plain(state))
    except (*CONVERTERS_RAISE, AssertionError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{path} is damaged or an unknown kind of {architecture}: {printable(first_line(error), 160)}"
        ) from error


def spandrel() -> Any:
    """The library. Raises CheckpointError where it is not installed."""
    if importlib.util.find_spec("spandrel") is None:
        raise CheckpointError(SPANDREL)
    with _without_torchvision():
        import spandrel

    return spandrel


@contextmanager
def _without_torchvision() -> Iterator[None]:
    """spandrel imports torchvision for two architectures that are not among NETWORKS; where it is not installed, names
    stand in for it during the import. Its wheels fit one build of torch each: a second one breaks every import of
    transformers."""
    if "spandrel" in sys.modules or importlib.util.find_spec(TORCHVISION[0]) is not None:
        yield
        return
    for name in TORCHVISION:
        sys.modules[name] = ModuleType(name)
    for name in ("normalize", "rotate", "InterpolationMode"):
        setattr(sys.modules[TORCHVISION[-1]], name, None)
    try:
        yield
    finally:
        for name in TORCHVISION:
            del sys.modules[name]
