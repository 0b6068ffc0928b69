"""Two measures of difference: relative error of arrays, PSNR of images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_PSNR = 120.0  # dB, stands for identical images


def relative_error(ours: NDArray[Any], reference: NDArray[Any]) -> float:
    """‖ours − reference‖ / ‖reference‖, in double precision; infinite if ours is not finite."""
    a, b = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    value = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-12))
    return value if math.isfinite(value) else math.inf


def psnr(ours: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """Peak signal to noise ratio of 8-bit images, in dB; MAX_PSNR if they are identical."""
    mse = float(np.mean((ours.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return MAX_PSNR if mse == 0 else min(MAX_PSNR, 10 * math.log10(255**2 / mse))
