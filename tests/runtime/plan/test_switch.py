"""Plans with several denoisers: cut and hand-over against diffusers' schedulers, as its base and refiner pipelines run them."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import torch

from stepforge.runtime.backends.fake import fake_bundle
from stepforge.runtime.bundle import UNET, ExpertCard
from stepforge.runtime.bundle.scheduler import SchedulerCard
from stepforge.runtime.errors import RequestError
from stepforge.runtime.plan.compile import check_variants, compile_plan
from stepforge.runtime.plan.sampling.sample import sample_steps
from stepforge.runtime.plan.switch import Switch, default_switch
from stepforge.runtime.request import Request

XL = SchedulerCard(
    sampler="euler", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
    set_alpha_to_one=False,
)  # fmt: skip
CLASSES = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
# float32 tables of diffusers' schedulers against our float64; a cut that is off by one differs by 1e-2 and more
TOLERANCE = 2e-4


def reference(sampler: str, schedule: str, spacing: str | None):
    name, options = CLASSES[sampler]
    common = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    spaced = {"timestep_spacing": spacing, "steps_offset": 1} if spacing else {}
    curved = {} if schedule == "normal" else {f"use_{schedule}_sigmas": True}
    return getattr(diffusers, name)(**common, **options, **spaced, **curved)


def ensemble(sampler: str, schedule: str, spacing: str | None, steps: int, at: float, noise: torch.Generator):
    """Base and refiner as StableDiffusionXLPipeline(denoising_end) and ...Img2ImgPipeline(denoising_start) run their loops:
    denoiser, timestep and latent of each evaluation, and the last latent. A prediction is 0.1·x + its number's normal draw."""
    x, rows = None, []
    for name in ("unet", "refiner"):
        scheduler = reference(sampler, schedule, spacing)
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps
        cut = round(1000 - at * 1000)
        if x is None:
            x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            x = x * scheduler.init_noise_sigma
            timesteps = timesteps[: len([t for t in timesteps if t >= cut])]
        else:
            count = (timesteps < cut).sum().item()
            count += scheduler.order == 2 and count % 2 == 0
            timesteps = timesteps[len(timesteps) - count :]
            scheduler.set_begin_index(len(scheduler.timesteps) - count) if hasattr(
                scheduler, "set_begin_index"
            ) else None
        for t in timesteps:
            seen = scheduler.scale_model_input(x, t)
            options = {"generator": noise} if "generator" in scheduler.step.__code__.co_varnames else {}
            rows.append((name, float(t), seen))
            x = scheduler.step(predicted(len(rows), seen), t, x, **options, return_dict=False)[0]
    return rows, x


def predicted(number: int, seen: torch.Tensor) -> torch.Tensor:
    drawn = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(100 + number), dtype=torch.float64)
    return 0.1 * seen + drawn


