"""Which layers of an adapter a bundle's banks can hold."""

from __future__ import annotations

from stepforge.runtime.bundle import Bundle, ComponentId
from stepforge.runtime.lora.adapter import Adapter
from stepforge.runtime.lora.layers import low_rank


def unbindable(adapter: Adapter, bundle: Bundle) -> list[tuple[ComponentId, str, str]]:
    """(component, path, reason) of every layer that the bundle's banks cannot hold exactly."""
    found = []
    shapes = {(component, m.path): m.shape for component, entry in bundle.components.items() for m in entry.modules}
    targets = {
        component: entry.bank.targets for component, entry in bundle.components.items() if entry.bank is not None
    }
    for (component, path), layer in adapter.layers.items():
        entry, shape = bundle.components[component], shapes[component, path]
        if entry.bank is None:
            found.append((component, path, "the bundle has no bank"))
        elif path not in targets[component]:
            found.append((component, path, "the bundle's bank does not cover this layer"))
        elif (pair := low_rank(layer, shape)) is None:
            found.append((component, path, f"{layer.name} is not a low-rank pair"))
        elif len(pair[0]) > entry.bank.rank:
            found.append((component, path, f"rank {len(pair[0])}, the bank holds {entry.bank.rank}"))
    return found
