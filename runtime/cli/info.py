"""`stepforge info`: what a bundle holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from stepforge.runtime.backends.tensorrt.plans import component_hash, here, plans, stale
from stepforge.runtime.bundle import Bundle, ComponentId, StageCard
from stepforge.runtime.cli import options
from stepforge.runtime.files import printable

FIRST = ("sample", "latents", "pixels", "image", "input_ids")  # the input that tells what a plan is for


def info(bundle: options.BundlePath, as_json: options.Json = False) -> None:
    """Describe a bundle: model, networks, sizes, parity verdict."""
    from stepforge.runtime.load import open_bundle

    opened = open_bundle(bundle, check=False)
    if as_json:
        print(json.dumps(facts(opened), indent=1))
        return
    card = opened.card
    name, family = printable(card.name), f"{card.family}, {card.width}x{card.height}"
    print(f"{name}: {family}, {opened.precision}, digest {opened.digest[:16]}")
    for key in opened.components:
        print(f"  {printable(key):20} {_described(opened, key)}")
    print(
        f"  scheduler: {_listed({key: value for key, value in opened.scheduler.to_dict().items() if value is not None})}"
    )
    for name, stage in opened.stages.items():
        print(f"  stage {printable(name)}: {_listed(stage_facts(stage))}")
    print(f"  exported with: {_listed(opened.versions)}")
    for name, preset in opened.presets.items():
        stated = {key: value for key, value in preset.to_dict().items() if key != "found"}
        print(f"  preset {printable(name)}: {_listed(stated)}")
    for what in ("assumed", "corrected"):
        for line in lines(opened.source.get(what)):
            print(f"  {what} at export: {line}")
    upscalers = opened.source.get("upscalers")
    for name, told in upscalers.items() if isinstance(upscalers, Mapping) else ():
        for what in ("assumed", "corrected"):
            for line in lines(told.get(what)) if isinstance(told, Mapping) else ():
                print(f"  {what} at export: stage {printable(name, 80)}: {line}")
    for line in plan_lines(opened):
        print(f"  plan {line}")
    verdict = opened.verdict
    print("  parity: " + (printable(verdict["summary"], 500) if verdict else "never verified; run `stepforge verify`"))
    if verdict and isinstance(reference := verdict.get("reference"), Mapping):
        print(f"  reference: {printable(str(reference.get('loader')), 80)}")
        for line in lines(reference.get("assumed")):
            print(f"  assumed by verify: {line}")


def lines(value: Any) -> list[str]:
    """The lines of a manifest's list as a terminal may have them; empty for what older bundles lack."""
    return [printable(str(line), 300) for line in value] if isinstance(value, list | tuple) else []


def facts(bundle: Bundle) -> dict[str, Any]:
    """The manifest in short, for JSON."""
    return {
        "digest": bundle.digest,
        "precision": bundle.precision,
        "model": asdict(bundle.card),
        "scheduler": bundle.scheduler.to_dict(),
        "stages": {name: stage.to_dict() for name, stage in bundle.stages.items()},
        "source": dict(bundle.source),
        "versions": dict(bundle.versions),
        "components": {str(key): component.graph for key, component in bundle.components.items()},
        "bytes": sum(size for size, _ in bundle.files.values()),
        "verdict": bundle.verdict,
        "presets": {name: preset.to_dict() for name, preset in bundle.presets.items()},
        "plans": plan_lines(bundle),
    }


def plan_lines(bundle: Bundle) -> list[str]:
    """TensorRT plans of the bundle's networks, and which of them are stale: built by another release than is installed, on
    another GPU, or of other files."""
    machine, lines = here(), []
    for key in bundle.components:
        for plan in plans(bundle, key):
            if isinstance(plan, str):
                lines.append(printable(f"{key}: {plan}", 300))
                continue
            card = plan.card
            why = stale(card, component_hash(bundle, key), machine.get(card.library))
            sizes = "; ".join(dict.fromkeys(str(list(shape.high)) for profile in card.profiles
                                            for name, shape in profile.items() if name in FIRST))  # fmt: skip
            what = f"{card.library} {card.version} {card.precision} for {card.gpu or ', '.join(card.targets)}"
            lines.append(printable(f"{key}: {what}, up to {sizes}, {card.bytes / 1e6:.1f} MB"
                                   + (f"; STALE: {why}" if why else ""), 400))  # fmt: skip
    return lines


def stage_facts(stage: StageCard) -> dict[str, Any]:
    """Of a super-resolution stage: what it is, and what requests take unless they say otherwise."""
    facts: dict[str, Any] = {"kind": stage.kind, "scale": stage.scale}
    if stage.model is not None:
        facts |= {
            "model": stage.model.name,
            "made for": f"{stage.model.width}x{stage.model.height}",
            "steps": stage.steps,
        }
        facts["guidance"] = stage.guidance
    if stage.noising is not None:
        facts["noise level"] = f"{stage.noise_level} of {stage.most_noise}"
    return facts


def _described(bundle: Bundle, key: ComponentId) -> str:
    component, bank = bundle.components[key], bundle.components[key].bank
    files = [] if key.variant else [n for file, (n, _) in bundle.files.items() if file.startswith(f"{key.folder}/")]
    size = sum(files)
    derived = f" (+ {', '.join(component.derived)})" if component.derived else ""
    adapters = f", {bank.slots - 1} LoRA slots of rank {bank.rank} in {len(bank.targets)} layers" if bank else ""
    return f"{size / 1e6:9.1f} MB{derived}{adapters}"


def _listed(values: Mapping[str, Any]) -> str:
    return printable(", ".join(f"{key} {value}" for key, value in values.items()), 500)
