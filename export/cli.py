"""The offline commands, `stepforge export` and `stepforge verify`. Heavy imports wait until a command runs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from stepforge.runtime.bundle import NAME
from stepforge.runtime.cli.inputs import file_and_strength, read_lines
from stepforge.runtime.errors import RequestError
from stepforge.runtime.files import printable

Tokenizer = Annotated[
    Path | None, typer.Option(help="Folder with vocab.json and merges.txt, for single files, which do not carry it.")
]
PredictionType = Annotated[
    str | None, typer.Option(help="epsilon or v_prediction, for SD 2 single files that do not say which they are.")
]


Loras = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[:STRENGTH]", help="Merge this LoRA into the weights; repeatable."),
]


Controls = Annotated[
    list[str] | None,
    typer.Option(
        "--control", metavar="NAME=PATH", help="A ControlNet, a diffusers folder or a .safetensors file; repeatable."
    ),
]


Upscalers = Annotated[
    list[str] | None,
    typer.Option(
        "--sr",
        metavar="NAME=PATH",
        help="A super-resolution stage: a diffusers folder of an upscaler, or a .safetensors file of an "
        "ESRGAN, Compact or SPAN network; repeatable.",
    ),
]


Experts = Annotated[
    list[str] | None,
    typer.Option(
        "--expert",
        metavar="NAME=PATH[@WINDOW]",
        help="A further denoiser: SDXL's refiner (a folder; WINDOW is 0.8..1 of the timesteps by default), a pipeline's or "
        "UNet's folder or a LoRA file of the model's architecture, with @sigma=5..inf or @0..0.4; repeatable.",
    ),
]


def parse_experts(texts: list[str] | None) -> dict[str, tuple[Path, tuple[str, float, float | None] | None]]:
    """NAME=PATH@WINDOW -> name, path and window. Raises RequestError."""
    from stepforge.runtime.plan.switch import Switch

    found: dict[str, tuple[Path, tuple[str, float, float | None] | None]] = {}
    for name, given in parse_named("--expert", texts, "refiner=models/refiner").items():
        path, at, window = str(given).rpartition("@")
        if not at or given.exists():
            found[name] = (given, None)
            continue
        switch = Switch.parse(f"{name}@{window}")
        share = next(share for share in switch.shares if share.denoiser == name)
        end = None if share.high == math.inf else share.high
        found[name] = (Path(path), ("sigma" if switch.in_sigma else "timesteps", share.low, end))
    return found


def parse_named(option: str, texts: list[str] | None, example: str) -> dict[str, Path]:
    """NAME=PATH -> name and path. Raises RequestError."""
    found: dict[str, Path] = {}
    for text in texts or ():
        name, equals, path = text.partition("=")
        if not equals or not path or not NAME.fullmatch(name):
            raise RequestError(f"{option} {printable(text)} is not understood; give NAME=PATH, such as {example}")
        if name in found:
            raise RequestError(f"{option} {name} is given twice; choose another name for one of the two")
        found[name] = Path(path)
    return found


def parse_controls(texts: list[str] | None) -> dict[str, Path]:
    return parse_named("--control", texts, "canny=models/canny")


def parse_upscalers(texts: list[str] | None) -> dict[str, Path]:
    return parse_named("--sr", texts, "x4=models/x4-upscaler")


def export_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A diffusers folder or a .safetensors checkpoint.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="BUNDLE", help="The bundle directory to write.")],
    precision: Annotated[
        str, typer.Option(help="fp32 or fp16: what weights are stored and graphs compute in.")
    ] = "fp32",
    tokenizer: Tokenizer = None,
    prediction_type: PredictionType = None,
    name: Annotated[str | None, typer.Option(help="Name of the model. [default: its file name]")] = None,
    lora: Loras = None,
    lora_slots: Annotated[
        int | None, typer.Option(help="Take LoRA files at run time, this many sets of them in use at a time.")
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Highest rank of a set, with --lora-slots. [default: 16]")
    ] = None,
    lora_targets: Annotated[
        str | None,
        typer.Option(
            help="all, or transformer (less work a step; LoRA of other layers is refused at run time). [default: all]"
        ),
    ] = None,
    control: Controls = None,
    sr: Upscalers = None,
    expert: Experts = None,
    reuse: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VARIANT", help="Variants for approximate plans: tgate, deepcache, deepcache(BRANCH); repeatable."
        ),
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(metavar="int8", help="Add INT8 networks, as `stepforge quantize` does.")
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts of --quantize, one a line, like those of your users.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Compile a model into a bundle."""
    from stepforge.export.build import BankOptions, export_bundle
    from stepforge.export.graph.rewire import Variants

    if quantize not in (None, "int8"):
        raise RequestError(f"--quantize is {printable(quantize)}; allowed is int8")
    if quantize and precision != "fp32":
        raise RequestError(f"--quantize int8 makes integers of fp32 weights, and --precision is {printable(precision)}")
    if calibrate and not quantize:
        raise RequestError("--calibrate is for --quantize int8")
    texts = prompts_of(calibrate) if quantize else []
    sizes = {"rank": lora_rank, "targets": lora_targets}
    stated = {key: value for key, value in sizes.items() if value is not None}
    if stated and lora_slots is None:
        raise RequestError(f"--lora-{next(iter(stated))} needs --lora-slots")

    def progress(stage: str, done: int, total: int) -> None:
        print(f"[{done}/{total}] {stage}", file=sys.stderr)

    bundle = export_bundle(
        model,
        out,
        precision=precision,
        tokenizer=tokenizer,
        prediction_type=prediction_type,
        name=name,
        loras=[file_and_strength(text) for text in lora or ()],
        bank=None if lora_slots is None else BankOptions(lora_slots, **stated),  # type: ignore[arg-type]
        controls=parse_controls(control),
        upscalers=parse_upscalers(sr),
        experts=parse_experts(expert),
        reuse=Variants.parse(reuse or ()),
        overwrite=overwrite,
        progress=progress,
    )
    if quantize:
        from stepforge.export.int8.quantize import Calibration, quantize_bundle

        bundle, _ = quantize_bundle(out, Calibration(texts), progress=lambda stage: print(stage, file=sys.stderr))
    size = sum(size for size, _ in bundle.files.values())
    if as_json:
        print(json.dumps({"bundle": str(out), "digest": bundle.digest, "bytes": size, "files": len(bundle.files)}))
    else:
        what = f"{printable(out)}: {printable(bundle.card.name)}, {bundle.precision}"
        print(f"{what}, {size / 1e6:.1f} MB, digest {bundle.digest[:16]}")


