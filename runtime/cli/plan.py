"""`stepforge plan`: the table of numbers that a request becomes."""

from __future__ import annotations

import json

from stepforge.runtime.cli import options
from stepforge.runtime.cli.output import print_table


def plan(
    bundle: options.BundlePath,
    steps: options.Steps = 20,
    sampler: options.Sampler = None,
    schedule: options.Schedule = None,
    spacing: options.Spacing = None,
    timesteps: options.Timesteps = None,
    sigmas: options.Sigmas = None,
    eta: options.Eta = None,
    guidance: options.GuidanceText = None,
    guider: options.GuiderText = None,
    reuse: options.ReuseText = None,
    preset: options.PresetName = None,
    as_json: options.Json = False,
) -> None:
    """Print the table of numbers that a request becomes."""
    from stepforge.runtime.load import open_bundle
    from stepforge.runtime.plan.compile import check_variants, compile_plan, describe
    from stepforge.runtime.request import Request
    from stepforge.runtime.request.presets import resolve

    fields = options.plan_fields(
        steps=steps, sampler=sampler, schedule=schedule, spacing=spacing, timesteps=timesteps, sigmas=sigmas, eta=eta,
        guidance=guidance, guider=guider, reuse=reuse, preset=preset,
    )  # fmt: skip
    request = Request(prompt="", **fields)
    opened = open_bundle(bundle, check=False)
    compiled = compile_plan(resolve(request, opened), opened.scheduler, blends=not opened.reads_mask)
    check_variants(compiled, opened)
    rows = describe(compiled)
    if as_json:
        print(json.dumps({"init_noise": compiled.init_noise, "rows": compiled.rows, "steps": rows}, indent=1))
        return
    print_table(rows)
    print(f"initial noise {compiled.init_noise:.6g}; {len(rows)} network evaluations, {compiled.rows} denoiser rows")
