"""Images that stay on the device: latents, coefficients and step counters live here, and a call is a whole step.

    sample → ControlNets → denoiser → guidance → x_{k+1} = Σ keep·x + Σ gain·p + noise·z → the next step's sample

On CUDA the whole line is one recorded graph for each bucket of rows: the images' places and their rows are data. Rows of
padding belong to one spare place, whose plan is done: they run through the network, and nothing is moved. From step to
step only fresh noise crosses from the host, because it equals PyTorch's CPU generator, and the ControlNets' scales; prompts,
hints, adapter slots and strengths when they change, and with them what the network makes of these alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepforge.kernels import ops as kernels
from stepforge.runtime.backends import Arrays, SideCall, StepTable
from stepforge.runtime.backends.torch.program import Program
from stepforge.runtime.backends.torch.wide import prepared

Function = Callable[[dict[str, Tensor]], dict[str, Tensor]]
Once = tuple[Function, Sequence[str]]  # what may be kept while these inputs do not change
RINGS = (3, 5)  # the longest windows of all samplers; shorter ones leave coefficients at 0
PLACES, STEPS = 8, 64  # initial capacity, doubled on demand


class Network(Protocol):
    """A denoiser without or with its banks, on tensors."""

    program: Program
    once_inputs: tuple[str, ...]
    wide: Any

    def once(self, given: dict[str, Tensor]) -> dict[str, Tensor]: ...

    def __call__(self, given: dict[str, Tensor]) -> dict[str, Tensor]: ...

    def refresh(self) -> None: ...

    def lay(self, slots: tuple[int, ...]) -> None: ...


class Starter(Protocol):
    """start pads inputs, by name, to a length and with a value."""

    @staticmethod
    def bucket(rows: int) -> int: ...

    def start(self, inputs: Arrays, steady: Sequence[str], pads: Mapping[str, tuple[int, int]]) -> None: ...


class TorchLoop:
    """networks: the denoiser as calls without an adapter run it, and as those with one do. caller: what calls a function on
    the device, `cuda.Recorder` or its like for the CPU. exact: guidance rounds where diffusers' pipelines round."""

    def __init__(
        self,
        networks: tuple[Network, ...],
        shape: tuple[int, int, int],
        *,
        device: Any,
        exact: bool,
        caller: Callable[..., Starter],
    ) -> None:
        self._networks, self._shape, self._device, self._exact = networks, shape, device, exact
        self._caller = caller
        self._places, self._steps = PLACES, STEPS
        self._tensors: dict[str, Tensor] = {}
        self._strengths: dict[int, NDArray[np.float32]] = {}  # by place, of the steps to come
        self._strength = np.zeros((0, 1, 1), np.float32)  # of the last call's rows: equal ones need not cross again
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
            "step": (places + 1,),
            "state": (places + 1, window, size),
            "z": (places + 1, size),
            "sample": (places + 1, size),
        }
        if self._tensors and self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # recordings that go may still be running
        old = self._tensors
        self._tensors = {
            name: torch.zeros(shape, dtype=torch.int32 if name == "step" else torch.float32, device=self._device)
            for name, shape in shapes.items()
        }
        for name, tensor in old.items():
            self._tensors[name][tuple(slice(length) for length in tensor.shape)] = tensor
        self._tensors["step"][places] = steps
        self._tensors["sample"][places] = 0.0
        self._starters: dict[tuple[Any, ...], Starter] = {}

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
        for name in ("t", "guidance", "table", "scale_in"):
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
    ) -> None:
        if "adapter" in inputs:
            strength = np.array([self._strengths[int(owner)][0] for owner in owners], np.float32).reshape(-1, 1, 1)
            if not np.array_equal(strength, self._strength):
                self._strength = strength
            inputs = {**inputs, "adapter_strength": self._strength}
        which, inputs = prepared(self._networks, inputs)
        for place, values in noise.items():
            z = torch.from_numpy(values)
            # from other memory the copy would wait for the steps before it
            z = z.pin_memory() if self._device.type == "cuda" else z
            self._tensors["z"][place].copy_(z, non_blocking=True)
        given = {**inputs, "places": places, "sources": sources, "owners": owners}
        starter, spare = self._starter(which, sides), self._places
        rows = starter.bucket(len(owners))
        pads = {name: (rows, 0) for name, array in inputs.items() if len(array) == len(owners)}
        pads |= {"places": (rows, spare), "sources": (rows, 0), "owners": (rows, spare)}
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

    def _starter(self, which: int, sides: Sequence[SideCall]) -> Starter:
        key = which, *(side.component for side in sides)
        if key not in self._starters:
            nets = [cast(Any, side.graph).networks[0] for side in sides]
            network = self._networks[which]
            function = self._function(network, nets)
            changes = [self._tensors[name] for name in ("step", "state", "sample")]
            self._starters[key] = self._caller(function, changes=changes, once=(network.once, network.once_inputs))
        return self._starters[key]

    @torch.inference_mode()
    def get(self, place: int) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._tensors["state"][place].cpu().numpy()
        return found

    def _function(self, network: Network, nets: Sequence[Network]) -> Function:
        """The step with the present tensors."""
        tensors, steps = self._tensors, self._steps

        def step(told: dict[str, Tensor]) -> dict[str, Tensor]:
            given = dict(told)
            places, sources, owners = (given.pop(name) for name in ("places", "sources", "owners"))
            at = owners * (steps + 1) + tensors["step"].index_select(0, owners).clamp_(0, steps)
            given["sample"] = tensors["sample"].index_select(0, owners).view(-1, *self._shape)
            given["timestep"] = tensors["t"].view(-1).index_select(0, at)
            prediction = network({**given, **_residuals(nets, given)})["prediction"]
            kernels.guide_update(
                prediction.reshape(len(owners), -1).contiguous(), tensors["guidance"], tensors["table"],
                tensors["scale_in"], tensors["step"], tensors["state"], tensors["z"], tensors["sample"], places, sources,
                num_x=RINGS[0], exact=self._exact,
            )  # fmt: skip
            return {}

        return step


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
