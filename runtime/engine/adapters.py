"""LoRA adapters in a running engine: `engine.adapters.load(name, file)`, then `Request(adapters={name: strength})`.

A bundle exported with `--lora-slots` has banks as inputs of its denoiser and text encoders (`bundle.Bank`). Here are
their buffers. The adapters of a request are a set; its ranks stand side by side in one slot of every bank, and the rows of
the request carry that slot's number. A swap copies numbers into the slot: nothing is compiled, refitted or loaded again.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from stepforge.runtime.arrays import Float32
from stepforge.runtime.backends import Backend, Banks
from stepforge.runtime.bundle import Bank, Bundle, ComponentId, Module
from stepforge.runtime.errors import AdapterError, RequestError
from stepforge.runtime.lora.adapter import Adapter, read_adapter
from stepforge.runtime.lora.binding import unbindable
from stepforge.runtime.lora.layers import low_rank

Stored = NDArray[Any]  # float32, or bfloat16 as uint16
BankType = type[np.float32] | type[np.uint16]
NONE = 0  # the slot of zeros


@dataclass(frozen=True, slots=True)
class Block:
    """One layer of an adapter in the layout of the bank, see `bundle.Bank`."""

    rank: int
    a: Stored
    b: Stored
    exact_b: Float32  # float32: a set scales it by the adapter's strength before it is stored


@dataclass(frozen=True, slots=True)
class Loaded:
    """An adapter in memory, in the banks' layout."""

    name: str
    adapter: Adapter
    serial: int  # tells two adapters of one name apart, one loaded after the other
    rank: int  # highest of its layers
    blocks: Mapping[ComponentId, Mapping[str, Block]]  # component -> path -> block


@dataclass(frozen=True, slots=True)
class AdapterSet:
    """What one request uses: what its slot must hold, and the strength of its rows."""

    parts: tuple[tuple[Loaded, float], ...]  # adapter and the strength that stands in the slot
    strength: float  # strength of the rows
    key: tuple[tuple[int, float], ...]  # equal keys can share a slot

    @property
    def changes_text(self) -> bool:
        """Whether the text encoders need the set; otherwise their results are those without it."""
        return any(component.role == "text_encoder" for loaded, _ in self.parts for component in loaded.blocks)


