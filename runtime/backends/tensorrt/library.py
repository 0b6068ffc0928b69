"""TensorRT's two Python packages, `tensorrt` (10 and 11) and `tensorrt_rtx` (1), behind one door.

They share names and calls; what differs between them, and between releases, stands in `LIBRARIES` and in this file's
functions, nowhere else:

                          tensorrt                                  tensorrt_rtx
    plans are for         the GPU that builds them                  stated compute capabilities; no GPU needed to build
    weight stripping      REFIT_IDENTICAL (REFIT may drop a bias,   REFIT; needs a GPU and one target: 1.7.1 fails in
                          release notes of 11.3)                    code generation without one (tests/engines)
    timing cache          kept between builds                       no effect, and asks for a GPU: never set
    version compatible    yes, with a lean runtime of its own       no
    Python plugins        compiled ahead of time, as PTX            none: its networks have no add_plugin_v3
    CUDA graphs           captured as they are                      REQUIRE_USER_ALLOCATION, else capture may fail
    strong typing         a flag of the network in both; the only mode of 11 and of RTX
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from stepforge.runtime.errors import BackendError

if TYPE_CHECKING:
    import tensorrt_rtx as trt  # `make test-engines` checks this file against stubs of the installed package

Version = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Traits:
    """What a package can do; see the table above."""

    package: str
    oldest: Version
    before: Version  # first version that is not known
    targets: tuple[str, ...]  # compute capabilities that can be built for without having them
    refit: str  # flag of a plan without weights
    has_timing_cache: bool
    has_versions: bool  # plans that newer releases can load
    has_plugins: bool  # kernels of ours as PTX inside its plans
    lean: str = ""  # package that loads these, and builds nothing
    flags: tuple[str, ...] = ()  # always set


LIBRARIES: Mapping[str, Traits] = {
    "tensorrt": Traits(
        "tensorrt", (10, 8), (12,), targets=(), refit="REFIT_IDENTICAL", has_timing_cache=True, has_versions=True,
        has_plugins=True, lean="tensorrt_lean",
    ),
    "tensorrt-rtx": Traits(
        "tensorrt_rtx", (1, 3), (2,), targets=("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121"), refit="REFIT",
        has_timing_cache=False, has_versions=False, has_plugins=False, flags=("REQUIRE_USER_ALLOCATION",),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How a plan is built, beside its profiles. level: effort of the search for kernels, None: the library's own."""

    targets: tuple[str, ...] = ()  # empty: the GPU of this machine
    strip_weights: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False  # a plan of `tensorrt` for every GPU from Ampere on
    level: int | None = None
    workspace: int | None = None  # bytes that a layer may ask for
    lora_plugin: bool = False  # LoRA's first product by our kernel


