"""Images that stay on the device: latents, coefficients and step counters live here, and a call is a whole step.

    sample → ControlNets → denoiser → guidance → x_{k+1} = Σ keep·x + Σ gain·p + noise·z → the next step's sample

On CUDA the whole line is one recorded graph for each bucket of rows: the images' places and their rows are data. Rows of
padding belong to one spare place, whose plan is done: they run through the network, and nothing is moved. From step to
step only fresh noise crosses from the host, because it equals PyTorch's CPU generator, and the ControlNets' scales; prompts,
hints, adapter slots and strengths when they change, and with them what the network makes of these alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepforge.kernels import ops as kernels
from stepforge.runtime.backends import Arrays, NetworkCall, SideCall, StepTable
from stepforge.runtime.backends.torch import guide
from stepforge.runtime.backends.torch.program import Program
from stepforge.runtime.backends.torch.wide import prepared

Function = Callable[[dict[str, Tensor]], dict[str, Tensor]]
Once = tuple[Function, Sequence[str]]  # what may be kept while these inputs do not change
RINGS = (3, 5)  # the longest windows of all samplers; shorter ones leave coefficients at 0
PLACES, STEPS = 8, 64  # initial capacity, doubled on demand
MOST_KINDS = 16  # kinds of steps whose recordings are kept, LRU: networks, ControlNets, what is kept, parts of guiders
EMPTY, SPARE, FIRST = 0, 1, 2  # rows of kept activations: zeros, what nobody reads, those of the first place
KEEP, READ, OTHER = "keep", "read", "mean of this and"


class Network(Protocol):
    """A denoiser without or with its banks, on tensors."""

    program: Program
    once_inputs: tuple[str, ...]
    wide: Any

    def once(self, given: dict[str, Tensor]) -> dict[str, Tensor]: ...

    def __call__(self, given: dict[str, Tensor]) -> dict[str, Tensor]: ...

    def refresh(self) -> None: ...

    def lay(self, slots: tuple[int, ...]) -> None: ...


class Networks(Protocol):
    """A denoiser's networks; see `backend.TorchGraph`."""

    def chosen(self, *, residuals: bool, outputs: Collection[str] | None = None) -> tuple[Network, ...]: ...


class Starter(Protocol):
    """start pads inputs, by name, to a length and with a value."""

    @staticmethod
    def bucket(rows: int) -> int: ...

    def start(self, inputs: Arrays, steady: Sequence[str], pads: Mapping[str, tuple[int, int]]) -> None: ...


