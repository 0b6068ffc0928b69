"""The plot shows every trial, in a picture of a known size."""

import io
import sys

import pytest
from PIL import Image

from stepforge import RequestError
from stepforge.runtime.tune.candidate import FULL, Candidate
from stepforge.runtime.tune.plot import check_matplotlib, plot_frontier
from stepforge.runtime.tune.search import Trial, Tuning


@pytest.mark.parametrize("limit", [0.1, 0.001], ids=["chosen", "none chosen"])
def test_plot(limit):
    trials = tuple(Trial(Candidate(guidance_end=end), 20, 40 * end, 0.1 * (1 - end), 0.1) for end in (0.2, 0.5, 0.9))
    tuning = Tuning(Trial(FULL, 40, 40.0, 0.0, 0.0), trials, {"unet": 1.0}, 0.3, 12, limit)
    picture = Image.open(io.BytesIO(plot_frontier(tuning)))
    assert (picture.format, picture.size) == ("PNG", (640, 400))
    colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert {(31, 119, 180), (214, 39, 40)} <= colours  # the frontier and the limit


def test_matplotlib_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RequestError, match=r"a plot needs matplotlib; pip install 'stepforge\[plot\]'"):
        check_matplotlib()
