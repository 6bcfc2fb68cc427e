"""Chapter 1: an image dissolves; two ways back from noise to two points."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure

import fastsd
from book.figures.style import COLOURS, figure, show_image
from fastsd.config import SchedulerConfig
from fastsd.sampling.schedule import Schedule, alphas_cumprod

TIMES = (0, 100, 250, 400, 550, 750, 999)
SIGMA_MAX = 14.6


def forward() -> Figure:
    """One digit at seven noise levels above the signal-to-noise ratio of two schedules."""
    pipe = fastsd.Pipeline.from_pretrained(device="cpu", dtype="fp32")
    image = 2 * pipe("a handwritten eight", seed=7, output_type="np").images[0] - 1
    noise = np.random.default_rng(0).standard_normal(image.shape)
    schedules = {"SD1.5": SchedulerConfig(), "digits, rescaled to end at 0": pipe.components.scheduler}
    alpha_bar = alphas_cumprod(schedules["SD1.5"])
    fig, axes = figure(4.6)
    axes.remove()
    grid = fig.add_gridspec(2, len(TIMES), height_ratios=(1, 2.2))
    for k, t in enumerate(TIMES):
        noisy = np.sqrt(alpha_bar[t]) * image + np.sqrt(1 - alpha_bar[t]) * noise
        show_image(fig.add_subplot(grid[0, k]), np.clip((noisy + 1) / 2, 0, 1), f"t = {t}")
    below = fig.add_subplot(grid[1, :])
    for name, config in schedules.items():
        values = alphas_cumprod(config)
        with np.errstate(divide="ignore"):
            below.semilogy(values / (1 - values), label=name)
    below.axhline(1, color="#999999", linewidth=0.8, linestyle=":")
    below.set(xlabel="timestep", ylabel="signal-to-noise ratio", xlim=(0, 999), ylim=(1e-3, 3e3))
    below.set_title("As much noise as signal: the dotted line")
    below.legend()
    return fig


def _paths(noisy: bool, count: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Levels and paths `[steps + 1, count]` of x0 + sigma z for x0 in -1 and 1, from noise to an image."""
    sigmas = torch.tensor(Schedule(SchedulerConfig(), 1).sigmas[:: 1000 // steps][::-1].copy())
    levels = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
    generator = torch.Generator().manual_seed(3)
    x = SIGMA_MAX * torch.randn(count, dtype=torch.float64, generator=generator)
    path = [x]
    for sigma, below in zip(levels, levels[1:]):
        slope = (x - torch.tanh(x / sigma**2)) / sigma
        if noisy:  # twice the drift, and noise of the variance that it takes away
            fresh = torch.randn(count, dtype=torch.float64, generator=generator)
            x = x + 2 * (below - sigma) * slope
            x = x + (sigma**2 - below**2).clamp(min=0).sqrt() * fresh * (below > 0)
        else:
            x = x + (below - sigma) * slope
        path.append(x)
    return levels.numpy(), torch.stack(path).numpy()


def flow() -> Figure:
    """Paths of the probability flow, and of Euler-Maruyama, in the variance-preserving scale."""
    fig, axes = figure(3.4, 1, 2, sharey=True)
    titles = "Probability flow: no noise", "Euler–Maruyama: fresh noise in each step"
    for one, noisy, title in zip(axes, (False, True), titles):
        levels, path = _paths(noisy, 40, 250)
        scaled = path / np.sqrt(1 + levels[:, None] ** 2)
        for k in range(path.shape[1]):
            colour = COLOURS[int(path[-1, k] > 0)]
            one.plot(np.arange(len(levels)), scaled[:, k], linewidth=0.7, alpha=0.8, color=colour)
        one.set(xlabel="step", title=title, xlim=(0, len(levels) - 1))
    axes[0].set_ylabel("x, scaled to variance 1")
    return fig
