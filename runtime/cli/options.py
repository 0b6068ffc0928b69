"""Options that several commands share: what they are called, what their help says, and what they mean together."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from stepforge.runtime.checks import shown, whole
from stepforge.runtime.cli.inputs import (
    parse_adapters,
    parse_controls,
    parse_init,
    parse_micro,
    parse_numbers,
    parse_stages,
)
from stepforge.runtime.errors import BackendError, RequestError

if TYPE_CHECKING:
    from stepforge.runtime.engine import Engine

UNITS = {"M": 1 << 20, "G": 1 << 30}

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle directory, or `fake` for a test model.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]

# What is drawn
AdapterTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="[NAME=]FILE[:STRENGTH]",
        help="Load a LoRA file and use it; lines of a file that have adapters use those alone. Repeatable.",
    ),
]
Negative = Annotated[str, typer.Option(metavar="TEXT", help="Negative prompt.")]
Pixels = Annotated[int | None, typer.Option(metavar="PIXELS", help="[default: model's]")]
Images = Annotated[int, typer.Option(metavar="N", help="Images for each prompt.")]
PromptSyntax = Annotated[str, typer.Option(metavar="NAME", help="a1111: (word:1.3) weights; plain: brackets are text.")]

# What a picture starts from
InitImage = Annotated[
    Path | None,
    typer.Option("--init", metavar="IMAGE", help="Start from this image (img2img; inpainting with --mask)."),
]
InitMask = Annotated[Path | None, typer.Option("--mask", metavar="IMAGE", help="White is drawn anew, black is kept.")]
InitStrength = Annotated[
    float | None,
    typer.Option("--strength", metavar="X", help="Share of the steps that run. [default: 0.8; with a mask 1]"),
]
InitOverlay = Annotated[
    bool, typer.Option("--overlay", help="Put the image's own pixels back where the mask is black.")
]

# What decides a plan
Steps = Annotated[int, typer.Option("--steps", "-n", metavar="N", help="Denoising steps.")]
Sampler = Annotated[
    str | None, typer.Option(metavar="NAME", help="ddim, euler, dpmpp_2m, unipc, ... [default: model's]")
]
Schedule = Annotated[
    str | None, typer.Option(metavar="NAME", help="normal, karras, exponential or beta. [default: model's]")
]
Spacing = Annotated[str | None, typer.Option(metavar="NAME", help="linspace, leading or trailing. [default: model's]")]
Timesteps = Annotated[str | None, typer.Option(metavar="LIST", help="Custom timesteps, falling: 999,850,700,...")]
Sigmas = Annotated[str | None, typer.Option(metavar="LIST", help="Custom sigmas, falling: 14.6,7.2,...")]
Eta = Annotated[float | None, typer.Option(metavar="X", help="Stochasticity of ddim and tcd, 0 to 1.")]
GuidanceText = Annotated[
    str | None,
    typer.Option(
        "--guidance",
        "-g",
        metavar="TEXT",
        help="Weight w, one a step (7,7,1,1), or a schedule: interval(7.5, sigma=0.28..5.42). [default: 7.5]",
    ),
]
GuiderText = Annotated[
    str | None,
    typer.Option(
        "--guider",
        metavar="TEXT",
        help="cfg, rescale(0.7), dynamic, zero_star, apg, adaptive; joined by +. [default: cfg]",
    ),
]
ReuseText = Annotated[
    str | None,
    typer.Option("--reuse", metavar="TEXT", help="Approximate: deepcache(3), tgate(0.5); joined by +. [default: none]"),
]
ExpertsText = Annotated[
    str | None,
    typer.Option(
        "--experts",
        metavar="TEXT",
        help='Denoisers, "base@0..0.8,refiner@0.8..1" of the timesteps or "high@sigma=5..inf". [default: bundle\'s]',
    ),
]
MicroTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--micro",
        metavar="KEY=VALUE",
        help="What SDXL is told of the picture: original_size=HEIGHT,WIDTH, crop=TOP,LEFT, target_size, the same with "
        "negative_ before, aesthetic_score, negative_aesthetic_score; repeatable.",
    ),
]
PresetName = Annotated[
    str | None,
    typer.Option("--plan", metavar="PRESET", help="A preset of the bundle in place of -g, --guider, --reuse."),
]

# ControlNets
ControlTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--control",
        metavar="NAME=IMAGE[:SCALE]",
        help="Use this ControlNet of the bundle; repeatable, they add up.",
    ),
]
Preprocessor = Annotated[
    str,
    typer.Option(
        metavar="TEXT",
        help="Draws hints from the images: canny, canny(100,200), silhouette; +crop or +fill keeps proportions.",
    ),
]
ControlWindow = Annotated[str, typer.Option(metavar="A..B", help="Where ControlNets run, in fractions of the steps.")]
GuessMode = Annotated[
    bool, typer.Option("--guess-mode", help="ControlNets in conditional rows only, weaker where shallow.")
]

# Super-resolution
StageNames = Annotated[
    list[str] | None,
    typer.Option("--sr", metavar="NAME", help="Enlarge by this stage of the bundle; repeatable, one after the other."),
]
StageSteps = Annotated[
    int | None, typer.Option("--sr-steps", metavar="N", help="Steps of the stages. [default: theirs]")
]
NoiseLevel = Annotated[
    int | None, typer.Option("--noise-level", metavar="N", help="Noise on what the stages read. [default: theirs]")
]
StageGuidance = Annotated[
    str | None, typer.Option("--sr-guidance", metavar="TEXT", help="Guidance of the stages, as -g. [default: theirs]")
]

# The engine
Backend = Annotated[
    str,
    typer.Option(metavar="NAME", help="auto, openvino, onnxruntime, torch, torch-exact; those of GPUs: docs/gpu.md."),
]
Precision = Annotated[
    str, typer.Option(metavar="NAME", help="auto, fp32, bf16, fp16 (on CUDA), or int8 (quantised bundles).")
]


def parse_bytes(given: str) -> int:
    """A number of bytes, or one with M or G behind it. Raises typer's BadParameter."""
    number, unit = (given[:-1], given[-1]) if given[-1:] in UNITS else (given, "")
    if not (number.isascii() and number.isdecimal() and len(number) < 16 and int(number)):
        raise typer.BadParameter(f"{shown(given)}; write bytes, or such as 512M or 2G")
    return int(number) * UNITS.get(unit, 1)


