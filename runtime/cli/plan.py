"""`stepforge plan`: the table of numbers that a request becomes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from stepforge.runtime.cli import options
from stepforge.runtime.cli.inputs import parse_init
from stepforge.runtime.cli.output import print_table
from stepforge.runtime.files import printable

if TYPE_CHECKING:
    from stepforge.runtime.plan import Plan


@options.grouped
def plan(
    bundle: options.BundlePath,
    *,
    asked: options.PlanOptions,
    init: options.InitImage = None,
    mask: options.InitMask = None,
    strength: options.InitStrength = None,
    stages: options.StageOptions,
    as_json: options.Json = False,
) -> None:
    """Print the table of numbers that a request becomes."""
    from stepforge.runtime.load import open_bundle
    from stepforge.runtime.plan.compile import check_variants, compile_plan, describe
    from stepforge.runtime.plan.stages import compile_stage
    from stepforge.runtime.request import Request
    from stepforge.runtime.request.presets import resolve

    request = Request(
        prompt="",
        init=parse_init(init, mask, strength),
        upscale=stages.stages(),
        **asked.fields(),
    )
    opened = open_bundle(bundle, check=False)
    compiled = compile_plan(resolve(request, opened), opened.scheduler, blends=not opened.reads_mask)
    check_variants(compiled, opened)
    enlarging = [(upscale.name, compile_stage(upscale, opened)) for upscale in request.upscale]
    if as_json:
        told = {"stages": [{"stage": name, **_told(stage, name)} for name, stage in enlarging]} if enlarging else {}
        print(json.dumps({**_told(compiled), **told}, indent=1))
        return
    for name, each in (("", compiled), *enlarging):
        if name:
            print(f"\nstage {printable(name)}")
        if not each.steps:
            print("one pass of a feed-forward network")
            continue
        print_table(describe(each, name))
        image = f"{each.start:.6g} of the image's latents, " if each.start else ""
        print(
            f"{image}initial noise {each.init_noise:.6g}; {len(each.steps)} network evaluations, {each.rows} denoiser rows"
        )


def _told(plan: Plan, stage: str = "") -> dict[str, Any]:
    from stepforge.runtime.plan.compile import describe

    return {"start": plan.start, "init_noise": plan.init_noise, "rows": plan.rows, "steps": describe(plan, stage)}