class Adapters:
    """Adapters by name, and the slots of the banks. `load`, `list` and `unload` are safe from any thread."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self._bundle = bundle
        self._banks = {
            component: Buffers(entry.bank, entry.modules, backend.bank_dtype(component))
            for component, entry in bundle.components.items()
            if entry.bank is not None
        }
        self._loaded: dict[str, Loaded] = {}
        self._lock = threading.Lock()
        self._serials = itertools.count(1)
        slots = min((buffers.bank.slots for buffers in self._banks.values()), default=1)
        self.rank = min((buffers.bank.rank for buffers in self._banks.values()), default=0)
        # the key that each slot holds, least recently used first
        self._slots: OrderedDict[int, tuple[tuple[int, float], ...] | None] = OrderedDict.fromkeys(range(1, slots))

    def load(self, name: str, file: str | Path, *, denoisers: Sequence[str] | None = None) -> Adapter:
        """Read a LoRA file, to be used as `Request(adapters={name: strength})`; returns what it changes.

        denoisers: names of those that it changes, of a model with experts; by default every one that it fits.
        Raises AdapterError if the file is refused, if it changes what the banks cannot hold exactly, or if its rank is
        higher than theirs. Keys of the file that fit no module of the model are in the result's `refused`.
        """
        if not self._banks:
            raise AdapterError("this bundle takes no adapters at run time; export it with --lora-slots")
        adapter = self._read(file, denoisers)
        loaded = Loaded(name, adapter, next(self._serials), *self._blocks(adapter))
        with self._lock:
            if name in self._loaded:
                raise AdapterError(f"an adapter named {name!r} is loaded; unload it first, or choose another name")
            self._loaded[name] = loaded
        adapter.warn_of_refused()
        return adapter

    def _read(self, file: str | Path, denoisers: Sequence[str] | None) -> Adapter:
        """A file as layers; those of a denoiser are layers of all its twins, experts with the same modules."""
        known = [key.name for key in self._bundle.denoisers]
        if odd := [name for name in denoisers or () if name not in known]:
            raise AdapterError(f"the bundle has no denoiser {odd[0]!r}; it has {', '.join(known)}")
        modules: dict[ComponentId, tuple[Module, ...]] = {}
        twins: dict[ComponentId, list[ComponentId]] = {}
        for component, entry in self._bundle.components.items():
            if not entry.modules or component.stage:
                continue
            if component.role == "denoiser":
                if denoisers is not None and component.name not in denoisers:
                    continue
                first = next((one for one in twins if self._bundle.components[one].modules == entry.modules), component)
                twins.setdefault(first, []).append(component)
                if first != component:
                    continue
            modules[component] = entry.modules
        adapter = read_adapter(file, modules)
        spread = [(twin, place) for place in adapter.layers for twin in twins.get(place[0], [place[0]])]
        return replace(
            adapter,
            layers={(twin, place[1]): adapter.layers[place] for twin, place in spread},
            names={(twin, place[1]): adapter.names[place] for twin, place in spread},
        )

    def unload(self, name: str) -> None:
        """Forget an adapter. Requests that were submitted with it still run. Raises AdapterError if there is none."""
        with self._lock:
            if name not in self._loaded:
                raise AdapterError(f"no adapter named {name!r} is loaded; {self._known()}")
            del self._loaded[name]

    def list(self) -> dict[str, Adapter]:
        """The loaded adapters by name."""
        with self._lock:
            return {name: loaded.adapter for name, loaded in self._loaded.items()}

    def choose(self, wanted: Mapping[str, float]) -> AdapterSet | None:
        """The set of a request; None if it uses no adapter. Raises RequestError for names that are not loaded."""
        parts = []
        with self._lock:
            for name, strength in wanted.items():
                if name not in self._loaded:
                    raise RequestError(f"no adapter named {name!r} is loaded; {self._known()}")
                if strength:
                    parts.append((self._loaded[name], strength))
        if not parts:
            return None
        if (total := sum(loaded.rank for loaded, _ in parts)) > self.rank:
            raise RequestError(f"these adapters have rank {total} together; the bundle's banks hold {self.rank}")
        if len(parts) == 1:  # one adapter at any strength is one content of a slot
            return AdapterSet(((parts[0][0], 1.0),), parts[0][1], ((parts[0][0].serial, 1.0),))
        return AdapterSet(tuple(parts), 1.0, tuple(sorted((loaded.serial, strength) for loaded, strength in parts)))

    def acquire(self, wanted: AdapterSet, in_use: Collection[int]) -> int | None:
        """The slot that holds a set, filled if need be; None if all slots are in use. Only the engine's thread calls it."""
        slot = next((slot for slot, key in self._slots.items() if key == wanted.key), None)
        if slot is None:
            slot = next((slot for slot in self._slots if slot not in in_use), None)
            if slot is None:
                return None
            self._slots[slot] = None  # should filling fail, nobody may take it for what it held
            for component, buffers in self._banks.items():
                buffers.fill(slot, [(loaded.blocks.get(component, {}), m) for loaded, m in wanted.parts])
            self._slots[slot] = wanted.key
        self._slots.move_to_end(slot)
        return slot

    def banks(self, component: ComponentId) -> Banks | None:
        """The buffers that a network's graphs read, by input; None if it has no bank. Variants read their network's."""
        return self._banks[component.whole].arrays if component.whole in self._banks else None

    def _known(self) -> str:
        return f"loaded: {', '.join(self._loaded)}" if self._loaded else "none is"

    def _blocks(self, adapter: Adapter) -> tuple[int, dict[ComponentId, dict[str, Block]]]:
        """Highest rank, and every layer in the banks' layout. Raises AdapterError if one is not exactly low-rank."""
        blocks: dict[ComponentId, dict[str, Block]] = {}
        highest = 0
        for component, path, reason in unbindable(adapter, self._bundle):
            raise AdapterError(
                f"{adapter.file} cannot be bound at run time: {component} {path}: {reason}; merge it with "
                "`stepforge export --lora`, or make a low-rank copy with `stepforge lora convert`"
            )
        for (component, path), layer in adapter.layers.items():
            buffers = self._banks[component]
            pair = low_rank(layer, buffers.modules[path].shape)
            assert pair is not None
            if not all(np.isfinite(part).all() for part in pair):
                raise AdapterError(f"{adapter.file}: {component} {path} is infinite once it is scaled")
            highest = max(highest, len(pair[0]))
            blocks.setdefault(component, {})[path] = buffers.block(path, *pair)
        return highest, blocks


