"""Chapter 10: where the ops of SD1.5's step lie under the roof of a GPU's data sheet."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from bench.families import FAMILIES
from bench.roofline import KINDS, step_work
from book.figures.style import figure

FLOPS, BYTES = 989.4e12, 3352e9  # NVIDIA H100 SXM, data sheet: dense fp16, HBM3
ITEM = 2  # bytes of a number


def roofline() -> Figure:
    """Intensity of every product, its size the work, under what the GPU could do at most. Norms have bytes alone."""
    fig, axes = figure(3.8)
    intensity = np.logspace(0.5, 4, 200)
    axes.loglog(intensity, np.minimum(FLOPS, BYTES * intensity) / 1e12, color="black", linewidth=1.5)
    for kind, marker in zip(KINDS[:3], "osD"):
        work = [op for op in step_work(FAMILIES["sd15"], 1, 512) if op.kind == kind and op.flops]
        x = np.array([op.flops / (op.elements * ITEM) for op in work])
        area = np.array([8 + 400 * op.flops / 40e9 for op in work])
        rate = np.minimum(FLOPS, BYTES * x) / 1e12
        axes.scatter(x, rate, s=np.minimum(area, 200), marker=marker, alpha=0.6, label=kind)
    axes.axvline(FLOPS / BYTES, color="#999999", linewidth=0.8, linestyle=":")
    axes.text(FLOPS / BYTES * 0.93, 13, f"{FLOPS / BYTES:.0f} operations a byte", fontsize=9, ha="right")
    axes.set(xlabel="operations for each byte", ylabel="TFLOP/s at most", ylim=(10, 2000), xlim=(10, 10_000))
    axes.set_title("Products of SD1.5's guided step (512²) under an H100's data sheet; larger marks, more work")
    axes.legend(loc="lower right")
    return fig
