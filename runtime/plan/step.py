"""A step of the plan: one network evaluation as a row of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """One network evaluation and the line that moves the latent:

        x_{k+1} = Σ_i keep[i]·x_{k-i} + Σ_j gain[j]·p_{k-j} + noise·z

    x_k are the latents that the plan's network saw (before `scale_in`), p_k the guided *raw* outputs of the network
    (epsilon, v, sample or flow, whatever it predicts) and z standard normal noise. Plain floats only. What is not linear,
    `threshold` and `variance`, is in limits.py.
    """

    t: float  # what the denoiser is told, in its own unit (0..num_train_timesteps)
    sigma: float  # noise-to-signal ratio sigma/alpha of x_k; for windows, display and expert choice
    scale_in: float  # network input = scale_in · x_k
    keep: tuple[float, ...]  # coefficients of x_k, x_{k-1}, ...
    gain: tuple[float, ...]  # coefficients of p_k, p_{k-1}, ...
    noise: float  # coefficient of fresh noise; 0.0 draws none
    denoised: tuple[float, float]  # estimate of the clean latent = denoised[0]·x_k + denoised[1]·p_k (previews)
    guidance: float = 1.0  # w in uncond + w·(cond − uncond); 1.0: conditional row only, 0.0: unconditional row only
    adapters: float = 1.0  # multiplies the strength of the request's LoRA adapters
    control: tuple[float, ...] = ()  # scale of each of the request's ControlNets; 0.0: that network is not run
    reuse: str = ""  # a variant of the denoiser that reuses an earlier step's activations: "deepcache", "tgate"
    denoiser: str = "unet"
    known: tuple[float, float] | None = None  # inpainting: known part after the step = known[0]·y + known[1]·z_0
    threshold: tuple[float, float] | None = None  # ratio, cap: p_k is then the limited clean latent, see limits.py
    raw: float = 0.0  # coefficient of the raw output of the network, where p_k is the limited clean latent
    variance: tuple[float, float] | None = None  # log beta, log beta~: the network predicts how strong the noise is
    draws_more: bool = (
        False  # noise is drawn behind it that nothing uses, so that a next stage continues as in diffusers
    )
    index: int = 0  # number of the sampler's step; the two evaluations of a Heun step share one


def rows_of(guidance: float) -> int:
    return 1 if guidance in (0.0, 1.0) else 2


def expand(steps: Sequence[Step], init_noise: float) -> list[dict[tuple[str, int], float]]:
    """Each latent x_0..x_K as exact coefficients over the plan's inputs: ("x", 0), ("p", k) and ("z", k).

    Two plans that give equal expansions give equal images, whatever window their rows use.
    """
    latents: list[dict[tuple[str, int], float]] = [{("x", 0): init_noise}]
    for k, step in enumerate(steps):
        total: dict[tuple[str, int], float] = {}
        for i, coefficient in enumerate(step.keep):
            for key, value in latents[k - i].items():
                total[key] = total.get(key, 0.0) + coefficient * value
        for j, coefficient in enumerate(step.gain):
            total["p", k - j] = total.get(("p", k - j), 0.0) + coefficient
        if step.noise:
            total["z", k] = step.noise
        latents.append(total)
    return latents
