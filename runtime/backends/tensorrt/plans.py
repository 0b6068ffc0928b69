"""Plans: engines that TensorRT has built for a component, each in a folder of its own with a card that says for what.

    <root>/<component hash>/<key>/card.json     the card below
    <root>/<component hash>/<key>/engine.plan   what the library serialised
    <root>/<component hash>/<key>/inline.npz    weights that stand in the graph itself, for a plan without weights

root: $STEPFORGE_PLANS, else `plans` in the compile cache's folder. Plans are machine code, so they are no part of a bundle,
which never holds code: they are trusted because this user, or whoever STEPFORGE_PLANS names, built them here.
A plan is loaded only if its card fits the component's files, the library's release and this machine, and its bytes have the
card's digest. All others are stale; `stepforge info` lists them with the reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from stepforge.runtime.backends import WIDE_VAE
from stepforge.runtime.backends.compile_cache import root as cache_root
from stepforge.runtime.backends.gpu import driver, first_gpu
from stepforge.runtime.bundle import Bundle, ComponentId
from stepforge.runtime.bundle.format import NAME
from stepforge.runtime.bundle.typed import Between, Matches, OneOf, parse
from stepforge.runtime.errors import BackendError
from stepforge.runtime.files import printable, strict_json

FORMAT = 1
CARD, PLAN, INLINE = "card.json", "engine.plan", "inline.npz"
MOST_CARD_BYTES = 16 << 20
PRECISIONS = ("fp32", "bf16", "fp16")
PACKAGES = {  # names under which pip has a library
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), "tensorrt-rtx": ("tensorrt-rtx",),
}  # fmt: skip

Sizes = Annotated[tuple[Annotated[int, Between(0, 1 << 24)], ...], Between(0, 8)]
Digest = Annotated[str, Matches(re.compile(r"[0-9a-f]{64}"), "a sha256")]


@dataclass(frozen=True, slots=True)
class Shapes:
    """Limits of one input in one profile, and the shape that it is tuned for."""

    low: Sizes
    best: Sizes
    high: Sizes

    def holds(self, shape: Sequence[int]) -> bool:
        return len(shape) == len(self.low) and all(
            low <= size <= high for low, size, high in zip(self.low, shape, self.high, strict=True)
        )


Profile = Mapping[str, Shapes]


@dataclass(frozen=True, slots=True)
class Weight:
    """Where a weight of a plan without weights comes from. file: of the bundle; empty: in inline.npz."""

    file: str
    offset: Annotated[int, Between(0, 1 << 50)]
    shape: Sizes
    stored: Annotated[str, OneOf(("float32", "float16", "bfloat16", "int64", "int32"))]  # type in the file
    wanted: Annotated[str, OneOf(("float32", "float16", "bfloat16", "int64", "int32"))]  # type in the engine


@dataclass(frozen=True, slots=True)
class Card:
    """What a plan was built of, with and for, and what came out."""

    format: Annotated[int, Between(FORMAT, FORMAT)]
    component: str
    component_hash: Digest
    library: str
    version: str
    targets: tuple[str, ...]  # compute capabilities; of one GPU's plan that GPU's
    gpu: str  # name and driver of the GPU that built the plan; empty: any of the targets
    precision: Annotated[str, OneOf(PRECISIONS)]
    options: Mapping[str, bool | int | float | str | None]
    profiles: Annotated[tuple[Mapping[str, Shapes], ...], Between(1, 64)]
    inputs: Mapping[str, str]  # name -> type
    outputs: Mapping[str, str]
    layers: Mapping[str, int]  # "CONVOLUTION float16" -> layers of the network before the library fused them
    weights: Mapping[str, Weight]  # sources of what a stripped plan leaves out
    bytes: Annotated[int, Between(1, 1 << 50)]
    sha256: Digest
    seconds: float
    peak_bytes: int  # highest resident memory of the process that built it


@dataclass(frozen=True, slots=True)
class Plan:
    """A card and where it lies."""

    folder: Path
    card: Card

    def data(self) -> bytes:
        """The serialised engine. Raises BackendError if it is not what the card's digest says."""
        path = self.folder / PLAN
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BackendError(f"{path} cannot be read: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != self.card.sha256:
            raise BackendError(f"{path} is damaged; build it again with `stepforge build`")
        return data


@dataclass(frozen=True, slots=True)
class Machine:
    """What a plan has to fit. capability: "sm_89", empty where there is no GPU; gpu: name and driver as in cards."""

    library: str
    version: str
    capability: str
    gpu: str
    lean: bool = False  # the lean runtime, which loads version-compatible plans alone


def here() -> dict[str, Machine]:
    """This machine, for each installed library, without importing one. Without a GPU a plan's own target is taken for it."""
    gpu = first_gpu()
    found = {}
    for name, packages in PACKAGES.items():
        installed = next((one for package in packages if (one := _installed(package))), "")
        if not installed:
            continue
        capability = f"sm_{gpu.capability[0]}{gpu.capability[1]}" if gpu is not None else ""
        found[name] = Machine(name, installed, capability, f"{gpu}, driver {driver()}" if gpu is not None else "")
    return found


def _installed(package: str) -> str:
    """Its version; empty if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def root() -> Path:
    """Where plans lie. Raises BackendError where nothing is kept."""
    stated = os.environ.get("STEPFORGE_PLANS")
    if stated:
        return Path(stated)
    cache = cache_root()
    if cache is None:
        raise BackendError("there is no place for plans: STEPFORGE_CACHE is empty; set STEPFORGE_PLANS to a folder")
    return cache / "plans"


def component_hash(bundle: Bundle, component: ComponentId) -> str:
    """sha256 of the graph, the files beside it and the signature: what a plan is built of."""
    entry = bundle.components[component]
    folder = entry.graph.rpartition("/")[0]
    beside = {name: digest for name, (_, digest) in bundle.files.items() if name.rpartition("/")[0] == folder}
    weights = sorted(digest for name, digest in beside.items() if not name.endswith(".onnx"))
    body = [bundle.files[entry.graph][1], weights, [asdict(t) for t in (*entry.inputs, *entry.outputs)]]
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def key(card_hash: str, library: str, version: str, targets: Sequence[str], gpu: str, precision: str,
        options: Mapping[str, Any], profiles: Sequence[Profile]) -> str:  # fmt: skip
    """Name of a plan's folder: one for everything that makes one plan another."""
    body = {
        "component": card_hash, "library": library, "version": version, "targets": sorted(targets), "gpu": gpu,
        "precision": precision, "options": dict(options),
        "profiles": [{name: asdict(shapes) for name, shapes in sorted(profile.items())} for profile in profiles],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def computed_in(component: ComponentId, family: str, precision: str) -> str:
    """Precision of a component in a backend of that precision: text encoders stay fp32, since every step depends on them;
    a VAE that exceeds fp16 decodes in bf16 and encodes in fp32, as in the torch backend."""
    if component.role == "text_encoder":
        return "fp32"
    if precision == "fp16" and family in WIDE_VAE and component.role in ("vae_encoder", "vae_decoder"):
        return "bf16" if component.role == "vae_decoder" else "fp32"
    return precision


def plans(bundle: Bundle, component: ComponentId) -> Iterator[Plan | str]:
    """Plans of a component, newest first, and in place of a damaged one why it cannot be read."""
    if bundle.components[component].graph not in bundle.files:  # a bundle without files
        return iter(())
    return plans_of(component_hash(bundle, component))


def plans_of(digest: str) -> Iterator[Plan | str]:
    """The same, by the hash of what they were built of."""
    try:
        folder = root() / digest[:16]
    except BackendError:
        return
    folders = [path for path in folder.glob("*") if NAME.fullmatch(path.name) and (path / CARD).is_file()]
    for path in sorted(folders, key=lambda path: (path / CARD).stat().st_mtime_ns, reverse=True):
        try:
            if (path / CARD).stat().st_size > MOST_CARD_BYTES:
                raise ValueError(f"it is larger than {MOST_CARD_BYTES >> 20} MiB")
            yield Plan(path, parse(Card, strict_json((path / CARD).read_bytes()), "card"))
        except (OSError, ValueError) as error:
            yield f"{path.name} is damaged: {printable(error)}"


def stale(card: Card, digest: str, machine: Machine | None) -> str:
    """Why a plan cannot be used for what has this hash; empty if it can. machine: None asks for what holds on every machine."""
    if card.component_hash != digest:
        return "built of other files"
    if machine is None:
        return ""
    if card.library != machine.library:
        return f"built by {card.library}, not by {machine.library}"
    compatible = bool(card.options.get("version_compatible"))
    if machine.lean and not compatible:
        return "the lean runtime loads version-compatible plans only"
    older = _number(card.version) <= _number(machine.version) if compatible else card.version == machine.version
    if not older:
        return f"built by {card.library} {card.version}, and {machine.version} is installed"
    if not machine.capability:
        return ""
    if card.gpu and card.options.get("hardware_compatible"):
        if _capability(machine.capability) < 80:
            return f"built for GPUs from sm_80 on, and this is {machine.capability}"
    elif card.gpu and card.gpu != machine.gpu:
        return f"built on {card.gpu}, and this is {machine.gpu}"
    elif machine.capability not in card.targets:
        return f"built for {', '.join(card.targets)}, and this is {machine.capability}"
    return ""


def usable(bundle: Bundle, component: ComponentId, machine: Machine, precision: str) -> list[Plan]:
    """Plans that can be loaded, newest first, all of one precision. Raises BackendError with the reason of each that cannot."""
    return usable_of(component_hash(bundle, component), str(component), machine, precision)


def usable_of(digest: str, what: str, machine: Machine, precision: str) -> list[Plan]:
    """The same, by the hash of what they were built of, and its name in errors."""
    found, reasons = [], []
    for plan in plans_of(digest):
        if isinstance(plan, str):
            reasons.append(plan)
        elif reason := stale(plan.card, digest, machine):
            reasons.append(
                f"{plan.folder.name} was {reason}" if reason.startswith("built") else f"{plan.folder.name}: {reason}"
            )
        elif plan.card.precision != precision:
            reasons.append(f"{plan.folder.name} computes in {plan.card.precision}")
        else:
            found.append(plan)
    if not found:
        why = f" ({'; '.join(reasons)})" if reasons else ""
        raise BackendError(
            f"there is no plan of {what} in {precision} for {machine.library} {machine.version} on "
            f"{machine.capability}{why}; run `stepforge build BUNDLE --engine {machine.library}`"
        )
    return found


def card_json(card: Card) -> str:
    return json.dumps(asdict(card), indent=1)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _capability(name: str) -> int:
    return int(name.removeprefix("sm_"))
