"""The frontier of a search as a picture: cost to the right, distance upwards."""

from __future__ import annotations

import importlib.util
import io

from stepforge.runtime.errors import RequestError
from stepforge.runtime.tune.search import Tuning


def check_matplotlib() -> None:
    """Raise RequestError if it is not installed; without importing it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError("a plot needs matplotlib; pip install 'stepforge[plot]'")


def plot_frontier(tuning: Tuning) -> bytes:
    """PNG, 640×400 pixels: trials as dots, the frontier as a line, the limit, and a ring around the chosen one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    trials, frontier = (tuning.full, *tuning.trials), tuning.frontier
    axes.scatter([t.cost for t in trials], [t.distance for t in trials], 16, "tab:gray", label="tried")
    axes.plot([t.cost for t in frontier], [t.distance for t in frontier], "o-", color="tab:blue", label="frontier")
    axes.axhline(tuning.limit, color="tab:red", label="limit")
    if (chosen := tuning.chosen) is not None:
        axes.plot(
            [chosen.cost], [chosen.distance], "o", color="tab:red", markersize=12, fillstyle="none", label="chosen"
        )
    axes.set_xlabel("cost of an image, in rows of the whole denoiser")
    axes.set_ylabel("mean distance to the full plan's pictures")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
