"""Samplers that reuse earlier predictions. Each gives x_{k+1} as a linear combination; see samplers.py."""

from __future__ import annotations

import math

import numpy as np

from stepforge.runtime.plan.sampling.linear import Level, Linear, NoisePath, p, rewind, x, z

FEW = 15  # below this many steps DPM-Solver and DEIS end with lower orders, as in diffusers


def pndm(path: NoisePath, k: int) -> Linear:
    """PNDM without Runge-Kutta steps (PLMS): Adams-Bashforth on raw predictions, then a DDIM-like transfer.

    Liu et al., arXiv:2202.09778, eq. 9 and 12. The second evaluation repeats the first step with the mean of p_0, p_1.
    """
    if k == 1:
        row = transfer(path, x(0), (p(0) + p(1)) / 2, 1)
        return row if path.blended else row.put(("x", 0), rewind(pndm(path, 0), 1))
    past = [p(j) for j in range(k, -1, -1) if j != 1]
    if len(past) == 1:
        mean = past[0]
    elif len(past) == 2:
        mean = (3 * past[0] - past[1]) / 2
    elif len(past) == 3:
        mean = (23 * past[0] - 16 * past[1] + 5 * past[2]) / 12
    else:
        mean = (55 * past[0] - 59 * past[1] + 37 * past[2] - 9 * past[3]) / 24
    return transfer(path, x(k), mean, k)


def transfer(path: NoisePath, latent: Linear, prediction: Linear, k: int) -> Linear:
    start, end = path.moves[k]
    if path.prediction == "v_prediction":
        prediction = start.alpha * prediction + start.sigma * latent
    span = end.alpha**2 - start.alpha**2
    below = start.alpha**2 * end.sigma + start.alpha * start.sigma * end.alpha
    return (end.alpha / start.alpha) * latent - (span / below) * prediction


def lms(path: NoisePath, k: int) -> Linear:
    """Linear multistep of order 4: the polynomial through the last derivatives, integrated from sigma_k to sigma_{k+1}.

    Katherine Crowson's k-diffusion, sample_lms.
    """
    order = min(k + 1, 4)
    sigmas = [path.at[k - j].sigma for j in range(order)]
    start, end = (level.sigma for level in path.moves[k])
    nodes, weights = np.polynomial.legendre.leggauss(2)  # exact for cubics
    total = x(k)
    for j in range(order):
        integral = 0.0
        for node, weight in zip(nodes, weights, strict=True):
            tau = start + (end - start) * (node + 1) / 2
            others = [(tau - sigmas[i]) / (sigmas[j] - sigmas[i]) for i in range(order) if i != j]
            integral += float(weight * math.prod(others)) * (end - start) / 2
        total = total + integral * path.eps(k - j)
    return total


def dpmpp_1(path: NoisePath, k: int) -> Linear:
    """DPM-Solver++ of order 1, which is DDIM; Lu et al., arXiv:2211.01095."""
    start, end = path.moves[k]
    shrink = decay(start, end)
    return (end.sigma / start.sigma) * x(k) + end.alpha * (1 - shrink) * path.x0(k)


def dpmpp_2m(path: NoisePath, k: int) -> Linear:
    """DPM-Solver++ (2M), midpoint; Lu et al., arXiv:2211.01095, algorithm 2."""
    start, end = path.moves[k]
    if k == 0 or end.sigma == 0:
        return dpmpp_1(path, k)
    slope = difference(path, k)
    return dpmpp_1(path, k) + 0.5 * end.alpha * (1 - decay(start, end)) * slope


def dpmpp_2m_sde(path: NoisePath, k: int) -> Linear:
    """SDE-DPM-Solver++ (2M), midpoint; Lu et al., arXiv:2211.01095, appendix."""
    start, end = path.moves[k]
    shrink = decay(start, end)
    clean = path.x0(k)
    if k > 0 and end.sigma > 0:
        clean = clean + 0.5 * difference(path, k)
    row = (end.sigma / start.sigma * shrink) * x(k) + end.alpha * (1 - shrink**2) * clean
    return row + end.sigma * math.sqrt(1 - shrink**2) * z(k)


