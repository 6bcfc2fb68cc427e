"""What other programs do otherwise, as values: `--like a1111|comfy|diffusers` takes a row of `LIKE`.

A rule that users set by itself is a parameter too, which precedes the row. docs/migration.md has the rows as a table,
with the file of each program that states its rule.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastsd.parameters import Settings
from fastsd.sampling import a1111
from fastsd.sampling.k_levels import KLevels
from fastsd.sampling.samplers import SAMPLERS


def _share(steps: int, strength: float) -> tuple[int, int]:
    """diffusers, `get_timesteps` of its image-to-image pipelines."""
    return steps, min(int(steps * strength), steps)


def _share_of_own(own: int | None, steps: int, strength: float) -> tuple[int, int]:
    return _share(own or steps, strength)


def _a1111(steps: int, strength: float) -> tuple[int, int]:
    """A1111, `setup_img2img_steps` in modules/sd_samplers_common.py: one step more, and never none."""
    return steps, int(min(strength, 0.999) * steps) + 1


def _a1111_hires(own: int | None, steps: int, strength: float) -> tuple[int, int]:
    """The same function with the second pass's own steps: all of them run."""
    if not own:
        return _a1111(steps, strength)
    return (int(own / min(strength, 0.999)), own) if strength > 0 else (own, 0)


def _comfy(steps: int, strength: float) -> tuple[int, int]:
    """ComfyUI, `KSampler.set_steps` in comfy/samplers.py: all steps run, the last of a longer schedule."""
    if strength > 0.9999:
        return steps, steps
    return (int(steps / strength), steps) if strength > 0 else (steps, 0)


@dataclass(frozen=True)
class Rules:
    """The rules of one program.

    Attributes:
        settings: of parameters, where the caller gives none.
        from_mean: an image is encoded to the mean of its latents' distribution, else to a sample of it.
        clip_layers: how clip skip counts, a key of `fastsd.text.encode.LAYERS`.
        zeros_for_empty: SDXL reads zeros for an empty negative prompt; None: as the checkpoint says.
        repeats_texts: where texts of one image fill unequal numbers of chunks, the shorter ones count as they are, else
            they are filled up with empty chunks.
        steps: of a run's steps and its strength, the steps of its schedule and how many of them, the last, run.
        hires_steps: the same of the second pass: of its own steps, where the caller gives them, of the first pass's,
            and of its strength.
        levels: the noise levels; None: as diffusers' schedulers space them.
        starts_at_sigma: pure noise is scaled to the first noise level, sigma; else to the deviation of a noisy image
            of unit variance, sqrt(1 + sigma^2); None: as diffusers' schedulers do, by their spacing.
        schedules: of samplers, where the caller names a sampler and no schedule.
        samplers: what stands for a sampler there.
        counts_calls: schedules in prompts count calls of the network, and go on in the second pass, else steps.
        twice: samplers whose steps then count as two.
        trees: samplers whose noise comes from a Brownian tree, which fastsd does not draw.
        fills_hires_steps: where none are given, the second pass has the steps of the first as its own.
        pure_noise_at_full: with a mask, a run of strength 1 starts from noise alone.
        mixes_below_one: a guidance below 1 mixes the negative prompt's result in, else it counts as 1 (A1111,
            `combine_denoised` in modules/sd_samplers_cfg_denoiser.py; ComfyUI, `cfg_function` in comfy/samplers.py).
    """

    settings: dict[str, Any]
    from_mean: bool = False
    clip_layers: str = "added"
    zeros_for_empty: bool | None = None
    repeats_texts: bool = False
    steps: Callable[[int, float], tuple[int, int]] = _share
    hires_steps: Callable[[int | None, int, float], tuple[int, int]] = _share_of_own
    levels: KLevels | None = None
    starts_at_sigma: bool | None = None
    schedules: Mapping[str, str] = field(default_factory=dict)
    samplers: Mapping[str, str] = field(default_factory=dict)
    counts_calls: bool = False
    twice: Collection[str] = ()
    trees: Collection[str] = ()
    fills_hires_steps: bool = True
    pure_noise_at_full: bool = True
    mixes_below_one: bool = False

    def follows(self, sampler: str) -> bool:
        """Whether the program's levels, or its own table, stand for a sampler's."""
        return self.levels is not None and (sampler in self.levels.tables or not self.leaves_start(sampler))

    def leaves_start(self, sampler: str) -> bool:
        """Whether a sampler works on training timesteps there, and starts from noise as it is."""
        return not SAMPLERS[sampler].takes_schedule or (self.levels is not None and sampler in self.levels.leaves)


# A1111's "Automatic" (modules/sd_samplers_kdiffusion.py, the option "scheduler").
FAVOURITES = {
    "dpm++2m": "karras",
    "dpm++sde": "karras",
    "dpm++2m_sde": "exponential",
    "dpm++2m_sde_heun": "exponential",
    "dpm++2s_a": "karras",
    "dpm++3m_sde": "exponential",
    "dpm2": "karras",
    "dpm2_a": "karras",
    "restart": "karras",
}
TREES = ("dpm++sde", "dpm++2m_sde", "dpm++2m_sde_heun", "dpm++3m_sde")

LIKE: dict[str, Rules] = {
    "none": Rules({"noise": "cpu", "emphasis": "original"}),
    "a1111": Rules(
        {"noise": "gpu", "emphasis": "original"},
        from_mean=True,
        clip_layers="fixed",
        zeros_for_empty=True,
        repeats_texts=True,
        steps=_a1111,
        hires_steps=_a1111_hires,
        fills_hires_steps=False,
        pure_noise_at_full=False,
        mixes_below_one=True,
        levels=KLevels(
            discards=("dpm2", "dpm2_a", "dpm++3m_sde"),
            leaves=("unipc", "restart", "dpm_fast"),
            tables={"ddim": a1111.ddim},
        ),
        starts_at_sigma=True,
        schedules=FAVOURITES,
        counts_calls=True,
        twice=("heun", "dpm++sde", "dpm++2s_a", "dpm2", "dpm2_a", "restart"),
        trees=TREES,
    ),
    "comfy": Rules(
        {"noise": "comfy", "emphasis": "comfy", "prompt_syntax": "comfy"},
        from_mean=True,
        clip_layers="from_end",
        zeros_for_empty=False,
        repeats_texts=True,
        steps=_comfy,
        pure_noise_at_full=False,
        mixes_below_one=True,
        hires_steps=lambda own, steps, strength: _comfy(own or steps, strength),
        levels=KLevels(
            nearest=True,
            discards=("dpm2", "dpm2_a", "unipc"),
            leaves=("dpm_fast",),
            names={"beta": "beta_comfy", "kl_optimal": "kl_optimal_comfy"},
        ),
        starts_at_sigma=False,
        samplers={"ddim": "euler"},
        trees=TREES,
    ),
    "diffusers": Rules({"noise": "batch", "emphasis": "original", "prompt_syntax": "plain"}),
}


def fill(settings: Settings, given: Collection[str]) -> Settings:
    """The settings with the rules' own where the caller gave none.

    Args:
        given: the names of those that were given.
    """
    own = LIKE[settings.like].settings
    return settings.replace(**{name: value for name, value in own.items() if name not in given})


def rules_notes(settings: Settings) -> list[str]:
    """What the rules ask for and fastsd does not do."""
    if settings.sampler in LIKE[settings.like].trees:
        return [f"the noise of {settings.sampler} is a Brownian tree there and is not here: the image will differ"]
    return []
