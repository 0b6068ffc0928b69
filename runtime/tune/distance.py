"""How unlike two pictures look."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 32  # pixels of the compared pictures
WINDOW = 7  # pixels of the squares that SSIM compares


def distance(a: Image.Image, b: Image.Image) -> float:
    """(RMSE + (1 − SSIM)/2) / 2 of two pictures, each box-averaged to 32x32; from 0 (equal) to 1.

    RMSE is over RGB in 0..1. SSIM (Wang et al. 2004, K 0.01 and 0.03) is the mean over 7x7 squares of the luma. So one
    half looks at colours and one at shapes, and neither at detail finer than a thirty-second of the picture.
    """
    left, right = (_small(picture) for picture in (a, b))
    rmse = float(np.sqrt(((left - right) ** 2).mean()))
    luma = np.array([0.299, 0.587, 0.114])
    return (rmse + (1 - _ssim(left @ luma, right @ luma)) / 2) / 2


def _small(picture: Image.Image) -> NDArray[np.float64]:
    return np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), np.float64) / 255


def _ssim(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    def squares(x: NDArray[np.float64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = np.lib.stride_tricks.sliding_window_view(x, (WINDOW, WINDOW)).mean((2, 3))
        return found

    mean_a, mean_b = squares(a), squares(b)
    var_a, var_b = squares(a * a) - mean_a**2, squares(b * b) - mean_b**2
    covariance = squares(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((likeness / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())
