"""PyTorch: any component of a bundle, on CUDA with the kernels of `stepforge.kernels` and CUDA graphs, else on the CPU.

The bundle's graph is the program; neither diffusers nor the exporter is needed. Two backends, one for each numerical tier:

`torch-exact`  rounds where diffusers and PEFT round, operator by operator
`torch`        the kernels besides: group norm with SiLU, GEGLU and low-rank layers compute in fp32 and round once

On the CPU the kernels are their references, which prove the logic and are not fast: openvino is what to use there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepforge.runtime.backends import Arrays, Graph, loading, running
from stepforge.runtime.backends.graph_file import checked_graph
from stepforge.runtime.backends.signature import Signature
from stepforge.runtime.backends.torch.banks import DeviceBanks, Shared
from stepforge.runtime.backends.torch.loop import RINGS, Function, Once, TorchLoop
from stepforge.runtime.backends.torch.lora import LoraPasses, drop_lora, fuse_lowrank_geglu, fuse_residual
from stepforge.runtime.backends.torch.passes import exact as passes
from stepforge.runtime.backends.torch.passes.once import STEADY, split_once
from stepforge.runtime.backends.torch.passes.packed import pack_attention
from stepforge.runtime.backends.torch.passes.sums import write_once
from stepforge.runtime.backends.torch.passes.widen import WideLayer, fuse_widen, widen_layers
from stepforge.runtime.backends.torch.precision import computed_in, lower, no_tf32
from stepforge.runtime.backends.torch.program import Program, read, run_passes
from stepforge.runtime.backends.torch.run import Runner
from stepforge.runtime.backends.torch.wide import WideBanks, WideWeight, prepared
from stepforge.runtime.bundle import Bundle, Component, ComponentId
from stepforge.runtime.errors import BackendError

EXACT = (
    passes.fuse_attention,
    passes.fuse_linear,
    passes.add_bias,
    passes.fuse_group_norm,
    passes.fuse_silu,
)
FAST = (passes.fuse_norm_silu, passes.fuse_geglu)
RECORDED = (
    "denoiser",
    "control_hint",
    "control_residuals",
)  # called in every step; the others are called once a request
RESIDUAL = "residual_"  # inputs of denoisers that ControlNets fill
SHARED_FROM = 1024  # elements: larger constants of one weights file are held once


class Torch:
    """`precision="auto"` is bf16 on CUDA, whose range no network exceeds, and fp32 on the CPU.

    Opening one turns tf32 off in cuDNN and cuBLAS for the whole process, and nothing turns it on again: fp32 means fp32,
    for the text encoders of a 16-bit backend too. So backends of different precision in one process want the same settings,
    and neither changes them while the other records or runs.
    """

    name = "torch"
    fast = True

    def __init__(self, bundle: Bundle, *, precision: str, threads: int) -> None:
        self._bundle = bundle
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        on_cuda = self._device.type == "cuda"
        if precision == "auto":
            precision = "bf16" if on_cuda else "fp32"
        if precision == "fp16" and not on_cuda:
            raise BackendError("torch computes fp16 on CUDA only, and there is no CUDA GPU; use precision fp32 or bf16")
        self.precision = precision
        self.versions = {"torch": torch.__version__}
        if not on_cuda:
            torch.set_num_threads(threads)
        no_tf32()
        self._weights: dict[tuple[str, str, Any], Any] = {}
        self._banks: Shared = {}
        self._wide: dict[tuple[str, Any], dict[str, WideWeight]] = {}
        self._buffers: dict[tuple[ComponentId, Any], WideBanks] = {}
        self._pool: Any = None  # memory pool of all recordings: the engine runs one of them at a time

    def bank_dtype(self, component: ComponentId) -> type[np.float32] | type[np.uint16]:
        return np.uint16 if self._dtype_of(component) == torch.bfloat16 else np.float32

    def open(self, component: ComponentId, banks: Arrays | None = None) -> Graph:
        """A component with banks is opened twice over the same weights: calls without an adapter run it without banks. A
        denoiser is opened again when a ControlNet's residuals first come, and when other activations are first kept."""
        with loading(self.name, self._bundle.components[component].graph):
            return self._graph(component, banks)

    def _graph(self, component: ComponentId, banks: Arrays | None) -> TorchGraph:
        networks = functools.partial(self._networks, component, banks)
        settings: dict[str, Any] = {
            "exact": not self.fast, "component": component, "entry": self._bundle.components[component],
        }  # fmt: skip
        if self._device.type == "cpu":
            return TorchGraph(networks, self._device, caller=OnCpu, **settings)
        from stepforge.runtime.backends.torch.cuda import Recorder

        if component.role not in RECORDED:
            # pictures are decoded in another thread: neither they nor the steps wait for each other's work
            caller = functools.partial(Recorder, device=self._device, pool=None)
            return TorchGraph(networks, self._device, caller=caller, stream=torch.cuda.Stream(self._device), **settings)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        caller = functools.partial(Recorder, device=self._device, pool=self._pool)
        return TorchGraph(networks, self._device, caller=caller, **settings)

    def _networks(self, component: ComponentId, banks: Arrays | None, **form: Any) -> tuple[Network, ...]:
        """Without banks, with wide layers, and with the grouped products where a batch can exceed these; form: see `_open`."""
        full = self._open(component, banks or {}, with_lora=True, **form)
        bare = self._open(component, banks, with_lora=False, **form) if banks else full
        if full.wide is None or not full.wide.exceeded:
            return bare, full
        return bare, full, self._open(component, banks or {}, with_lora=True, wide=False, **form)

    def _open(
        self,
        component: ComponentId,
        banks: Arrays,
        *,
        with_lora: bool,
        wide: bool = True,
        residuals: bool = True,
        outputs: tuple[str, ...] | None = None,
    ) -> Network:
        """residuals: of ControlNets; without, what is added of them is left out. outputs: those that are wanted; None: all."""
        dtype = self._dtype_of(component)
        path = checked_graph(self._bundle, component, self._bundle.components[component].graph).path
        program = read(path)
        if outputs is not None:
            program.outputs = outputs
            program.sweep()
        if not with_lora:
            drop_lora(program, banks)
        if not residuals:
            passes.drop_added(program, [name for name in program.inputs if name.startswith(RESIDUAL)])
        run_passes(program, EXACT)
        if self._device.type == "cpu":
            run_passes(program, (passes.copy_images,))
        lora = LoraPasses(exact=not self.fast)
        if self.fast:
            run_passes(program, FAST)
        # on CUDA the kernels leave fp32 to cuBLAS: tensor cores would round it to tf32
        if banks and with_lora and (lora.exact or self._device.type == "cpu" or dtype != torch.float32):
            run_passes(program, (lora.fuse_linear_lora, lora.fuse_conv_lora))
        layers: list[WideLayer] = []
        if self.fast:
            pack_attention(program, lora)
            layers = widen_layers(program) if wide and with_lora else []
            run_passes(program, (write_once, fuse_residual, fuse_lowrank_geglu, fuse_widen))
        lower(program, dtype, self._device, banks)
        self._share(program, str(component.whole), dtype)
        read_names = {name for node in program.nodes for name in node.inputs}
        placed = DeviceBanks(
            banks, lora.views.values(), [name for name in banks if name in read_names],
            device=self._device, dtype=dtype, shared=self._banks, copied=self._device.type != "cpu",
        )  # fmt: skip
        if self._device.type == "cuda":
            channels_last(program)
        buffers = None
        if layers:
            shared = self._wide.setdefault((str(component.whole), dtype), {})
            buffers = self._buffers.get((component, dtype))
            if buffers is None or buffers.layers != layers:
                buffers = WideBanks(layers, program.constants, placed.tensors, shared)
                self._buffers[component, dtype] = buffers
            for layer in layers:  # the same network without banks reads W there
                self._weights[str(component.whole), layer.weight, dtype] = buffers.weight(layer)
                program.constants.pop(layer.weight, None)
        once = None
        if self.fast and component.role == "denoiser":
            once = split_once(program, buffers.names if buffers is not None else ())
        signature = Signature(self._bundle, component, outputs)
        return Network(
            Runner(program), placed, signature, once=Runner(once) if once is not None else None, wide=buffers
        )

    def _dtype_of(self, component: ComponentId) -> Any:
        model = self._bundle.model(component.stage)
        return computed_in(component.role, model.family if model else "", self.precision, exact=not self.fast)

    def _share(self, program: Program, network: str, dtype: Any) -> None:
        """Variants of a network are graphs over one weights file: hold its weights once. By network: an expert's graphs lie in
        the same folder, and its weights have the same names."""
        for name, value in program.constants.items():
            if isinstance(value, torch.Tensor) and value.numel() >= SHARED_FROM:
                program.constants[name] = self._weights.setdefault((network, name, dtype), value)


