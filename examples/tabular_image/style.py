"""The look of all pictures of the pipeline and the benchmarks: legible at a page's width, in light and dark mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib.style
from cycler import cycler

WIDTH = 7.4  # inches: on a page 740 pixels wide, a point of type is 1.4 pixels high
DPI = 160  # of files: 1,184 pixels for the width of a page, for screens of high density
# The colours of Okabe and Ito, which the common kinds of colour-blindness keep apart.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = {"fused": "black", "image": BLUE, "table": VERMILLION, "joint": GREEN}
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 9.5,
    "axes.prop_cycle": cycler(color=[BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.facecolor": "white",  # dark pages show the picture as a light card
    "figure.titlesize": 10,
    "font.size": 9.5,
    "grid.alpha": 0.3,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "savefig.facecolor": "white",
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}
_FEW = 40  # epochs


@contextmanager
def styled() -> Iterator[None]:
    """Draws in this look, whatever the user's own settings of matplotlib are. Works as a decorator too."""
    with matplotlib.style.context(STYLE, after_reset=True):
        yield


def marker(points: int) -> str:
    """The marker of a curve: only curves of few points mark each point."""
    return "o" if points <= _FEW else ""
