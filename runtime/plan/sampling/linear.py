"""What samplers are written in: latents as linear combinations, and the noise levels that they move between."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

# ("x", k): latent k, ("p", k): prediction k, ("r", k): raw prediction k where p_k is the limited clean latent,
# ("z", k): noise drawn after evaluation k
Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Linear:
    """Σ terms[key]·key. Formulas of samplers are written with +, − and scalars; rows are read off the result."""

    terms: Mapping[Key, float]

    def __add__(self, other: Linear) -> Linear:
        total = dict(self.terms)
        for key, value in other.terms.items():
            total[key] = total.get(key, 0.0) + value
        return Linear(total)

    def __mul__(self, factor: float) -> Linear:
        return Linear({key: value * factor for key, value in self.terms.items()})

    __rmul__ = __mul__

    def __sub__(self, other: Linear) -> Linear:
        return self + other * -1.0

    def __truediv__(self, divisor: float) -> Linear:
        return Linear({key: value / divisor for key, value in self.terms.items()})

    def __getitem__(self, key: Key) -> float:
        return self.terms.get(key, 0.0)

    def put(self, key: Key, value: Linear) -> Linear:
        """This with `value` in place of `key`."""
        rest = Linear({name: factor for name, factor in self.terms.items() if name != key})
        return rest + value * self[key]


def x(k: int) -> Linear:
    return Linear({("x", k): 1.0})


def p(k: int) -> Linear:
    return Linear({("p", k): 1.0})


def raw(k: int) -> Linear:
    return Linear({("r", k): 1.0})


def z(k: int) -> Linear:
    return Linear({("z", k): 1.0})


def rewind(row: Linear, k: int) -> Linear:
    """x_{k-1} in terms of x_k, when x_k = row and row holds x_{k-1}: keeps windows short."""
    factor = row["x", k - 1]
    return (x(k) - row.put(("x", k - 1), Linear({}))) / factor


@dataclass(frozen=True, slots=True)
class Level:
    """A latent alpha·x0 + sigma·noise. The network sees scale_in times it, and is told t."""

    t: float
    alpha: float
    sigma: float
    scale_in: float = 1.0

    @property
    def ratio(self) -> float:
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def log_snr(self) -> float:
        """lambda = log(alpha / sigma), the time of DPM-Solver."""
        return math.log(self.alpha) - math.log(self.sigma)


@dataclass(frozen=True, slots=True)
class NoisePath:
    """All that a sampler reads. Evaluation k sees x_k at at[k]; its move is from moves[k][0] to moves[k][-1].

    The two differ for samplers of two evaluations per step, and where diffusers counts back from t by a fixed stride.
    before: evaluations that a strength below 1 has cut off. blended: x_{k+1} is changed between evaluations, so that no
    earlier latent can be had from it.
    limited: p_k is the clean latent after thresholding or clipping (threshold.py), no longer what the network predicts.
    """

    prediction: str
    at: tuple[Level, ...]
    moves: tuple[tuple[Level, ...], ...]
    eta: float = 0.0
    limited: bool = False
    before: int = 0
    blended: bool = False

    def x0(self, k: int) -> Linear:
        """Estimate of the clean latent that samplers read."""
        return p(k) if self.limited else self.estimate(k)

    def raw(self, k: int) -> Linear:
        """What the network predicts."""
        return raw(k) if self.limited else p(k)

    def estimate(self, k: int) -> Linear:
        """Estimate of the clean latent from x_k and the network's prediction, without limits."""
        alpha, sigma, out = self.at[k].alpha, self.at[k].sigma, self.raw(k)
        if self.prediction == "epsilon":
            return (x(k) - sigma * out) / alpha
        if self.prediction == "sample":
            return out
        if self.prediction == "flow":  # p = noise − x0, alpha = 1 − sigma
            return x(k) - sigma * out
        norm = math.hypot(alpha, sigma)  # v is defined on latents of norm 1
        return x(k) * (alpha / norm**2) - out * (sigma / norm)

    def eps(self, k: int) -> Linear:
        """Estimate of the noise in x_k; where alpha is 1 it is also dx/dsigma. Never limited."""
        alpha, sigma, out = self.at[k].alpha, self.at[k].sigma, self.raw(k)
        if self.prediction == "epsilon":
            return out
        if self.prediction == "sample":
            return (x(k) - alpha * out) / sigma
        if self.prediction == "flow":
            return x(k) + alpha * out
        norm = math.hypot(alpha, sigma)
        return x(k) * (sigma / norm**2) + out * (alpha / norm)

    def limited_eps(self, k: int) -> Linear:
        """The noise that is left of x_k beside `x0`: differs from `eps` where x0 is limited."""
        level = self.at[k]
        return (x(k) - level.alpha * p(k)) / level.sigma if self.limited else self.eps(k)
