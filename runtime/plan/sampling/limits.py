"""What of a step is not linear: clean latents held within limits, and noise whose deviation the network predicts.

A step with a `threshold` is computed on the limited clean latent: p_k of its row is

    p_k = limited(denoised[0]·x_k + denoised[1]·raw_k)

where raw_k is the guided output of the network. A step with a `variance` scales its noise by pixel. Both as diffusers'
schedulers do it: Saharia et al., arXiv:2205.11487, section 2.3, and Nichol and Dhariwal, arXiv:2102.09672, eq. 15.
"""

from __future__ import annotations

import numpy as np

from stepforge.runtime.arrays import Float32


def limited(clean: Float32, threshold: tuple[float, float]) -> Float32:
    """Dynamic thresholding of one image, flat: clipped to ±s and divided by s, the quantile `ratio` of |clean| in 1..cap.

    A cap of 1 clips to ±1.
    """
    ratio, cap = threshold
    s = np.float32(1.0)
    if cap > 1.0:
        s = np.float32(min(max(float(np.quantile(np.abs(clean), ratio)), 1.0), cap))
    return np.clip(clean, -s, s) / s


def deviation(values: Float32, variance: tuple[float, float]) -> Float32:
    """Standard deviation of the noise, from the network's variance channels: −1 is the lower bound, 1 the upper one.

    variance: log beta, log beta~; the logarithm of the variance lies between them.
    """
    upper, lower = (np.float32(bound) for bound in variance)
    share = (values + np.float32(1.0)) / np.float32(2.0)
    return np.exp(np.float32(0.5) * (share * upper + (np.float32(1.0) - share) * lower))