def no_adapter(rows: int) -> dict[str, NDArray[Any]]:
    """The inputs of a graph with banks for rows without an adapter."""
    return row_inputs([NONE] * rows, [0.0] * rows)


def row_inputs(slots: Sequence[int], strengths: Sequence[float]) -> dict[str, NDArray[Any]]:
    """The inputs that say which slot each row uses, and how strongly."""
    return {
        "adapter": np.array(slots, np.int64),
        "adapter_strength": np.array(strengths, np.float32).reshape(-1, 1, 1),
    }


class Buffers:
    """The banks of one component."""

    def __init__(self, bank: Bank, modules: tuple[Module, ...], dtype: BankType) -> None:
        self.bank, self._dtype, self._targets = bank, dtype, bank.targets
        self.modules = {module.path: module for module in modules if module.path in self._targets}
        self.arrays = Banks({}, np.zeros(bank.slots, np.int64))
        for name, paths in bank.shared.items():
            shape = self.modules[name].shape
            if self.modules[name].kind == "conv":
                self._allocate(f"{name}.lora_A", bank.rank * math.prod(shape[2:]), shape[1])
                self._allocate(f"{name}.lora_B", shape[0], bank.rank)
                continue
            self._allocate(f"{name}.lora_A", shape[1], bank.rank * len(paths))
            for path in paths:
                self._allocate(f"{path}.lora_B", bank.rank, self.modules[path].shape[0])
        self._filled = {(slot, path): 0 for slot in range(bank.slots) for path in self._targets}  # ranks last held

    def _allocate(self, name: str, rows: int, columns: int) -> None:
        self.arrays[name] = np.zeros(
            (self.bank.slots, rows, columns), self._dtype
        )  # pages are taken when they are filled

    def block(self, path: str, down: Float32, up: Float32) -> Block:
        """A layer's pair, down [r, in·k·k] and up [out, r], in the layout of the bank."""
        module = self.modules[path]
        if module.kind == "conv":
            taps = down.reshape(len(down), module.shape[1], -1).transpose(0, 2, 1)  # [r, k·k, in]
            a, b = taps.reshape(-1, module.shape[1]), np.ascontiguousarray(up)
        else:
            a, b = down.T, np.ascontiguousarray(up.T)
        return Block(len(down), self._stored(a), self._stored(b), b)

    def fill(self, slot: int, parts: Sequence[tuple[Mapping[str, Block], float]]) -> None:
        """Put a set's layers side by side along the rank, and zeros where the slot held more."""
        self.arrays.versions[slot] += 1
        for path in self._targets:
            at = 0
            for blocks, strength in parts:
                if (block := blocks.get(path)) is not None:
                    a, b = self._ranks(slot, path, at, at + block.rank)
                    a[:] = block.a
                    b[:] = block.b if strength == 1.0 else self._stored(block.exact_b * np.float32(strength))
                    at += block.rank
            if (before := self._filled[slot, path]) > at:
                for view in self._ranks(slot, path, at, before):
                    view[:] = 0
            self._filled[slot, path] = at

    def _ranks(self, slot: int, path: str, first: int, last: int) -> tuple[Stored, Stored]:
        """Views of a layer's A and B in a slot, from one rank to another."""
        name, place = self._targets[path]
        a, b = self.arrays[f"{name}.lora_A"][slot], self.arrays[f"{path}.lora_B"][slot]
        if self.modules[path].kind == "conv":
            taps = len(a) // self.bank.rank
            return a[first * taps : last * taps], b[:, first:last]
        offset = place * self.bank.rank
        return a[:, offset + first : offset + last], b[first:last]

    def _stored(self, values: Float32) -> Stored:
        """Contiguous, in the bank's type; uint16 stands for bfloat16, rounded to the nearest, ties to even."""
        values = np.ascontiguousarray(values)
        if self._dtype == np.float32:
            return values
        return values.astype(bfloat16).view(np.uint16)
