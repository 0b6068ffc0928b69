"""The distance against its definition."""

import numpy as np
import pytest
from PIL import Image

from stepforge.runtime.tune.distance import distance


def picture(seed, size=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


def test_distance_is_rmse_and_ssim():
    """Against the definition, window by window."""
    a, b = picture(1), picture(2)
    left, right = (np.asarray(x, np.float64).reshape(32, 2, 32, 2, 3).mean((1, 3)) / 255 for x in (a, b))
    gray = [x[..., 0] * 0.299 + x[..., 1] * 0.587 + x[..., 2] * 0.114 for x in (left, right)]
    values = []
    for y in range(32 - 6):
        for x in range(32 - 6):
            p, q = (g[y : y + 7, x : x + 7].ravel() for g in gray)
            covariance = np.cov(p, q, ddof=0)
            top = (2 * p.mean() * q.mean() + 1e-4) * (2 * covariance[0, 1] + 9e-4)
            bottom = (p.mean() ** 2 + q.mean() ** 2 + 1e-4) * (covariance[0, 0] + covariance[1, 1] + 9e-4)
            values.append(top / bottom)
    expected = (np.sqrt(((left - right) ** 2).mean()) + (1 - np.mean(values)) / 2) / 2
    assert distance(a, b) == pytest.approx(expected, abs=2e-3)  # Pillow's box average rounds to whole bytes
    assert distance(a, a) == pytest.approx(0, abs=1e-12)
    assert distance(a, b) == distance(b, a)
    assert distance(picture(1, 96), picture(2, 96)) > 0.1