def verify_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle directory.")],
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The model that it was exported from.")],
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="openvino, onnxruntime, torch, ...; repeatable. [default: those that auto may come to on this machine]"
        ),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            help="fp32, bf16, fp16 or int8; repeatable. [default: fp32, bf16 and a quantised bundle's int8, where they run]"
        ),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt to compare; repeatable.")] = None,
    steps: Annotated[int, typer.Option("--steps", "-n", help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option("--guidance", "-g", help="Guidance weight.")] = 7.5,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    tokenizer: Tokenizer = None,
    prediction_type: PredictionType = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A diffusers folder whose configs hold for a single file of unusual geometry; no weights."),
    ] = None,
    lora: Loras = None,
    control: Controls = None,
    sr: Upscalers = None,
    expert: Experts = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Compare a bundle with diffusers and store the verdict in it. Exit code 1 if it fails."""
    from stepforge.export.parity.verify import PROMPTS, verify

    if guidance <= 1.0:
        raise RequestError(f"guidance is {guidance}; verify compares guided runs, give a weight above 1")
    verdict = verify(
        bundle,
        model,
        tokenizer=tokenizer,
        prediction_type=prediction_type,
        config=config,
        loras=[file_and_strength(text) for text in lora or ()],
        controls=parse_controls(control),
        upscalers=parse_upscalers(sr),
        experts={name: path for name, (path, _) in parse_experts(expert).items()},
        backends=backend or (),
        precisions=precision or (),
        prompts=prompt or PROMPTS,
        steps=steps,
        guidance=guidance,
        seed=seed,
        progress=lambda stage: print(stage, file=sys.stderr),
    )
    if as_json:
        print(json.dumps(verdict, indent=1))
    else:
        for check in verdict["checks"]:
            value, image = check["value"], check["level"] == "image"
            figure = f"{value:9.2f} dB" if image else f"{value:12.2e}" if isinstance(value, float) else f"{value:>12}"
            limit = f">= {check['limit']:g} dB" if image else f"<= {check['limit']:g}"
            print(
                f"{'ok  ' if check['passed'] else 'FAIL'} {check['backend']:12}{check['precision']:6}{check['level']:11}"
                f"{figure}  {limit:10}  {printable(check['name'], 200)}"
            )
        spread = verdict["spread"]
        print(f"reference against itself: trajectory {spread['trajectory']:.1e}, image {spread['psnr']:.1f} dB")
        print(f"reference: diffusers' pipeline, made by {verdict['reference']['loader']}")
        for line in verdict["reference"]["assumed"]:
            print(f"assumed: {printable(line, 300)}")
        print(f"{outcome(verdict)}: {verdict['summary']}")
    if not verdict["passed"]:
        raise typer.Exit(1)


def outcome(verdict: Mapping[str, Any]) -> str:
    """PASSED or FAILED, and how many settings of the reference are stepforge's reading."""
    count = len(verdict["reference"]["assumed"])
    said = f" (with {count} assumed setting{'s' * (count > 1)})" if count else ""
    return ("PASSED" if verdict["passed"] else "FAILED") + said