class Library:
    """One of the packages, imported. Raises BackendError if it is missing or of an unknown release."""

    def __init__(self, name: str, *, to_run: bool = False) -> None:
        """to_run: the lean runtime will do, where the package itself is missing."""
        if name not in LIBRARIES:
            raise BackendError(f"engine {name!r} is unknown; choose one of {', '.join(LIBRARIES)}")
        self.name, self.traits = name, LIBRARIES[name]
        package, lean = self.traits.package, self.traits.lean
        self.is_lean = to_run and bool(lean) and find_spec(package) is None and find_spec(lean) is not None
        try:
            self.module: Any = importlib.import_module(lean if self.is_lean else package)
        except ModuleNotFoundError as error:
            raise BackendError(
                f"backend {name!r} needs the package {error.name}; pip install 'stepforge[{name}]'"
            ) from error
        except (ImportError, OSError, RuntimeError) as error:  # a library of the system's that is missing
            raise BackendError(f"{self.traits.package} cannot be imported: {str(error).splitlines()[0]}") from error
        self.version = str(self.module.__version__)
        number = tuple(int(part) for part in self.version.split(".")[:3] if part.isdigit())
        if not self.traits.oldest <= number < self.traits.before:
            low, high = (".".join(map(str, version)) for version in (self.traits.oldest, self.traits.before))
            raise BackendError(f"{self.traits.package} is {self.version}; from {low} and below {high} is known to work")

    def check(self, options: BuildOptions) -> None:
        """Raises BackendError for what this package cannot do."""
        traits = self.traits
        if unknown := [target for target in options.targets if target not in traits.targets]:
            known = (
                f"choose of {', '.join(traits.targets)}"
                if traits.targets
                else "its plans are for the GPU they are built on"
            )
            raise BackendError(f"{self.name} does not build for {', '.join(unknown)}: {known}")
        if options.version_compatible and not traits.has_versions:
            raise BackendError(f"{self.name} has no version-compatible plans; rebuild them when it is updated")
        if options.hardware_compatible and traits.targets:
            raise BackendError(f"{self.name} takes targets in place of hardware compatibility")
        if options.strip_weights and len(options.targets) > 1:
            raise BackendError(f"{self.name} builds plans without weights for one target at a time")
        if options.lora_plugin and not traits.has_plugins:
            raise BackendError(f"{self.name} has no plugins; build without --lora-plugin")
        if options.lora_plugin and options.version_compatible:
            raise BackendError(
                "--lora-plugin makes plans for the release that builds them: leave --version-compatible out"
            )

    def plugins(self) -> Any:
        """The package's module of Python plugins. Raises BackendError where it has none that are compiled ahead of time."""
        if not self.traits.has_plugins or not hasattr(self.module, "QuickPluginCreationRequest"):
            raise BackendError(f"{self.name} {self.version} has no plugins that are compiled ahead of time; update it")
        return importlib.import_module(f"{self.traits.package}.plugin")

    def network(self, builder: trt.Builder) -> trt.INetworkDefinition:
        """An empty strongly typed network: types are the graph's, and none is chosen by the builder."""
        flag = self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        network: trt.INetworkDefinition = builder.create_network(1 << int(flag))
        return network

    def configure(self, config: trt.IBuilderConfig, options: BuildOptions) -> None:
        """Set the flags of a build. Neither package uses TF32: fp32 means fp32."""
        module = self.module
        flags = [*self.traits.flags]
        if options.strip_weights:
            flags += ["STRIP_PLAN", self.traits.refit]
        if (
            options.version_compatible
        ):  # host code in a plan is code that `load` would run: the lean runtime is installed
            flags += ["VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"]
        for flag in flags:
            config.set_flag(getattr(module.BuilderFlag, flag))
        config.clear_flag(module.BuilderFlag.TF32)
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
        if options.hardware_compatible:
            config.hardware_compatibility_level = module.HardwareCompatibilityLevel.AMPERE_PLUS
        if options.level is not None:
            config.builder_optimization_level = options.level
        if options.workspace is not None:
            config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace)
        if self.traits.targets:
            config.num_compute_capabilities = max(1, len(options.targets))
            for at, target in enumerate(options.targets or ("current",)):
                name = target.replace("sm_", "SM") if options.targets else "CURRENT"
                config.set_compute_capability(getattr(module.ComputeCapability, name), at)

    def timing_cache(self, config: trt.IBuilderConfig, data: bytes) -> Any:
        """The builder's measurements of earlier builds, empty bytes for none; None where the package has no use for them."""
        if not self.traits.has_timing_cache:
            return None
        cache = config.create_timing_cache(data)
        config.set_timing_cache(cache, False)
        return cache

    def errors(self, parser: trt.OnnxParser) -> list[str]:
        return [str(parser.get_error(at).desc()) for at in range(parser.num_errors)]

    def contexts(self, engine: trt.ICudaEngine, kept: bytes) -> tuple[Callable[[], trt.IExecutionContext], Any]:
        """What makes contexts whose activations lie in memory of the caller's (`set_device_memory`), and RTX's runtime cache.

        kept: contents of such a cache, which has what RTX compiled for this GPU; empty for none.
        """
        strategy = self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.traits.targets:
            return lambda: engine.create_execution_context(strategy), None
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        cache: Any = config.create_runtime_cache()
        if kept:
            cache.deserialize(kept)
        config.set_runtime_cache(cache)
        return lambda: engine.create_execution_context(config), cache

    def dtype(self, value: trt.DataType) -> str:
        """ "float32", "bfloat16", ... of a DataType."""
        name = str(value.name).lower()
        return {"float": "float32", "half": "float16", "bf16": "bfloat16"}.get(name, name)
