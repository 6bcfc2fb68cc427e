"""Chapter 5: the error of samplers on a model whose answer is known."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from book.figures.style import figure
from fastsd.config import SchedulerConfig
from fastsd.sampling.advance import begin, draws_noise, model_input, step, timestep
from fastsd.sampling.build import build
from fastsd.sampling.schedule import Schedule

SPREAD = 0.3
CONFIG = SchedulerConfig()
SAMPLERS = ("euler", "heun", "dpm2", "dpm++2m", "unipc", "deis", "lms", "ipndm")
STEPS = (6, 8, 12, 16, 24, 32, 48, 64)
LEVELS = torch.tensor(Schedule(CONFIG, 1).sigmas.copy())


def predicted_noise(x: torch.Tensor, t: float) -> torch.Tensor:
    """The noise that a perfect network sees in the variance-preserving `x`, of images from N(-1, s^2) and N(1, s^2)."""
    low = int(t)
    sigma = torch.lerp(LEVELS[low], LEVELS[min(low + 1, len(LEVELS) - 1)], t - low)
    x = x * (1 + sigma**2).sqrt()
    variance = SPREAD**2 + sigma**2
    share = torch.sigmoid(2 * x / variance)
    mean = (SPREAD**2 * x + sigma**2 * (2 * share - 1)) / variance
    return (x - mean) / sigma


def run(sampler: str, steps: int, noise: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The result of a sampler with Karras' schedule, and its calls of the network."""
    table = build(sampler, steps, CONFIG, schedule="karras")
    state = begin(table, noise)
    while not state.done:
        assert not draws_noise(state)
        step(state, predicted_noise(model_input(state), timestep(state)))
    return state.x, len(table)


def samplers() -> Figure:
    """Root mean square error against calls of the network."""
    noise = torch.randn(1, 16, 16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact, _ = run("heun", 1000, noise)
    fig, axes = figure(3.8)
    for name, marker in zip(SAMPLERS, "osD^v<>x"):
        runs = [run(name, steps, noise) for steps in STEPS]
        errors = [float((x - exact).square().mean().sqrt()) for x, _ in runs]
        axes.loglog([calls for _, calls in runs], errors, marker=marker, markersize=4, linewidth=1.2, label=name)
    axes.set(xlabel="calls of the network", ylabel="distance from the exact end (rms)")
    axes.set_xticks([8, 16, 32, 64, 128], ["8", "16", "32", "64", "128"])
    axes.minorticks_off()
    axes.set_title("Two Gaussians, a perfect network, Karras' schedule")
    axes.legend(ncols=2)
    return fig
