"""Samplers as tables of numbers: a request's sampler, steps and schedule become rows of plain floats.

Each sampler is a pure function `(course, k) -> x_{k+1}` in `SAMPLERS`, written on `Linear` values, and gives the same
latents as the diffusers scheduler of that name. Adding one is a function, its levels and a line in the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stepforge.runtime.errors import RequestError
from stepforge.runtime.plan import Step, levels, multistep
from stepforge.runtime.plan.levels import Settled
from stepforge.runtime.plan.linear import Course, Level, Linear, p, rewind, x, z
from stepforge.runtime.plan.schedules import SCHEDULES, SPACINGS, Array, SchedulerCard, check_falling, check_timesteps


def ddim(course: Course, k: int) -> Linear:
    """DDIM; Song et al., arXiv:2010.02502, eq. 12 and 16."""
    start, end = course.moves[k]
    std = course.eta * posterior_std(start, end)
    row = end.alpha * course.x0(k) + math.sqrt(max(end.sigma**2 - std**2, 0.0)) * course.eps(k)
    return row + std * z(k)


def ddpm(course: Course, k: int) -> Linear:
    """DDPM with the small variance; Ho et al., arXiv:2006.11239, eq. 7."""
    start, end = course.moves[k]
    kept = (start.alpha / end.alpha) ** 2  # alpha_t of the paper, over the whole step
    clean = end.alpha * (1 - kept) / start.sigma**2
    noisy = math.sqrt(kept) * end.sigma**2 / start.sigma**2
    row = clean * course.x0(k) + noisy * x(k)
    return row + posterior_std(start, end) * z(k) if start.t > 0 else row


def posterior_std(start: Level, end: Level) -> float:
    """Standard deviation of q(x_end | x_start, x0)."""
    return end.sigma / start.sigma * math.sqrt(1 - (start.alpha / end.alpha) ** 2)


def euler(course: Course, k: int) -> Linear:
    """Euler in sigma; Karras et al., arXiv:2206.00364, algorithm 2 without churn."""
    start, end = course.moves[k]
    return x(k) + (end.sigma - start.sigma) * course.eps(k)


def euler_a(course: Course, k: int) -> Linear:
    """Euler ancestral: Euler to sigma_down, then noise up to the next sigma; k-diffusion, sample_euler_ancestral."""
    start, end = course.moves[k]
    up = end.sigma / start.sigma * math.sqrt(start.sigma**2 - end.sigma**2)
    down = end.sigma**2 / start.sigma
    return x(k) + (down - start.sigma) * course.eps(k) + up * z(k)


def heun(course: Course, k: int) -> Linear:
    """Heun in sigma; Karras et al., arXiv:2206.00364, algorithm 1. Odd evaluations correct the Euler step before."""
    start, end = course.moves[k]
    if k % 2 == 0:
        return euler(course, k)
    row = x(k - 1) + (end.sigma - start.sigma) / 2 * (course.eps(k - 1) + course.eps(k))
    return row.put(("x", k - 1), rewind(euler(course, k - 1), k))


def kdpm2(course: Course, k: int) -> Linear:
    """DPM-Solver-2 in sigma: Euler to the geometric midpoint, then a full step with the slope found there.

    Karras et al., arXiv:2206.00364, appendix; k-diffusion, sample_dpm_2.
    """
    start, end = course.moves[k]
    if k % 2 == 0:
        return euler(course, k)
    row = x(k - 1) + (end.sigma - start.sigma) * course.eps(k)
    return row.put(("x", k - 1), rewind(euler(course, k - 1), k))


def lcm(course: Course, k: int) -> Linear:
    """Latent consistency: jump to the clean latent, then noise to the next level; Luo et al., arXiv:2310.04378."""
    start, end = course.moves[k]
    scaled, sigma_data = 10.0 * start.t, 0.5
    skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    out = scaled / math.hypot(scaled, sigma_data)
    clean = out * course.x0(k) + skip * x(k)
    return clean if k == len(course.at) - 1 else end.alpha * clean + end.sigma * z(k)


def tcd(course: Course, k: int) -> Linear:
    """Trajectory consistency: jump to time (1 − eta)·t_end, then noise up to t_end; Zheng et al., arXiv:2402.19159."""
    _, low, end = course.moves[k]
    row = low.alpha * course.x0(k) + low.sigma * course.eps(k)
    if course.eta == 0 or k == len(course.at) - 1:
        return row
    kept = end.alpha / low.alpha
    return kept * row + math.sqrt(1 - kept**2) * z(k)


def flow_euler(course: Course, k: int) -> Linear:
    """Euler on a rectified flow, p = dx/dsigma; Esser et al., arXiv:2403.03206."""
    start, end = course.moves[k]
    return x(k) + (end.sigma - start.sigma) * p(k)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """A sampler, the levels it moves between, and what it accepts; the limits are those of its diffusers class."""

    move: Callable[[Course, int], Linear]
    levels: Callable[[SchedulerCard, Settled], Course]
    predictions: tuple[str, ...] = ("epsilon", "v_prediction", "sample")
    spacing: str | None = "linspace"  # default; None: it has timesteps of its own
    schedules: tuple[str, ...] = ("normal",)
    custom: tuple[str, ...] = ()  # "timesteps", "sigmas"
    evaluations: int = 1  # of the network in a step
    fractions: bool = False  # its timesteps need not be whole
    zero_snr: bool = False
    eta: float | None = None  # default; None: it has no eta
    alpha_to_one: bool = True  # default of set_alpha_to_one


NOISY = ("epsilon", "v_prediction")
TIMESTEPS = ("timesteps",)
SAMPLERS = {
    "ddim": Sampler(move=ddim, levels=levels.ddim_levels, spacing="leading", zero_snr=True, eta=0.0),
    "ddpm": Sampler(move=ddpm, levels=levels.ddpm_levels, spacing="leading", zero_snr=True, custom=TIMESTEPS),
    "euler": Sampler(
        move=euler,
        levels=levels.sigma_levels,
        schedules=SCHEDULES,
        custom=("timesteps", "sigmas"),
        fractions=True,
        zero_snr=True,
    ),
    "euler_a": Sampler(move=euler_a, levels=levels.sigma_levels, predictions=NOISY, zero_snr=True),
    "dpmpp_2m": Sampler(
        move=multistep.dpmpp_2m, levels=levels.ahead_levels, schedules=SCHEDULES, custom=TIMESTEPS, zero_snr=True
    ),
    "dpmpp_2m_sde": Sampler(
        move=multistep.dpmpp_2m_sde, levels=levels.ahead_levels, schedules=SCHEDULES, custom=TIMESTEPS, zero_snr=True
    ),
    "dpmpp_3m": Sampler(
        move=multistep.dpmpp_3m, levels=levels.ahead_levels, schedules=SCHEDULES, custom=TIMESTEPS, zero_snr=True
    ),
    "unipc": Sampler(move=multistep.unipc, levels=levels.ahead_levels, schedules=SCHEDULES, zero_snr=True),
    "heun": Sampler(
        move=heun, levels=levels.heun_levels, schedules=SCHEDULES, custom=TIMESTEPS, fractions=True, evaluations=2
    ),
    "kdpm2": Sampler(move=kdpm2, levels=levels.kdpm2_levels, predictions=NOISY, schedules=SCHEDULES, evaluations=2),
    "pndm": Sampler(
        move=multistep.pndm, levels=levels.pndm_levels, predictions=NOISY, spacing="leading", alpha_to_one=False
    ),
    "lms": Sampler(move=multistep.lms, levels=levels.sigma_levels, schedules=SCHEDULES),
    "deis": Sampler(move=multistep.deis, levels=levels.ahead_levels, schedules=SCHEDULES),
    "lcm": Sampler(move=lcm, levels=levels.lcm_levels, spacing=None, zero_snr=True, custom=TIMESTEPS),
    "tcd": Sampler(move=tcd, levels=levels.tcd_levels, spacing=None, zero_snr=True, custom=TIMESTEPS, eta=0.3),
    "flow_euler": Sampler(
        move=flow_euler,
        levels=levels.flow_levels,
        predictions=("flow",),
        spacing=None,
        schedules=SCHEDULES,
        custom=("timesteps", "sigmas"),
        fractions=True,
        zero_snr=True,
    ),
}


def sample_rows(
    card: SchedulerCard,
    *,
    sampler: str = "",
    steps: int | None = None,
    schedule: str = "",
    spacing: str | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    eta: float | None = None,
) -> tuple[tuple[Step, ...], float]:
    """The rows of a request, and the factor of the noise that it starts from.

    sampler, schedule, spacing: empty for the model's own, and where it has none that fits, the sampler's. timesteps,
    sigmas: in place of steps. Sigmas for euler include the one that the last step ends at, usually 0; sigmas for
    flow_euler end at 0 unsaid, and are shifted as the model asks.
    """
    name = sampler or card.sampler
    check_choice("sampler", name, tuple(SAMPLERS))
    kind = SAMPLERS[name]
    if card.prediction_type not in kind.predictions:
        fit = ", ".join(other for other, entry in SAMPLERS.items() if card.prediction_type in entry.predictions)
        raise RequestError(
            f"sampler {name!r} cannot run a model that predicts {card.prediction_type}; choose one of {fit}"
        )
    if card.rescale_betas_zero_snr and not kind.zero_snr:
        fit = those(lambda other: other.zero_snr and card.prediction_type in other.predictions)
        raise RequestError(f"sampler {name!r} cannot run a model of zero terminal SNR; {fit}")
    times = levels = None
    if timesteps is not None:
        times = check_timesteps(timesteps, 0, card.num_train_timesteps - (name != "flow_euler"))
    if sigmas is not None:
        levels = check_falling("sigmas", sigmas)
    choice = Settled(
        sampler=name,
        steps=settle_steps(card, name, steps, times, levels),
        schedule=settle_schedule(card, name, schedule, own=timesteps is not None or sigmas is not None),
        spacing=settle_spacing(card, name, spacing),
        timesteps=times,
        sigmas=levels,
        eta=settle_eta(name, eta),
        alpha_to_one=kind.alpha_to_one if card.set_alpha_to_one is None else card.set_alpha_to_one,
    )
    course = kind.levels(card, choice)
    if card.prediction_type == "epsilon" and course.at[0].alpha == 0:
        raise RequestError(
            f"sampler {name!r} cannot start where there is no signal on a model that predicts epsilon;"
            " choose euler, or a spacing that starts later"
        )
    rows = tuple(row_of(course, k, kind.move(course, k), k // kind.evaluations) for k in range(len(course.at)))
    if course.at[0].scale_in == 1.0:
        return rows, 1.0
    first = max(level.sigma for level in course.at)
    return rows, math.hypot(first, 1.0) if choice.spacing == "leading" else first


def those(fit: Callable[[Sampler], bool]) -> str:
    """The end of a refusal: which samplers would do."""
    return f"choose one of {', '.join(name for name, sampler in SAMPLERS.items() if fit(sampler))}"


def settle_steps(
    card: SchedulerCard, name: str, steps: int | None, timesteps: Array | None, sigmas: Array | None
) -> int:
    own = {"timesteps": timesteps, "sigmas": sigmas}
    given = [what for what, values in own.items() if values is not None]
    for what in given:
        if what not in SAMPLERS[name].custom:
            fit = those(lambda other: what in other.custom)  # noqa: B023, called at once
            raise RequestError(f"sampler {name!r} takes no {what} of a request; {fit}")
    if len(given) + (steps is not None) != 1:
        raise RequestError("give exactly one of steps, timesteps and sigmas")
    if timesteps is not None:
        if not SAMPLERS[name].fractions and (timesteps % 1 != 0).any():
            raise RequestError(f"timesteps of sampler {name!r} must be whole numbers, got {timesteps.tolist()}")
        if name == "flow_euler" and timesteps[-1] == 0:
            raise RequestError("timesteps of sampler 'flow_euler' must be above 0; it ends there unsaid")
        return len(timesteps)
    if sigmas is not None:
        flow = name == "flow_euler"
        needed = sigmas if flow else sigmas[:-1]
        if not needed.size or needed[-1] <= 0 or sigmas[-1] < 0 or (flow and sigmas[0] > 1):
            rule = "lie above 0 and up to 1" if flow else "be two or more, above 0 but for the last"
            raise RequestError(f"sigmas of sampler {name!r} must {rule}; got {sigmas.tolist()}")
        return len(needed)
    count = card.num_train_timesteps
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= count:
        raise RequestError(f"steps is {steps!r}; it must be a whole number in 1..{count}")
    return steps


def settle_schedule(card: SchedulerCard, name: str, schedule: str, *, own: bool) -> str:
    """The sigma schedule; own: the request brings its timesteps or sigmas."""
    if schedule:
        check_choice(f"schedule of sampler {name!r}", schedule, SAMPLERS[name].schedules)
        if own and schedule != "normal":
            raise RequestError(
                f"schedule {schedule!r} makes its own sigmas; it takes no timesteps or sigmas of a request"
            )
        return schedule
    return card.schedule if not own and card.schedule in SAMPLERS[name].schedules else "normal"


def settle_spacing(card: SchedulerCard, name: str, spacing: str | None) -> str:
    default = SAMPLERS[name].spacing
    if spacing:
        check_choice("spacing", spacing, SPACINGS)
        if default is None:
            raise RequestError(f"sampler {name!r} has timesteps of its own and takes no spacing")
    return spacing or card.timestep_spacing or default or ""


def settle_eta(name: str, eta: float | None) -> float:
    default = SAMPLERS[name].eta
    if eta is None:
        return default or 0.0
    if default is None:
        raise RequestError(f"sampler {name!r} has no eta; {those(lambda other: other.eta is not None)}")
    if not 0.0 <= eta <= 1.0:
        raise RequestError(f"eta is {eta}; it must lie in 0..1")
    return float(eta)


def row_of(course: Course, k: int, latent: Linear, index: int) -> Step:
    """x_{k+1} as a row of the sampler's step `index`; its windows end at the oldest coefficient that is not 0."""
    level, clean = course.at[k], course.x0(k)
    return Step(
        t=level.t,
        sigma=level.ratio,
        scale_in=level.scale_in,
        keep=window(latent, "x", k),
        gain=window(latent, "p", k),
        noise=latent["z", k],
        denoised=(clean["x", k], clean["p", k]),
        index=index,
    )


def window(latent: Linear, symbol: str, k: int) -> tuple[float, ...]:
    oldest = min((j for (name, j), value in latent.terms.items() if name == symbol and value != 0.0), default=k)
    return tuple(float(latent[symbol, j]) for j in range(k, oldest - 1, -1))


def check_choice(what: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RequestError(f"{what} is {value!r}; choose one of {', '.join(choices)}")
