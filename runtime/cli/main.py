"""The command line: `stepforge export | verify | generate | tune | plan | info | doctor | lora`.

Commands only read arguments, call the rooms and print. Commands of the offline room join through the entry point group
`stepforge.commands`; `lora.convert` there is the command `convert` of the group `lora`. Exit codes: 0 done, 1 it ran and
failed, 2 the arguments were wrong, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepforge.runtime.cli.inputs import parse_adapter, parse_controls, parse_numbers, read_requests
from stepforge.runtime.cli.lora import lora
from stepforge.runtime.cli.table import print_table
from stepforge.runtime.cli.tune import tune
from stepforge.runtime.errors import RequestError, StepforgeError

if TYPE_CHECKING:
    from stepforge.runtime.request import Progress, Request, Result

app = typer.Typer(
    help="Compile text-to-image diffusion models into bundles of engine graphs, and run them without torch.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.add_typer(lora, name="lora")
app.command()(tune)

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle directory, or `fake` for a test model.")]
Steps = Annotated[int, typer.Option("--steps", "-n", help="Denoising steps.")]
Sampler = Annotated[str | None, typer.Option(help="Sampler, such as ddim, euler, dpmpp_2m, unipc. [default: model's]")]
Schedule = Annotated[str | None, typer.Option(help="normal, karras, exponential or beta. [default: model's]")]
Spacing = Annotated[str | None, typer.Option(help="linspace, leading or trailing. [default: model's]")]
Timesteps = Annotated[str | None, typer.Option(help="Custom timesteps, falling: 999,850,700,...")]
Sigmas = Annotated[str | None, typer.Option(help="Custom sigmas, falling: 14.6,7.2,...")]
Eta = Annotated[float | None, typer.Option(help="Stochasticity of ddim and tcd, 0 to 1.")]
Guidance = Annotated[
    str | None,
    typer.Option(
        "--guidance",
        "-g",
        help="Weight w, one a step (7,7,1,1), or a schedule: interval(7.5, sigma=0.28..5.42). [default: 7.5]",
    ),
]
Guider = Annotated[
    str | None, typer.Option(help="cfg, rescale(0.7), dynamic, zero_star, apg, adaptive; joined by +. [default: cfg]")
]
ReuseText = Annotated[
    str | None, typer.Option("--reuse", help="Approximate: deepcache(3), tgate(0.5); joined by +. [default: none]")
]
PlanName = Annotated[
    str | None,
    typer.Option("--plan", metavar="PRESET", help="A preset of the bundle in place of -g, --guider, --reuse."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script; never shows a traceback for what the user can mend."""
    for entry in entry_points(group="stepforge.commands"):
        group, _, name = entry.name.rpartition(".")
        (lora if group == "lora" else app).command(name)(entry.load())
    command = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="stepforge", standalone_mode=False)
    except StepforgeError as error:
        fail(str(error), 2 if isinstance(error, RequestError) else 1)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("stepforge"):
            raise
        fail(f"this command needs the package {error.name}; pip install 'stepforge[export]'", 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        fail(error.format_message(), getattr(error, "exit_code", 2))  # a usage error of typer's
    sys.exit(code if isinstance(code, int) else 0)


def fail(message: str, code: int) -> None:
    print("stepforge: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def root(show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show_version:
        print(version("stepforge"))
        raise typer.Exit


@app.command()
def generate(
    bundle: BundlePath,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="One or more prompts.")] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompts", help="A text file, one prompt a line.")] = None,
    request_file: Annotated[
        Path | None,
        typer.Option(
            "--requests", help="A JSON-lines file; fields of Request, what is missing comes from the options."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE[:STRENGTH]",
            help="Load a LoRA file and use it; lines of --requests that have adapters use those alone. Repeatable.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="A .png file for one image, else a folder.")] = Path("out"),
    negative: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    width: Annotated[int | None, typer.Option(help="Pixels. [default: model's]")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels. [default: model's]")] = None,
    steps: Steps = 20,
    sampler: Sampler = None,
    schedule: Schedule = None,
    spacing: Spacing = None,
    timesteps: Timesteps = None,
    sigmas: Sigmas = None,
    eta: Eta = None,
    guidance: Guidance = None,
    guider: Guider = None,
    reuse: ReuseText = None,
    preset: PlanName = None,
    control: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=IMAGE[:SCALE]", help="Use this ControlNet of the bundle; repeatable, they add up."),
    ] = None,
    preprocessor: Annotated[
        str,
        typer.Option(
            help="Makes hints of the images: canny, canny(100,200), silhouette; +crop or +fill keeps proportions."
        ),
    ] = "none",
    control_window: Annotated[str, typer.Option(help="Where ControlNets run, in fractions of the steps.")] = "0..1",
    guess_mode: Annotated[
        bool, typer.Option(help="ControlNets in conditional rows only, weaker where shallow.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Image i of a prompt uses seed + i.")] = 0,
    images: Annotated[int, typer.Option(help="Images for each prompt.")] = 1,
    prompt_syntax: Annotated[str, typer.Option(help="a1111: (word:1.3) weights; plain: brackets are text.")] = "a1111",
    backend: Annotated[str, typer.Option(help="auto, openvino, onnxruntime, torch, torch-exact or fake.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16, or fp16 (torch on CUDA).")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Processor threads. [default: all that may be used]")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Also write all images as one contact sheet.")] = None,
    columns: Annotated[int | None, typer.Option(help="Images in a row of the sheet. [default: about square]")] = None,
    metadata: Annotated[bool, typer.Option(help="Write the request into each PNG.")] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace existing files.")] = False,
    as_json: Json = False,
) -> None:
    """Draw images from prompts."""
    from stepforge.runtime.load import load

    loads = [parse_adapter(text) for text in adapter or ()]
    options = {
        "negative": negative,
        "width": width,
        "height": height,
        "steps": steps,
        "sampler": sampler,
        "schedule": schedule,
        "spacing": spacing,
        "timesteps": parse_numbers("timesteps", timesteps, int),
        "sigmas": parse_numbers("sigmas", sigmas, float),
        "eta": eta,
        **_planned(preset, guidance, guider, reuse),
        "controls": parse_controls(control or (), preprocessor, control_window, guess_mode),
        "seed": seed,
        "images": images,
        "prompt_syntax": prompt_syntax,
        "adapters": {name: strength for name, _, strength in loads},
    }
    requests = read_requests(prompts, prompt_file, request_file, options)
    files = _files(out, requests, overwrite)
    with load(bundle, backend=backend, precision=precision, threads=threads) as engine, _progress() as bar:
        for name, path, _ in loads:
            engine.adapters.load(name, path)
        total = sum(len(engine.plan(request).steps) * request.images for request in requests)
        task = bar.add_task("denoising", total=total)

        def on_step(_: Progress) -> None:
            bar.advance(task)

        results = engine.generate(requests, on_step=on_step)
    _write(results, files, metadata, overwrite)
    if sheet is not None:
        _write_sheet(results, sheet, columns, overwrite)
    if as_json:
        rows = [_summary(result, paths) for result, paths in zip(results, files, strict=True)]
        print(json.dumps(rows, indent=1))
    else:
        for paths in files:
            for path in paths:
                print(path)


@app.command()
def plan(
    bundle: BundlePath,
    steps: Steps = 20,
    sampler: Sampler = None,
    schedule: Schedule = None,
    spacing: Spacing = None,
    timesteps: Timesteps = None,
    sigmas: Sigmas = None,
    eta: Eta = None,
    guidance: Guidance = None,
    guider: Guider = None,
    reuse: ReuseText = None,
    preset: PlanName = None,
    as_json: Json = False,
) -> None:
    """Print the table of numbers that a request becomes."""
    from stepforge.runtime.plan.compile import check_variants, compile_plan, describe
    from stepforge.runtime.plan.schedules import SchedulerCard
    from stepforge.runtime.presets import resolve
    from stepforge.runtime.request import Request

    request = Request(
        prompt="",
        steps=steps,
        sampler=sampler,
        schedule=schedule,
        spacing=spacing,
        timesteps=parse_numbers("timesteps", timesteps, int),
        sigmas=parse_numbers("sigmas", sigmas, float),
        eta=eta,
        **_planned(preset, guidance, guider, reuse),
    )
    opened = _open(bundle)
    compiled = compile_plan(resolve(request, opened), SchedulerCard.from_dict(opened.scheduler))
    check_variants(compiled, opened)
    rows = describe(compiled)
    if as_json:
        print(json.dumps({"init_noise": compiled.init_noise, "rows": compiled.rows, "steps": rows}, indent=1))
        return
    print_table(rows)
    print(f"initial noise {compiled.init_noise:.6g}; {len(rows)} network evaluations, {compiled.rows} denoiser rows")


@app.command()
def info(bundle: BundlePath, as_json: Json = False) -> None:
    """Describe a bundle: model, networks, sizes, versions, parity verdict."""
    opened = _open(bundle)
    facts = {
        "digest": opened.digest,
        "precision": opened.precision,
        "model": asdict(opened.card),
        "scheduler": dict(opened.scheduler),
        "source": dict(opened.source),
        "versions": dict(opened.versions),
        "components": {name: component.graph for name, component in opened.components.items()},
        "bytes": sum(size for size, _ in opened.files.values()),
        "verdict": opened.verdict,
        "presets": dict(opened.presets),
    }
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    card = opened.card
    print(f"{card.name}: {card.family}, {card.width}x{card.height}, {opened.precision}, digest {opened.digest[:16]}")
    for name, component in opened.components.items():
        size = sum(n for file, (n, _) in opened.files.items() if file.startswith(f"{name}/"))
        derived = f" (+ {', '.join(component.derived)})" if component.derived else ""
        bank = component.bank
        adapters = f", {bank.slots - 1} LoRA slots of rank {bank.rank} in {len(bank.targets)} layers" if bank else ""
        print(f"  {name:20} {size / 1e6:9.1f} MB{derived}{adapters}")
    print("  scheduler: " + ", ".join(f"{key} {value}" for key, value in opened.scheduler.items() if value is not None))
    print("  exported with: " + ", ".join(f"{key} {value}" for key, value in opened.versions.items()))
    for name, preset in opened.presets.items():
        print(f"  plan {name}: " + ", ".join(f"{key} {value}" for key, value in preset.items() if key != "found"))
    verdict = opened.verdict
    print("  parity: " + (f"{verdict['summary']}" if verdict else "never verified; run `stepforge verify`"))


@app.command()
def doctor(
    bundle: Annotated[Path | None, typer.Argument(metavar="BUNDLE", help="Also check and load this bundle.")] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine can run, and what is wrong."""
    from stepforge.runtime.cli.examine import examine

    findings = examine(bundle)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.ok else 'FAIL'} {finding.subject}: {finding.text}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def _open(path: Path) -> Any:
    from stepforge.runtime.load import open_bundle

    return open_bundle(path, check=False)


def _planned(preset: str | None, guidance: str | None, guider: str | None, reuse: str | None) -> dict[str, Any]:
    """What decides a plan: a preset of the bundle, or the options; never both."""
    own = {"guidance": guidance, "guider": guider, "reuse": reuse}
    given = {name: value for name, value in own.items() if value is not None}
    if preset is not None and given:
        raise RequestError(f"--plan {preset} decides {', '.join(own)}; leave --{next(iter(given))} out")
    return given if preset is None else {"preset": preset}


def _files(out: Path, requests: list[Request], overwrite: bool) -> list[list[Path]]:
    """One path for each image. Existing files are refused before anything is computed."""
    if out.suffix.lower() == ".png":
        if sum(request.images for request in requests) > 1:
            raise RequestError(f"--out {out} is one file, but several images were asked for; give a folder")
        files = [[out]]
    else:
        files = [
            [out / f"{index:05d}-{request.seed + i}.png" for i in range(request.images)]
            for index, request in enumerate(requests)
        ]
    existing = [path for paths in files for path in paths if path.exists()]
    if existing and not overwrite:
        raise RequestError(f"{existing[0]} exists; choose another --out or give --overwrite")
    return files


def _write(results: list[Result], files: list[list[Path]], metadata: bool, overwrite: bool) -> None:
    from stepforge.runtime.imaging.metadata import describe_image
    from stepforge.runtime.imaging.png import save_png

    for result, paths in zip(results, files, strict=True):
        for index, path in enumerate(paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            notes = describe_image(result, index) if metadata else None
            save_png(result.images[index], path, notes, overwrite=overwrite)


def _write_sheet(results: list[Result], path: Path, columns: int | None, overwrite: bool) -> None:
    from stepforge.runtime.imaging.png import save_png

    pictures = [image for result in results for image in result.images]
    labels = [_label(result.request) for result in results for _ in result.images]
    path.parent.mkdir(parents=True, exist_ok=True)
    upscale = max(1, 128 // max(picture.width for picture in pictures))  # labels need some room
    picture = contact_sheet(pictures, columns=columns, labels=labels, upscale=upscale)
    save_png(picture, path, None, overwrite=overwrite)


def _label(request: Request) -> str:
    """Adapters first: what is too long is cut at the end."""
    names = " + ".join(
        name if strength == 1.0 else f"{name} {strength:g}" for name, strength in request.adapters.items()
    )
    return f"{names}: {request.prompt}" if names else request.prompt


def _summary(result: Result, paths: list[Path]) -> dict[str, Any]:
    return {
        "files": [str(path) for path in paths],
        "prompt": result.request.prompt,
        "seeds": result.seeds,
        "model": result.model,
        "digest": result.digest,
        "stats": asdict(result.stats),
    }


@contextmanager
def _progress() -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield bar
