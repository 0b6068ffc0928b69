"""Options that several commands share: what they are called, and what their help says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stepforge.runtime.checks import shown
from stepforge.runtime.cli.inputs import parse_numbers
from stepforge.runtime.errors import BackendError, RequestError

UNITS = {"M": 1 << 20, "G": 1 << 30}

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle directory, or `fake` for a test model.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]

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
Backend = Annotated[str, typer.Option(metavar="NAME", help="auto, openvino, onnxruntime, torch, torch-exact or fake.")]
Precision = Annotated[
    str, typer.Option(metavar="NAME", help="auto, fp32, bf16, fp16 (on CUDA), or int8 (quantised bundles).")
]


def _bytes(given: str) -> int:
    """A number of bytes, or one with M or G behind it. Raises RequestError."""
    number, unit = (given[:-1], given[-1]) if given[-1:] in UNITS else (given, "")
    if not (number.isascii() and number.isdecimal() and len(number) < 16 and int(number)):
        raise RequestError(f"--tile-memory is {shown(given)}; write bytes, or such as 512M or 2G")
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
        parser=_bytes,
        help="Memory of one VAE or upscaler call, as 512M or 2G: larger pictures pass in tiles. [default: in one piece]",
    ),
]
Tiling = Annotated[str, typer.Option(metavar="NAME", help="even, or diffusers for VAEs as diffusers tiles them.")]


def plan_fields(
    *,
    steps: int,
    sampler: str | None,
    schedule: str | None,
    spacing: str | None,
    timesteps: str | None,
    sigmas: str | None,
    eta: float | None,
    guidance: str | None,
    guider: str | None,
    reuse: str | None,
    preset: str | None,
    experts: str | None = None,
) -> dict[str, Any]:
    """Fields of Request that decide its plan. Raises RequestError."""
    own = {"guidance": guidance, "guider": guider, "reuse": reuse}
    given = {name: value for name, value in own.items() if value is not None}
    if preset is not None and given:
        raise RequestError(f"--plan decides {', '.join(own)}; leave --{next(iter(given))} out")
    return {
        "steps": steps,
        "sampler": sampler,
        "schedule": schedule,
        "spacing": spacing,
        "timesteps": parse_numbers("timesteps", timesteps, int),
        "sigmas": parse_numbers("sigmas", sigmas, float),
        "eta": eta,
        "experts": experts,
        **(given if preset is None else {"preset": preset}),
    }
