"""What the values of a config can be, beyond their types: numbers have a range, names are known, widths divide."""

from __future__ import annotations

import math
from typing import Any

from fastsd.config import BETA_SCHEDULES, PREDICTIONS, SPACINGS, CLIPConfig, SchedulerConfig, UNetConfig, VAEConfig
from fastsd.errors import FastsdError, about
from fastsd.sampling.samplers import resolve
from fastsd.train.tables import check_choice, flatten

# The least and the greatest value of numbers, by the ends of their keys.
LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "threads": (0, 1024),
    "checkpoint_minutes": (0, math.inf),
    "stall_minutes": (0, math.inf),
    "data.limit": (0, math.inf),
    "data.bucket_step": (0, math.inf),
    "data.max_bad": (0, math.inf),
    "data.memory_gb": (0, math.inf),
    "data.augment.rotation": (0, 180),
    "data.augment.colour": (0, 1),
    "data.digits.style_share": (0, 1),
    "data.digits.style_word_share": (0, 1),
    "data.digits.unknown": (0, 1),
    "defaults.num_inference_steps": (1, 1000),
    "defaults.guidance_scale": (0, math.inf),
    "fit.max_minutes": (0, math.inf),
    "fit.rate": (0, math.inf),
    "fit.final_rate": (0, math.inf),
    "fit.warmup": (0, math.inf),
    "fit.weight_decay": (0, math.inf),
    "fit.clip": (0, math.inf),
    "fit.validate_every": (0, math.inf),
    "fit.sample_every": (0, math.inf),
    "unet.empty": (0, 1),
    "unet.min_snr": (0, math.inf),
    "unet.noise_offset": (0, math.inf),
    "vae.kl_weight": (0, math.inf),
    "vae.l1_weight": (0, math.inf),
    "vae.mse_weight": (0, math.inf),
    "vae.edge_weight": (0, math.inf),
    "vae.gan.weight": (0, math.inf),
    "vae.gan.start": (0, math.inf),
    "vae.gan.features": (0, math.inf),
    "scheduler.num_train_timesteps": (2, 100_000),
    "scheduler.beta_start": (0, 1),
    "scheduler.beta_end": (0, 1),
    "layers_per_block": (1, math.inf),
    "norm_num_groups": (1, math.inf),
    "block_out_channels": (1, math.inf),
    "num_attention_heads": (1, math.inf),
    "cross_attention_dim": (1, math.inf),
    "latent_channels": (1, math.inf),
    "hidden_size": (1, math.inf),
    "intermediate_size": (1, math.inf),
    "num_hidden_layers": (1, math.inf),
    "max_position_embeddings": (3, math.inf),
}


def check_run(settings: Any, file: str) -> None:
    """Check what concerns the whole run.

    Raises:
        FastsdError: a number that is not finite or beyond its limits, an unknown sampler. Names the key.
    """
    _check_numbers("", settings, file)
    _check_sampler("defaults", settings.defaults.sampler, settings.defaults.schedule, file)


def check_stage(name: str, stage: Any, file: str) -> None:
    """Check the table of a stage.

    Raises:
        FastsdError: as of `check_run`; or widths of a network that do not divide.
    """
    _check_numbers(f"{name}.", stage, file)
    for beta in stage.fit.betas:
        if not 0 <= beta < 1:
            raise FastsdError(f"{name}.fit.betas has {beta}; each should be from 0 to below 1", path=file)
    for part, config in vars(stage).items():
        _check_network(f"{name}.{part}", config, file)


def _check_numbers(prefix: str, settings: Any, file: str) -> None:
    for key, value in flatten(settings).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                _check_number(prefix + key, number, file)


def _check_number(key: str, number: float, file: str) -> None:
    if not math.isfinite(number):
        raise FastsdError(f"{key} is {number}; it should be a finite number", path=file)
    parts = key.split(".")
    found = next((LIMITS[end] for i in range(len(parts)) if (end := ".".join(parts[i:])) in LIMITS), None)
    if found is not None and not found[0] <= number <= found[1]:
        least, most = found
        upper = "" if math.isinf(most) else f" and at most {most}"
        raise FastsdError(f"{key} is {number}; it should be at least {least}{upper}", path=file)


def _check_sampler(key: str, sampler: str, schedule: str, file: str) -> None:
    with about(path=file):
        try:
            resolve(sampler, schedule)
        except FastsdError as error:
            raise FastsdError(f"{key}.{error.argument or 'sampler'}: {error.message}") from None


def _check_network(key: str, config: Any, file: str) -> None:
    if isinstance(config, SchedulerConfig):
        check_choice(f"{key}.prediction_type", config.prediction_type, PREDICTIONS, file)
        check_choice(f"{key}.beta_schedule", config.beta_schedule, BETA_SCHEDULES, file)
        if config.timestep_spacing is not None:
            check_choice(f"{key}.timestep_spacing", config.timestep_spacing, SPACINGS, file)
        _check_sampler(key, config.sampler, config.schedule, file)
    elif isinstance(config, CLIPConfig):
        _check_divides(f"{key}.num_attention_heads", config.num_attention_heads, config.hidden_size, file)
    elif isinstance(config, UNetConfig | VAEConfig):
        if not config.block_out_channels:
            raise FastsdError(f"{key}.block_out_channels is []; it should have a width for each level", path=file)
        for width in config.block_out_channels:
            _check_divides(f"{key}.norm_num_groups", config.norm_num_groups, width, file)
        if isinstance(config, UNetConfig):
            _check_levels(key, config, file)


def _check_levels(key: str, config: UNetConfig, file: str) -> None:
    widths = config.block_out_channels
    for name in ("num_attention_heads", "transformer_layers_per_block"):
        if len(getattr(config, name)) != len(widths):
            found = f"{key}.{name} has {len(getattr(config, name))} values"
            raise FastsdError(f"{found}; it should have {len(widths)}, as {key}.block_out_channels", path=file)
    for heads, width in zip(config.num_attention_heads, widths, strict=True):
        _check_divides(f"{key}.num_attention_heads", heads, width, file)


def _check_divides(key: str, number: int, width: int, file: str) -> None:
    if width % number:
        raise FastsdError(f"{key} is {number}, which does not divide the width {width}; it should", path=file)
