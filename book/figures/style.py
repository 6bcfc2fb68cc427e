"""What all figures share: size, colours, type."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

WIDTH = 8.0  # inches; 1000 pixels at DPI
DPI = 125
# Okabe and Ito 2008: distinct for colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")

STYLE = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "font.size": 10,
    "legend.frameon": False,
    "svg.hashsalt": "fastsd",
}


def figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of the common width, and its axes."""
    plt.rcParams.update(STYLE)
    return plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained", **options)


def show_image(axes: Any, image: Any, title: str = "") -> None:
    """An image without axes, its pixels as they are."""
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=9, loc="center")
    axes.axis("off")