class TorchLoop:
    """graph: the denoiser, in its forms for calls with and without adapters and ControlNets. caller: what calls a function on
    the device, `cuda.Recorder` or its like for the CPU. exact: guidance rounds where diffusers' pipelines round."""

    def __init__(
        self,
        graph: Networks,
        shape: tuple[int, int, int],
        *,
        device: Any,
        exact: bool,
        caller: Callable[..., Starter],
    ) -> None:
        self._graph, self._shape, self._device, self._exact = graph, shape, device, exact
        self._caller = caller
        self._places, self._steps = PLACES, STEPS
        self._tensors: dict[str, Tensor] = {}
        self._strengths: dict[int, NDArray[np.float32]] = {}  # those of the steps to come, by place
        self._parts: dict[int, frozenset[str]] = {}  # guiders' parts, by place
        self._steady: dict[str, NDArray[Any]] = {}  # inputs of the last call by name: equal ones need not cross again
        self._kept: dict[str, Tensor] = {}  # activations by name, [FIRST + 2·places, ...]: two rows an image
        self._kept_places = 0
        self._allocate()

    @torch.inference_mode()
    def _allocate(self) -> None:
        """Room for all places and steps, with what stands there already. What was recorded before is void."""
        places, steps, window = self._places, self._steps, sum(RINGS)
        size = self._shape[0] * self._shape[1] * self._shape[2]
        shapes: dict[str, tuple[int, ...]] = {
            "t": (places + 1, steps + 1),  # read for the spare place too, whose step is behind the last
            "guidance": (places + 1, steps, 2),
            "table": (places + 1, steps, window + 1),
            "scale_in": (places + 1, steps + 1),
            "denoised": (places + 1, steps, 2),
            "guider": (places + 1, len(guide.NUMBERS)),
            "change": (places + 1, size),  # APG's
            "taken": (places + 1, steps, 2),  # weights of predictions that are guided already
            "step": (places + 1,),
            "state": (places + 1, window, size),
            "z": (places + 1, size),
            "sample": (places + 1, size),
        }
        if self._tensors:
            self._wait()
        old = self._tensors
        kinds = {"step": torch.int32, "denoised": torch.float64}
        self._tensors = {
            name: torch.zeros(shape, dtype=kinds.get(name, torch.float32), device=self._device)
            for name, shape in shapes.items()
        }
        for name, tensor in old.items():
            self._tensors[name][tuple(slice(length) for length in tensor.shape)] = tensor
        self._tensors["step"][places] = steps
        self._tensors["sample"][places] = 0.0
        self._tensors["taken"][..., 0] = 1.0
        self._starters: OrderedDict[tuple[Any, ...], Starter] = OrderedDict()

    @torch.inference_mode()
    def put(self, place: int, state: NDArray[np.float32], steps: StepTable) -> None:
        count = len(steps.t)
        if place >= self._places or count > self._steps:
            while place >= self._places:
                self._places *= 2
            while count > self._steps:
                self._steps *= 2
            self._allocate()
        self._strengths[place] = steps.adapter_strength
        self._parts[place] = guide.parts(steps.guider)
        self._tensors["guider"][place] = torch.tensor(guide.numbers(steps.guider)).to(self._device)
        self._tensors["change"][place] = 0.0
        for name in ("t", "guidance", "table", "scale_in", "denoised"):
            values = torch.from_numpy(getattr(steps, name))
            self._tensors[name][place, : len(values)] = values.to(self._device)
        self._tensors["state"][place] = torch.from_numpy(state).to(self._device)
        self._tensors["sample"][place] = self._tensors["state"][place, 0] * float(steps.scale_in[0])
        self._tensors["step"][place] = 0

    @torch.inference_mode()
    def step(
        self,
        places: NDArray[np.int32],
        sources: NDArray[np.int32],
        owners: NDArray[np.int32],
        inputs: Arrays,
        noise: Mapping[int, NDArray[np.float32]],
        sides: Sequence[SideCall] = (),
        call: NetworkCall | None = None,
    ) -> None:
        if "adapter" in inputs:
            strength = np.array([self._strengths[int(owner)][0] for owner in owners], np.float32).reshape(-1, 1, 1)
            inputs = {**inputs, "adapter_strength": self._same("adapter_strength", strength)}
        graph = self._graph if call is None else cast(Any, call.graph)
        kept_names = [name for kept in call.keep for name in kept.names] if call is not None else []
        networks = graph.chosen(residuals=bool(sides), outputs=("prediction", *kept_names))
        which, inputs = prepared(networks, inputs)
        for place, values in noise.items():
            z = torch.from_numpy(values)
            # from other memory the copy would wait for the steps before it
            z = z.pin_memory() if self._device.type == "cuda" else z
            self._tensors["z"][place].copy_(z, non_blocking=True)
        given = {**inputs, "places": places, "sources": sources, "owners": owners}
        kept = self._kept_rows(owners, call) if call is not None else {}
        asked = frozenset[str]().union(*(self._parts[place] for place in places.tolist()))
        starter, spare = self._starter(networks[which], sides, call, tuple(kept), asked), self._places
        rows = starter.bucket(len(owners))
        pads = {name: (rows, 0) for name, array in inputs.items() if len(array) == len(owners)}
        pads |= {"places": (rows, spare), "sources": (rows, 0), "owners": (rows, spare)}
        given |= kept
        pads |= {name: (rows, SPARE if name.startswith(KEEP) else EMPTY) for name in kept}
        for at, side in enumerate(sides):
            own = {f"{at}.{name}": array for name, array in side.inputs.items()}
            pads |= {name: (starter.bucket(len(side.rows)), 0) for name in own}
            if len(side.rows) < len(owners):
                own[f"{at}.rows"] = side.rows
                pads[f"{at}.rows"] = starter.bucket(len(side.rows)), rows
            given |= own
        starter.start(given, tuple(given), pads)
        for place in places.tolist():
            self._strengths[place] = self._strengths[place][1:]

    def _same(self, name: str, value: NDArray[Any]) -> NDArray[Any]:
        """The array of the last call, if this one is equal."""
        if name not in self._steady or not np.array_equal(self._steady[name], value):
            self._steady[name] = value
        return self._steady[name]

    def _kept_rows(self, owners: NDArray[np.int32], call: NetworkCall) -> dict[str, NDArray[np.int32]]:
        """Rows of the kept activations that a call's rows write and read; two of each to read where some take a mean."""
        first = FIRST + 2 * owners
        found: dict[str, NDArray[np.int32]] = {}
        for kept in call.keep:
            self._make_room(int(owners[kept.rows].max()))
            found[f"{KEEP} {kept.names}"] = np.where(kept.rows, first + call.roles, SPARE).astype(np.int32)
        for kept in call.read:
            found[f"{READ} {kept.names}"] = np.where(kept.rows, first, first + call.roles).astype(np.int32)
            if kept.rows.any():
                found[f"{OTHER} {kept.names}"] = np.where(kept.rows, first + 1, first + call.roles).astype(np.int32)
        return {name: self._same(name, value) for name, value in found.items()}

    def _make_room(self, place: int) -> None:
        """Room for what is kept of the images up to this place. What was recorded before is void."""
        if place < self._kept_places:
            return
        self._kept_places = max(place + 1, 2 * self._kept_places)
        if self._kept:
            self._wait()
            for name, old in self._kept.items():
                self._kept[name] = old.new_zeros(FIRST + 2 * self._kept_places, *old.shape[1:])
                self._kept[name][: len(old)] = old
            self._starters.clear()

    def _starter(
        self,
        network: Network,
        sides: Sequence[SideCall],
        call: NetworkCall | None,
        kept: tuple[str, ...],
        asked: frozenset[str],
    ) -> Starter:
        key = id(network), *(side.component for side in sides), kept, asked
        if key not in self._starters:
            if len(self._starters) == MOST_KINDS:
                self._wait()
                self._starters.popitem(last=False)
            nets = [cast(Any, side.graph).networks[0] for side in sides]
            function = self._function(network, nets, call, asked)
            changes = [self._tensors[name] for name in ("step", "state", "sample", "change")]
            self._starters[key] = self._caller(function, changes=changes, once=(network.once, network.once_inputs))
        self._starters.move_to_end(key)
        return self._starters[key]

    def _wait(self) -> None:
        """Recordings that go may still be running."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    @torch.inference_mode()
    def get(self, place: int) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._tensors["state"][place].cpu().numpy()
        return found

    def _function(
        self, network: Network, nets: Sequence[Network], call: NetworkCall | None, asked: frozenset[str]
    ) -> Function:
        """The step with the present tensors. asked: parts of guiders."""
        tensors, steps = self._tensors, self._steps
        keep = [kept.names for kept in call.keep] if call is not None else []
        read = [kept.names for kept in call.read] if call is not None else []

        def step(told: dict[str, Tensor]) -> dict[str, Tensor]:
            given = dict(told)
            places, sources, owners = (given.pop(name) for name in ("places", "sources", "owners"))
            at = owners * (steps + 1) + tensors["step"].index_select(0, owners).clamp_(0, steps)
            given["sample"] = tensors["sample"].index_select(0, owners).view(-1, *self._shape)
            given["timestep"] = tensors["t"].view(-1).index_select(0, at)
            for names in read:
                rows, others = given.pop(f"{READ} {names}"), given.pop(f"{OTHER} {names}", None)
                given |= {name: self._recalled(name, rows, others) for name in names}
            found = network({**given, **_residuals(nets, given)})
            for names in keep:
                for name in names:
                    self._keep(name, given[f"{KEEP} {names}"], found[name])
            prediction, weights = found["prediction"].reshape(len(owners), -1).contiguous(), tensors["guidance"]
            if asked:
                prediction, weights = self._guided(asked, prediction, places, sources), tensors["taken"]
                sources = torch.arange(len(places), dtype=torch.int32, device=self._device)[:, None].repeat(1, 2)
            kernels.guide_update(
                prediction, weights, tensors["table"], tensors["scale_in"], tensors["step"], tensors["state"], tensors["z"],
                tensors["sample"], places, sources, num_x=RINGS[0], exact=self._exact,
            )  # fmt: skip
            return {}

        return step

    def _guided(self, asked: frozenset[str], prediction: Tensor, places: Tensor, sources: Tensor) -> Tensor:
        """The guided prediction of each place, [n, E] in fp32."""
        tensors, at = self._tensors, places.long()
        k = tensors["step"].index_select(0, places).clamp(max=self._steps - 1).long()
        own, x = tensors["guider"].index_select(0, places), tensors["state"][at, k % RINGS[0]]
        p, change = guide.guided(
            asked, prediction, sources, tensors["guidance"][at, k], own, x, tensors["denoised"][at, k],
            tensors["change"].index_select(0, places),
        )  # fmt: skip
        tensors["change"].index_copy_(0, at, change)
        return p

    def _keep(self, name: str, rows: Tensor, values: Tensor) -> None:
        if name not in self._kept:  # in the warm-up, not while it is recorded
            self._kept[name] = values.new_zeros(FIRST + 2 * self._kept_places, *values.shape[1:])
        self._kept[name].index_copy_(0, rows.long(), values)

    def _recalled(self, name: str, rows: Tensor, others: Tensor | None) -> Tensor:
        """What was kept in these rows, or the mean of it and of what was in others."""
        own = self._kept[name].index_select(0, rows)
        return own if others is None else torch.lerp(own, self._kept[name].index_select(0, others), 0.5)


def _residuals(nets: Sequence[Network], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums of the ControlNets' residuals, in fp32 as on the host: [R, C, h, w], or [R, C, 1, 1] of those that pool. A row
    of padding among a ControlNet's rows is R: it reads the last row, and what it gives is cut off."""
    totals: dict[str, Tensor] = {}
    for at, net in enumerate(nets):
        rows = given.get(f"{at}.rows")
        read = {}
        for name in net.program.inputs:
            if name in ("hint", "scale"):
                read[name] = given[f"{at}.{name}"]
            else:
                own = given[name]
                read[name] = own if rows is None else own.index_select(0, rows.clamp(max=len(own) - 1))
        for name, value in net(read).items():
            if name not in given:  # the denoiser does not take it
                continue
            own = value.float()
            if rows is not None:
                count = len(given["sample"])
                own = own.new_zeros(count + 1, *own.shape[1:]).index_copy_(0, rows.long(), own)[:count]
            totals[name] = totals[name] + own if name in totals else own
    return totals