def _threads(given: int | None) -> int | None:
    from stepforge.runtime.backends import check_threads

    try:
        check_threads(given)
    except BackendError as error:
        raise RequestError(f"--{error}") from error
    return given


Threads = Annotated[
    int | None,
    typer.Option(metavar="N", callback=_threads, help="Processor threads. [default: all that may be used]"),
]


TileMemory = Annotated[
    int | None,
    typer.Option(
        metavar="BYTES",
        parser=parse_bytes,
        help="Memory of one VAE or upscaler call, as 512M or 2G: larger pictures pass in tiles. [default: in one piece]",
    ),
]
Tiling = Annotated[str, typer.Option(metavar="NAME", help="even, or diffusers for VAEs as diffusers tiles them.")]


# Files
Out = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        metavar="PATH",
        help="A .png file for one image, a name with {index} or {seed} in it, or a folder.",
    ),
]
Metadata = Annotated[bool, typer.Option(help="Write the request into each PNG.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]


@dataclass(kw_only=True)
class PlanOptions:
    """What decides a plan."""

    steps: Steps = 20
    sampler: Sampler = None
    schedule: Schedule = None
    spacing: Spacing = None
    timesteps: Timesteps = None
    sigmas: Sigmas = None
    eta: Eta = None
    guidance: GuidanceText = None
    guider: GuiderText = None
    reuse: ReuseText = None
    preset: PresetName = None
    experts: ExpertsText = None

    def fields(self) -> dict[str, Any]:
        """Of Request. Raises RequestError."""
        own = {"guidance": self.guidance, "guider": self.guider, "reuse": self.reuse}
        given = {name: value for name, value in own.items() if value is not None}
        if self.preset is not None and given:
            raise RequestError(f"--plan decides {', '.join(own)}; leave --{next(iter(given))} out")
        return {
            "steps": self.steps,
            "sampler": self.sampler,
            "schedule": self.schedule,
            "spacing": self.spacing,
            "timesteps": parse_numbers("timesteps", self.timesteps, int),
            "sigmas": parse_numbers("sigmas", self.sigmas, float),
            "eta": self.eta,
            "experts": self.experts,
            **(given if self.preset is None else {"preset": self.preset}),
        }


@dataclass(kw_only=True)
class StageOptions:
    """Super-resolution."""

    sr: StageNames = None
    sr_steps: StageSteps = None
    noise_level: NoiseLevel = None
    sr_guidance: StageGuidance = None

    def stages(self, default: list[str] | None = None) -> list[dict[str, Any]]:
        """Fields of Upscale of each stage. default: names where none are given. Raises RequestError."""
        return parse_stages(self.sr or default or (), self.sr_steps, self.noise_level, self.sr_guidance)


@dataclass(kw_only=True)
class RequestOptions(StageOptions, PlanOptions):
    """What a request says beside its prompt and its seed."""

    adapter: AdapterTexts = None
    negative: Negative = ""
    width: Pixels = None
    height: Pixels = None
    micro: MicroTexts = None
    control: ControlTexts = None
    preprocessor: Preprocessor = "none"
    control_window: ControlWindow = "0..1"
    guess_mode: GuessMode = False
    init: InitImage = None
    mask: InitMask = None
    strength: InitStrength = None
    overlay: InitOverlay = False
    images: Images = 1
    prompt_syntax: PromptSyntax = "a1111"

    def adapters(self) -> dict[str, tuple[Path, float]]:
        """File and strength by name. Raises RequestError."""
        return parse_adapters(self.adapter or ())

    def fields(self) -> dict[str, Any]:
        """Of Request. Raises RequestError."""
        return {
            **PlanOptions.fields(self),
            "negative": self.negative,
            "width": self.width,
            "height": self.height,
            "images": self.images,
            "prompt_syntax": self.prompt_syntax,
            "micro": parse_micro(self.micro or ()),
            "controls": parse_controls(
                self.control or (), self.preprocessor, self.control_window, self.guess_mode
            ),
            "adapters": {name: strength for name, (_, strength) in self.adapters().items()},
            "init": parse_init(self.init, self.mask, self.strength, self.overlay),
            "upscale": self.stages(),
        }  # fmt: skip


@dataclass(kw_only=True)
class EngineOptions:
    """What runs the networks, and how."""

    backend: Backend = "auto"
    precision: Precision = "auto"
    threads: Threads = None
    tile_memory: TileMemory = None
    tiling: Tiling = "even"

    def load(self, bundle: Path, **more: Any) -> Engine:
        """more: of `stepforge.load`. Raises StepforgeError."""
        from stepforge.runtime.load import load

        return load(
            bundle, backend=self.backend, precision=self.precision, threads=self.threads, tile_memory=self.tile_memory,
            tiling=self.tiling, **more,
        )  # fmt: skip


@dataclass(kw_only=True)
class RayOptions:
    """Where the workers of a batch run."""

    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Draw on a Ray cluster: its HOST:PORT, auto for this machine's, local to start one for the run.",
        ),
    ] = None
    workers: Annotated[int, typer.Option(metavar="N", help="Engines on the cluster, each with --threads threads.")] = 1
    worker_gpus: Annotated[float, typer.Option(metavar="X", help="GPUs of each.")] = 0.0
    stall: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="Give up when no job has ended on the cluster for so long. [default: 600]"
        ),
    ] = None

    def check(self) -> None:
        """Raises RequestError for what no cluster can do, and for workers without one."""
        whole("--workers", self.workers, 1, 10_000)
        for name, value, least in (("--worker-gpus", self.worker_gpus, 0.0), ("--stall", self.stall, 1.0)):
            if value is not None and not least <= value < 1e6:
                raise RequestError(f"{name} is {value:g}; it must be a number from {least:g} to 1,000,000")
        if self.ray is None and (self.workers != 1 or self.worker_gpus or self.stall is not None):
            raise RequestError("--workers, --worker-gpus and --stall need --ray ADDRESS, or --ray local")


GROUPS = (PlanOptions, StageOptions, RequestOptions, EngineOptions, RayOptions)


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command, for typer: each parameter that is one of `GROUPS` becomes an option for each of its fields."""
    hints = get_type_hints(command, include_extras=True)
    hints.pop("return", None)
    groups = {name: kind for name, kind in hints.items() if kind in GROUPS}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            types = get_type_hints(groups[name], include_extras=True)
            parameters += [
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=types[field.name]
                )
                for field in fields(groups[name])
            ]
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))

    def run(**given: Any) -> None:
        values = {
            name: kind(**{field.name: given.pop(field.name) for field in fields(kind)}) for name, kind in groups.items()
        }
        command(**given, **values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run