def dpmpp_3m(path: NoisePath, k: int) -> Linear:
    """DPM-Solver++ (3M); Lu et al., arXiv:2206.00927, appendix, in the data-prediction form of arXiv:2211.01095."""
    _, end = path.moves[k]
    steps = len(path.at)
    if k < 2 or end.sigma == 0 or (k == steps - 2 and steps + path.before < FEW):
        return dpmpp_2m(path, k)
    h, h0, h1 = (path.moves[k - j][1].log_snr - path.at[k - j].log_snr for j in range(3))
    slope0 = (path.x0(k) - path.x0(k - 1)) * (h / h0)
    slope1 = (path.x0(k - 1) - path.x0(k - 2)) * (h / h1)
    bend = (slope0 - slope1) * (h / (h0 + h1))
    slope = slope0 + bend * (h0 / h)
    phi2 = math.expm1(-h) / h + 1
    phi3 = (math.expm1(-h) + h) / h**2 - 0.5
    return dpmpp_1(path, k) + end.alpha * (phi2 * slope - phi3 * bend)


def difference(path: NoisePath, k: int) -> Linear:
    """(x0_k − x0_{k−1}) per step of log SNR, times the coming step."""
    start, end = path.moves[k]
    past = path.at[k - 1]
    return (path.x0(k) - path.x0(k - 1)) * ((end.log_snr - start.log_snr) / (start.log_snr - past.log_snr))


def decay(start: Level, end: Level) -> float:
    """exp(−h), h = lambda_end − lambda_start; 0 where the step ends without noise."""
    return (end.sigma * start.alpha) / (end.alpha * start.sigma)


def deis(path: NoisePath, k: int) -> Linear:
    """DEIS of order 2 in log rho; Zhang and Chen, arXiv:2204.13902. rho = sigma / alpha."""
    start, end = path.moves[k]
    steps = len(path.at)
    if k == 0 or (k == steps - 1 and steps + path.before < FEW):
        return (end.alpha / start.alpha) * x(k) + (end.sigma - end.alpha * start.ratio) * path.limited_eps(k)
    now, past = start.ratio, path.at[k - 1].ratio

    def weight(node: float, other: float) -> float:
        """∫ (log rho − log other) / (log node − log other) d rho over the step."""
        at_end, at_start = (rho * (math.log(rho) - math.log(other) - 1) for rho in (end.ratio, now))
        return (at_end - at_start) / (math.log(node) - math.log(other))

    step = weight(now, past) * path.limited_eps(k) + weight(past, now) * path.limited_eps(k - 1)
    return end.alpha * (x(k) / start.alpha + step)


def unipc(path: NoisePath, k: int) -> Linear:
    """UniPC of order 2 with B(h) = e^h − 1: correct x_k by the prediction just made, then predict x_{k+1}.

    Zhao et al., arXiv:2302.04867, algorithms 1 and 2.
    """
    start, end = path.moves[k]
    return (end.sigma / start.sigma) * corrected(path, k) + predictor(path, k)


def unipc_order(path: NoisePath, k: int) -> int:
    return min(2, k + 1, len(path.at) - k)


def predictor(path: NoisePath, k: int) -> Linear:
    """What UniP adds to the scaled latent."""
    start, end = path.moves[k]
    clean = path.x0(k)
    if unipc_order(path, k) == 2:
        clean = clean + 0.5 * difference(path, k)
    return end.alpha * (1 - decay(start, end)) * clean


def corrected(path: NoisePath, k: int) -> Linear:
    """x_k after UniC. Its base, the corrected x_{k−1}, is the one from which x_k was predicted: x_k gives it back."""
    if k == 0:
        return x(0)
    start, end = path.moves[k - 1]
    scaled_base = x(k) - predictor(path, k - 1)
    h = end.log_snr - start.log_snr
    span = -math.expm1(-h)
    phi1 = 1 - span / h  # h·phi_2 of the paper for data prediction, over B(h) below
    row = scaled_base + end.alpha * span * path.x0(k - 1)
    jump = path.x0(k) - path.x0(k - 1)
    if unipc_order(path, k - 1) == 1:
        return row + 0.5 * end.alpha * span * jump
    # two conditions: rho_past + rho = b1, r·rho_past + rho = b2
    r = (path.at[k - 2].log_snr - start.log_snr) / h
    b1 = phi1 / span
    b2 = 2 * (0.5 - phi1 / h) / span
    rho_past = (b1 - b2) / (1 - r)
    rho = b1 - rho_past
    past = (path.x0(k - 2) - path.x0(k - 1)) / r
    return row + end.alpha * span * (rho_past * past + rho * jump)
