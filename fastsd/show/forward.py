"""`fastsd show forward`: an image's latents dissolve into noise, as the model sees it in training."""

from __future__ import annotations

import numpy as np
import torch

from fastsd.errors import FastsdError
from fastsd.image.drawing import enlarged, labelled, shrunk, stacked, titled
from fastsd.sampling.schedule import alphas_cumprod
from fastsd.show.plot import Axis, Line, plot
from fastsd.show.scene import CELL, Scene, as_colours

SHARES = (0.0, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0)  # of the timesteps


def draw(scene: Scene) -> list[bytes]:
    """The strip and the curve.

    x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (Ho et al. 2020, equation 4), the same noise at every t. The
    signal-to-noise ratio is alpha_bar / (1 - alpha_bar).
    """
    if scene.scheduler.edm is not None:
        raise FastsdError(
            "shows models that were trained on timesteps; this one was trained on sigmas", argument="--model"
        )
    levels = alphas_cumprod(scene.scheduler)
    image = scene.subject()
    start = scene.encode(image)
    generator = torch.Generator("cpu").manual_seed(scene.seed)
    noise = torch.randn(start.shape, generator=generator, dtype=torch.float32, device="cpu")
    points = [round(share * (len(levels) - 1)) for share in SHARES]
    decoded, latents = [], []
    for t in points:
        signal = float(levels[t])
        x = signal**0.5 * start + (1 - signal) ** 0.5 * noise
        decoded.append((enlarged(shrunk(scene.decode(x), 256), CELL), f"t = {t}, SNR {decibels(signal)}"))
        latents.append(
            (enlarged(shrunk(as_colours(x), CELL), CELL), f"{signal**0.5:.3f} signal + {(1 - signal) ** 0.5:.3f} noise")
        )
    strip = titled(
        labelled([decoded, latents], scene.theme),
        f"The forward process of {scene.model}",
        [
            "Above: the noisy latents, decoded.",
            "Below: the latents themselves, channels 1 to 3 from -3 to 3 as red, green and blue.",
        ],
        scene.theme,
    )
    every = list(range(len(levels)))
    with np.errstate(divide="ignore"):
        ratio = 10 * np.log10(levels / (1 - levels))
    curve = plot(
        [
            Line("every timestep", every, ratio.tolist()),
            Line("shown above", points, ratio[points].tolist(), True, False),
        ],
        Axis("timestep t"),
        Axis("SNR in dB"),
        "Signal-to-noise ratio, 10 log10(alpha_bar / (1 - alpha_bar))",
        (strip.width, 320),
        scene.theme,
    )
    return [scene.png(stacked([strip, curve], scene.theme))]


def decibels(signal: float) -> str:
    """ "-3.0 dB"; no signal at all has no number."""
    if signal <= 0:
        return "0 (no signal)"
    return f"{10 * np.log10(signal / (1 - signal)):.1f} dB"