def prompts_of(file: Path | None) -> Sequence[str]:
    """Prompts to calibrate on: of a file, or those that `verify` draws."""
    from stepforge.export.parity.verify import PROMPTS

    texts = PROMPTS if file is None else [line for _, line in read_lines(file)]
    if not texts:
        raise RequestError(f"{printable(file)} has no prompts; write one a line")
    return texts


def quantize_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle directory with fp32 weights.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="BUNDLE", help="Write a copy here. [default: add to BUNDLE]")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts to calibrate on, one a line, like those of your users.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", "-n", help="Denoising steps of the calibration.")] = 20,
    guidance: Annotated[float, typer.Option("--guidance", "-g", help="Guidance weight of the calibration.")] = 7.5,
    width: Annotated[int | None, typer.Option(metavar="PIXELS", help="Of the calibration. [default: model's]")] = None,
    height: Annotated[int | None, typer.Option(metavar="PIXELS", help="Of the calibration. [default: model's]")] = None,
    limit: Annotated[
        float | None, typer.Option(metavar="X", help="Largest error of a network's output at any step. [default: 0.04]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Add INT8 networks to a bundle. `--precision int8` runs them, on a CPU."""
    from stepforge.export.int8.quantize import LIMIT, Calibration, quantize_bundle

    calibration = Calibration(prompts_of(prompts), steps, guidance, width, height)
    done, chosen = quantize_bundle(
        bundle,
        calibration,
        out=out,
        limit=LIMIT if limit is None else limit,
        progress=lambda stage: print(stage, file=sys.stderr),
    )
    if as_json:
        print(json.dumps({"bundle": str(done.path), "digest": done.digest, "networks": done.source["int8"]}, indent=1))
        return
    for key, one in chosen.items():
        print(f"{key.label}: {100 * one.work:.1f} % of its multiplications in integers, error {one.error:.1e}")
        for group in one.kept:
            print(f"    float: {group.name}, {100 * group.work:.1f} %, alone {group.sensitivity:.1e}")
    print(f"{printable(done.path)}: digest {done.digest[:16]}; its verdict is gone, `stepforge verify` judges it anew")


def convert_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A LoRA of any known format.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A .safetensors or .onnx_adapter file to write.")],
    model: Annotated[Path, typer.Option(help="The base model: a diffusers folder or a .safetensors checkpoint.")],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Cut what is not low-rank (LoHa, LoKr, DoRA, ...) to this rank.")
    ] = None,
    tokenizer: Tokenizer = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Write a LoRA as plain low-rank pairs.

    An engine binds these at run time. The error of each layer that was cut is printed.
    """
    from stepforge.export.lora.convert import convert

    done = convert(file, model, out, rank=rank, tokenizer=tokenizer)
    if as_json:
        print(json.dumps([asdict(layer) for layer in done], indent=1))
        return
    for layer in done:
        if layer.error or layer.note:
            print(
                f"{layer.component} {layer.module}: {layer.kind}, relative error {layer.error:.3g} {layer.note}".rstrip()
            )
    exact = sum(not layer.error for layer in done)
    worst = max((layer.error for layer in done), default=0.0)
    print(f"{out}: {len(done)} layers, {exact} exact, largest relative error {worst:.3g}")
