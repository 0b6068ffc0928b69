"""The coverage report of a LoRA file: what happens to every name in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stepforge.runtime.bundle import Bundle
from stepforge.runtime.lora.adapter import read_adapter, survey
from stepforge.runtime.lora.binding import unbindable
from stepforge.runtime.lora.layers import Layer


@dataclass(frozen=True, slots=True)
class Row:
    """One module of the file."""

    name: str  # as the file calls it
    component: str  # bundle's component; empty without a bundle
    module: str
    kind: str
    rank: int | None
    scale: float | None  # alpha / rank
    fate: str  # "run time" (and by merging), "merge" (only), "refused", or "?" without a bundle
    reason: str


def report(path: Path, bundle: Bundle | None) -> list[Row]:
    """A row for every module that the file names; without a bundle, as far as the file alone tells.

    Raises AdapterError if nothing of the file fits, see `adapter.read_adapter`.
    """
    if bundle is None:
        return [
            _row(name, "", "", found, "?", "give --bundle to see what it fits") for name, found in survey(path).items()
        ]
    adapter = read_adapter(path, {name: entry.modules for name, entry in bundle.components.items() if entry.modules})
    merge_only = {(component, module): reason for component, module, reason in unbindable(adapter, bundle)}
    rows = []
    for place, layer in sorted(adapter.layers.items()):
        fate = "merge" if place in merge_only else "run time"
        rows.append(_row(adapter.names[place], str(place[0]), place[1], layer, fate, merge_only.get(place, "")))
    return rows + [_row(name, "", "", why, "", "") for name, why in sorted(adapter.refused.items())]


def _row(name: str, component: str, module: str, found: Layer | str, fate: str, reason: str) -> Row:
    if isinstance(found, str):
        return Row(name, component, module, "", None, None, "refused", found)
    return Row(name, component, module, found.name, found.rank, found.scale, fate, reason)