@pytest.mark.parametrize(
    ("sampler", "schedule", "spacing"),
    [
        ("euler", "normal", "leading"), ("euler", "karras", "leading"), ("euler_a", "normal", "trailing"),
        ("dpmpp_2m", "normal", "linspace"), ("dpmpp_2m", "karras", "leading"), ("dpmpp_2m_sde", "normal", "trailing"),
        ("dpmpp_3m", "normal", "leading"), ("unipc", "normal", "leading"), ("deis", "normal", "linspace"),
        ("heun", "normal", "leading"), ("heun", "karras", "leading"), ("kdpm2", "normal", "leading"),
        ("ddim", "normal", "leading"), ("ddpm", "normal", "leading"), ("lcm", "normal", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("steps", "at"), [(10, 0.8), (7, 0.5)])
def test_hand_over_is_that_of_diffusers_pipelines(
    sampler: str, schedule: str, spacing: str | None, steps: int, at: float
):
    """Same denoisers, timesteps and latents: DPM++'s history is dropped, Heun's last predictor runs twice."""
    wanted, last = ensemble(sampler, schedule, spacing, steps, at, torch.Generator().manual_seed(7))
    switch = Switch.parse(f"refiner@{at}..1")
    found, init = sample_steps(XL, sampler=sampler, schedule=schedule, spacing=spacing, steps=steps, experts=switch)
    assert [(step.denoiser, step.t) for step in found] == [(name, pytest.approx(t, abs=1e-2)) for name, t, _ in wanted]
    noise = torch.Generator().manual_seed(7)
    xs = [torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * init]
    ps: list[torch.Tensor] = []
    for step, (_, _, seen) in zip(found, wanted, strict=True):
        ours = step.scale_in * xs[-1]
        assert (ours - seen).abs().max() < TOLERANCE * seen.abs().max()
        ps.append(predicted(len(ps) + 1, ours))
        x = sum(c * xs[-1 - i] for i, c in enumerate(step.keep)) + sum(c * ps[-1 - j] for j, c in enumerate(step.gain))
        dtype = torch.float32 if sampler == "dpmpp_2m_sde" else torch.float64  # its scheduler draws so
        drawn = torch.randn(1, 4, 4, 4, generator=noise, dtype=dtype) if step.noise else 0.0
        xs.append(x + step.noise * drawn)
    assert (xs[-1] - last).abs().max() < TOLERANCE * last.abs().max()


def test_experts_in_sigma_are_one_trajectory():
    """Coefficients are those of the single denoiser; only names differ, by the sigma of each step's first evaluation."""
    for sampler in ("dpmpp_2m", "heun", "pndm"):
        alone, _ = sample_steps(XL, sampler=sampler, steps=10)
        found, _ = sample_steps(XL, sampler=sampler, steps=10, experts=Switch.parse("high@sigma=2..inf"))
        assert [replace(step, denoiser="unet") for step in found] == list(alone)
        assert {step.denoiser for step in found} == {"unet", "high"}
        first = {step.index: step.sigma for step in reversed(found)}
        assert all((step.denoiser == "high") == (first[step.index] > 2) for step in found)


def test_nothing_of_another_denoiser_is_reused():
    request = Request(prompt="", steps=8, sampler="ddim", experts="high@sigma=3..inf", reuse="deepcache(8)")
    plan = compile_plan(request, XL)
    runs = [step.denoiser + step.reuse for step in plan.steps]
    assert runs == ["high", "highdeepcache", "unet", *["unetdeepcache"] * 5]
    fake = fake_bundle()
    given = {replace(UNET, name=name, variant=variant) for name, variant in (("high", ""), ("unet", "deepcache"))}
    bundle = replace(fake, components={**fake.components, **dict.fromkeys(given, fake.components[UNET])})
    with pytest.raises(RequestError, match=r"^high has no variant 'deepcache'; leave out reuse, or that expert$"):
        check_variants(plan, bundle)


def test_grammar():
    for text, canonical in (
        ("base@0..0.8,refiner@0.8..1", "unet@0..0.8,refiner@0.8..1"),
        (" refiner @ 0.8 .. 1 ", "unet@0..0.8,refiner@0.8..1"),
        ("high@sigma=5..inf", "unet@sigma=0..5,high@sigma=5..inf"),
        ("refiner", "refiner"),
        ("base", "unet"),
    ):
        switch = Switch.parse(text)
        assert str(switch) == canonical
        assert Switch.parse(canonical) == switch
    for text in ("", "a@0..2", "a@0.5..0.5", "a@0..0.6,b@0.5..1", "a@0..1,b@sigma=1..2", "a@", "a@-1..1", "x" * 200):
        with pytest.raises(RequestError, match="experts"):
            Switch.parse(text)
    with pytest.raises(RequestError, match="experts is 3"):
        Switch.parse(3)  # type: ignore[arg-type]
    assert default_switch({}) is None
    card = ExpertCard("sigma", 5.0, None)
    assert str(default_switch({"high": card})) == "unet@sigma=0..5,high@sigma=5..inf"


def test_what_cannot_hand_over_is_refused():
    switch = Switch.parse("refiner@0.8..1")
    for sampler in ("pndm", "lms"):
        with pytest.raises(RequestError, match="cannot start afresh"):
            sample_steps(XL, sampler=sampler, steps=10, experts=switch)
    with pytest.raises(RequestError, match="no timestep of the 2 lies in"):
        sample_steps(
            XL,
            sampler="euler",
            spacing="linspace",
            steps=2,
            experts=Switch.parse("base@0..0.4,a@0.4..0.999,refiner@0.999..1"),
        )
