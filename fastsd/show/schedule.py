"""`fastsd show schedule`: the betas of training, the noise levels of each schedule, the calls of each sampler."""

from __future__ import annotations

import numpy as np
from PIL import Image

from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.image.drawing import stacked, titled
from fastsd.sampling.build import build
from fastsd.sampling.samplers import SAMPLERS, SCHEDULES, complete
from fastsd.sampling.schedule import Schedule, alphas_cumprod, betas
from fastsd.sampling.table import COLUMNS, Table
from fastsd.show.plot import Axis, Line, Strip, plot, strips
from fastsd.show.scene import Scene

STEPS = 10  # where --settings has none
WIDTH = 900


def draw(scene: Scene) -> list[bytes]:
    """Plots of training, then a strip for each schedule and each sampler."""
    config, steps = scene.scheduler, scene.settings.get("num_inference_steps", STEPS)
    parts = [] if config.edm is not None else [_training(config, scene)]
    parts += [_schedules(config, steps, scene), _samplers(config, steps, scene)]
    what = "sigmas of an EDM model" if config.edm is not None else f"{config.beta_schedule} betas"
    kind = config.prediction_type
    return [
        scene.png(
            titled(stacked(parts, scene.theme), f"The noise schedule of {scene.model}: {what}, {kind}", [], scene.theme)
        )
    ]


def _training(config: SchedulerConfig, scene: Scene) -> Image.Image:
    """Beta and alpha_bar of every timestep, side by side."""
    beta, signal = betas(config), alphas_cumprod(config)
    t, half = np.arange(len(signal)).tolist(), (WIDTH // 2, 300)
    if config.rescale_betas_zero_snr:  # what the shifted alpha_bar amounts to
        beta = 1 - signal / np.concatenate([[1.0], signal[:-1]])
    left = plot(
        [Line("", t, beta.tolist())],
        Axis("timestep t"),
        Axis("beta", log=True),
        "Noise that a timestep adds",
        half,
        scene.theme,
    )
    lines = [
        Line("signal, sqrt(alpha_bar)", t, np.sqrt(signal).tolist()),
        Line("noise, sqrt(1 - alpha_bar)", t, np.sqrt(1 - signal).tolist()),
    ]
    right = plot(lines, Axis("timestep t"), Axis("amplitude", 0, 1), "What is left of the image", half, scene.theme)
    canvas = Image.new("RGB", (WIDTH, half[1]), scene.theme.back)
    canvas.paste(left, (0, 0))
    canvas.paste(right, (half[0], 0))
    return canvas


def _schedules(config: SchedulerConfig, steps: int, scene: Scene) -> Image.Image:
    """The noise levels that euler visits under each schedule."""
    rows = []
    for name in SCHEDULES:
        try:
            table = build("euler", steps, config, schedule=name, xl=scene.pipe.components.xl)
        except FastsdError:
            continue  # a schedule for other models
        levels = sigmas_of(config, table)
        rows.append(Strip(name, levels, note=f"{max(levels):.4g} to {min(levels):.4g}"))
    title = f"Noise levels of each schedule at {steps} steps (sampler euler; the last step ends at 0)"
    return strips(rows, Axis("sigma, noise per unit of signal", log=True), title, WIDTH, scene.theme)


def _samplers(config: SchedulerConfig, steps: int, scene: Scene) -> Image.Image:
    """The calls of the UNet that each sampler makes, and at which of them it draws fresh noise."""
    rows = []
    for name in SAMPLERS:
        try:
            table = build(name, steps, config, xl=scene.pipe.components.xl)
        except FastsdError:
            continue  # not for this prediction type
        note = f"{len(table)} calls" + (", fresh noise" if table.draw.any() else "")
        rows.append(Strip(name, sigmas_of(config, table), table.draw.tolist(), note))
    title = f"Calls of the UNet by each sampler at {steps} steps (hollow: fresh noise is drawn after it)"
    return strips(rows, Axis("sigma, noise per unit of signal", log=True), title, WIDTH, scene.theme)


def sigmas_of(config: SchedulerConfig, table: Table) -> list[float]:
    """The noise level of each call, from its timestep: interpolated in log sigma between whole timesteps."""
    t = table.rows[:, COLUMNS.index("t")]
    if config.edm is not None:
        return np.exp(4 * t).tolist()
    known = Schedule(complete(config, "euler"), 1).sigmas
    return np.exp(np.interp(t, np.arange(len(known)), np.log(known))).tolist()