class TorchExact(Torch):
    name = "torch-exact"
    fast = False


def channels_last(program: Program) -> None:
    """The memory format of tensor cores: a convolution hands its weight's format on to its result."""
    for node in program.nodes:
        if node.op in ("Conv", "LowrankConv", "PeftConv") and node.inputs[1] in program.constants:
            weight = program.constants[node.inputs[1]]
            weight.data = weight.contiguous(memory_format=torch.channels_last)  # also where it is shared


def plain(array: NDArray[Any]) -> NDArray[Any]:
    """Contiguous and writable, as PyTorch wants what it shares, although nothing here writes to it."""
    return np.require(array, requirements=["C", "W"])


class Network:
    """A program with its banks. once: the part that needs the prompts and adapters alone."""

    def __init__(
        self,
        runner: Runner,
        banks: DeviceBanks,
        signature: Signature,
        *,
        once: Runner | None,
        wide: WideBanks | None,
    ) -> None:
        self.wide, self._signature = wide, signature
        self.program = runner.program
        self.once_inputs = tuple(name for name in once.program.inputs if name in STEADY) if once is not None else ()
        self._runner, self._banks, self._once = runner, banks, once

    def refresh(self) -> None:
        self._banks.refresh()

    def lay(self, slots: tuple[int, ...]) -> None:
        """Put the adapters of these slots into the columns of the wide layers."""
        if self.wide is not None:
            self.wide.lay(slots, self._banks.version(slots))

    def once(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """What may be kept while the inputs `once_inputs` do not change; the call takes it among its inputs."""
        return self._once({**given, **self._columns(given)}) if self._once is not None else {}

    def __call__(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._once is not None and self._once.program.outputs[0] not in given:
            given = {**given, **self.once(given)}
        found = self._runner({**given, **self._banks.tensors, **self._columns(given)})
        self._signature.check(given, found)  # where calls are recorded, once
        return found

    def _columns(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.wide.tensors(given["adapter_columns"].shape[1]) if self.wide is not None else {}


class OnCpu:
    """Calls a function of tensors as `cuda.Recorder` does."""

    def __init__(self, function: Function, *, changes: Sequence[Tensor] = (), once: Once | None = None) -> None:
        self._function = function

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        return {name: value.float().numpy() for name, value in self._run(inputs).items()}

    @staticmethod
    def bucket(rows: int) -> int:
        return rows

    def start(self, inputs: Arrays, steady: Sequence[str], pads: Mapping[str, tuple[int, int]]) -> None:
        self._run(inputs)

    def _run(self, inputs: Arrays) -> dict[str, Tensor]:
        return self._function({name: torch.from_numpy(plain(array)) for name, array in inputs.items()})


class TorchGraph:
    """opened: makes the networks of a form: without banks, for calls in which no row has an adapter, with wide layers, and with
    the grouped products for more adapters than these hold (the exact tier has one with banks, and PEFT's operators in it)."""

    rings = RINGS
    runs_plans = True

    def __init__(
        self,
        opened: Callable[..., tuple[Network, ...]],
        device: Any,
        *,
        exact: bool,
        caller: Callable[..., Any],
        component: ComponentId,
        entry: Component,
        stream: Any = None,
    ) -> None:
        self._stream = stream  # torch.cuda.Stream; None: the current one
        self._device, self._exact, self._caller = device, exact, caller
        self._component, self._opened = component, opened
        self._outputs = tuple(tensor.name for tensor in entry.outputs)
        self._reads_residuals = any(tensor.name.startswith(RESIDUAL) for tensor in entry.inputs)
        self._forms: dict[tuple[bool, tuple[str, ...]], tuple[Network, ...]] = {}
        self._callers: dict[int, Any] = {}  # by the network's id
        self.networks = self.chosen(residuals=False, outputs=("prediction",) if component.role == "denoiser" else None)

    def chosen(self, *, residuals: bool, outputs: Collection[str] | None = None) -> tuple[Network, ...]:
        """residuals: whether a call has any; outputs: those that it wants, None for all."""
        wanted = tuple(name for name in self._outputs if outputs is None or name in outputs)
        form = residuals and self._reads_residuals, wanted
        if form not in self._forms:
            with self._on_stream():  # weights are there before a call reads them
                self._forms[form] = self._opened(residuals=form[0], outputs=wanted if self._outputs else None)
        return self._forms[form]

    def _on_stream(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    @torch.inference_mode()
    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        with running("torch", self._component), self._on_stream():
            networks = self.chosen(residuals=any(name.startswith(RESIDUAL) and a.any() for name, a in inputs.items()))
            at, inputs = prepared(networks, inputs)
            network = networks[at]
            if id(network) not in self._callers:
                self._callers[id(network)] = self._caller(network, once=(network.once, network.once_inputs))
            found: dict[str, NDArray[np.float32]] = self._callers[id(network)]({n: plain(a) for n, a in inputs.items()})
            return found

    def loop(self, shape: tuple[int, int, int]) -> TorchLoop:
        return TorchLoop(self, shape, device=self._device, exact=self._exact, caller=self._caller)
