"""Few-step models by default generate what diffusers generates with the scheduler of their model cards."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd.pipeline import Pipeline
from tests.support.families import TOLERANCE, disturbed, generator, latents_of, make_unet
from tests.support.matching import relative_error
from tests.support.pipelines import PHOTO

SEED = 11
DDIM = {"clip_sample": False}  # in every published folder; not in the tiny SDXL's
# From the model cards: scheduler, its changes, steps. None uses guidance.
CARDS: dict[str, tuple[str, dict[str, Any], int]] = {
    "lcm": ("LCMScheduler", {}, 4),
    "turbo": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, 1),
    "lightning": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, 4),
    "lightning-1": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "prediction_type": "sample"}, 1),
    "hyper": ("DDIMScheduler", {"timestep_spacing": "trailing", **DDIM}, 4),
}


def noise(seed: int = 3) -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def latents_of_diffusers(pipeline: Any, scheduler: Any, **arguments: Any) -> torch.Tensor:
    """The latents of diffusers' pipeline with another scheduler."""
    before = pipeline.scheduler
    pipeline.scheduler = scheduler
    try:
        sizes = {"height": 64, "width": 64}
        return latents_of(pipeline, "a cat", generator=generator(SEED), latents=noise(), **sizes, **arguments)
    finally:
        pipeline.scheduler = before


@pytest.mark.parametrize("kind", CARDS)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_defaults_are_the_model_cards(families: Any, family: str, kind: str) -> None:
    import diffusers

    theirs = families.pipelines[family]
    name, changes, steps = CARDS[kind]
    scheduler = getattr(diffusers, name).from_config(theirs.scheduler.config, **changes)
    expected = latents_of_diffusers(theirs, scheduler, num_inference_steps=steps, guidance_scale=0.0)
    ours = Pipeline.from_pretrained(families.folder / family, device="cpu", dtype="fp32", few_step=kind)
    result = ours("a cat", latents=noise(), seed=SEED, output_type="latent")
    assert relative_error(result.images, expected) < TOLERANCE
    assert [note.split(":")[0] for note in result.notes] == [f"few-step model ({kind}, as asked for)"]


@pytest.mark.parametrize(("class_name", "kind"), [("LCMScheduler", "lcm"), ("EulerDiscreteScheduler", "turbo")])
def test_a_folder_is_recognised_by_its_scheduler(families: Any, class_name: str, kind: str, tmp_path: Path) -> None:
    """The folders of latent-consistency and sd-turbo. The latter names Euler, which is kept for several steps."""
    import diffusers

    theirs = families.pipelines["sd1"]
    changes = {} if kind == "lcm" else {"timestep_spacing": "trailing"}
    scheduler = getattr(diffusers, class_name).from_config(theirs.scheduler.config, **changes)
    folder = tmp_path / "model"
    folder.mkdir()
    for part in (families.folder / "sd1").iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "scheduler").unlink()
    scheduler.save_pretrained(folder / "scheduler")
    ours = Pipeline.from_pretrained(folder, device="cpu", dtype="fp32")
    assert ours.few_step is not None and ours.few_step.kind.name == kind
    for steps in (None, 3):
        count = steps or ours.defaults["num_inference_steps"]
        expected = latents_of_diffusers(theirs, scheduler, guidance_scale=0.0, num_inference_steps=count)
        latents = ours("a cat", latents=noise(), seed=SEED, output_type="latent", num_inference_steps=steps).images
        assert relative_error(latents, expected) < TOLERANCE


@pytest.fixture(scope="module")
def lcm(families: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A latent consistency model, whose UNet has the guidance scale as an input: diffusers' pipeline and its folder."""
    import diffusers

    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = dict(families.pipelines["sd1"].components)
        parts["unet"] = disturbed(make_unet(time_cond_proj_dim=24))
        parts["unet"].time_embedding.cond_proj.weight.data *= 10  # so that guidance matters
        parts["scheduler"] = diffusers.LCMScheduler.from_config(parts["scheduler"].config)
        pipeline = diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        folder = tmp_path_factory.mktemp("lcm") / "model"
        pipeline.save_pretrained(folder)
    return pipeline, folder


@pytest.mark.parametrize("guidance", [None, 1.0, 3.5])
def test_guidance_as_an_input(lcm: tuple[Any, Path], guidance: float | None) -> None:
    theirs, folder = lcm
    settings: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": guidance or 8.0}
    expected = latents_of(theirs, "a cat", latents=noise(), generator=generator(SEED), **settings)
    ours = Pipeline.from_pretrained(folder, device="cpu", dtype="fp32")
    result = ours("a cat", guidance_scale=guidance, latents=noise(), seed=SEED, output_type="latent")
    assert relative_error(result.images, expected) < TOLERANCE
    assert result.parameters["few_step"] == "lcm" and result.parameters["guidance_scale"] == (guidance or 8.0)
    at_six = ours("a cat", guidance_scale=6.0, latents=noise(), seed=SEED, output_type="latent")
    assert relative_error(at_six.images, expected) > 100 * TOLERANCE


@pytest.mark.parametrize("kind", ["lcm", "turbo", "lightning"])
def test_from_an_image(families: Any, kind: str) -> None:
    """With the scheduler of the model card. Turbo takes enough steps for one to run, here two."""
    import diffusers

    theirs = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(families.folder / "sd1", safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    name, changes, steps = CARDS[kind]
    theirs.scheduler = getattr(diffusers, name).from_config(theirs.scheduler.config, **changes)
    arguments: dict[str, Any] = {"image": PHOTO, "strength": 0.5}
    settings = {"num_inference_steps": max(steps, 2), "guidance_scale": 0.0}
    expected = latents_of(theirs, "a cat", generator=generator(SEED), **settings, **arguments)
    ours = Pipeline.from_pretrained(families.folder / "sd1", device="cpu", dtype="fp32", few_step=kind)
    assert relative_error(latents_of(ours, "a cat", seed=SEED, **arguments), expected) < TOLERANCE


def test_guidance_as_an_input_with_sdxl(families: Any, tmp_path: Path) -> None:
    """Like latent-consistency/lcm-sdxl, which is published as a UNet for SDXL's pipeline."""
    import diffusers

    torch.manual_seed(5)
    theirs = families.pipelines["sdxl"]
    config = {key: value for key, value in theirs.unet.config.items() if not key.startswith("_")}
    unet = disturbed(diffusers.UNet2DConditionModel(**config | {"time_cond_proj_dim": 16}))
    pipeline = type(theirs)(**theirs.components | {"unet": unet}, add_watermarker=False)
    pipeline.scheduler = diffusers.LCMScheduler.from_config(theirs.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "model")
    expected = latents_of_diffusers(pipeline, pipeline.scheduler, num_inference_steps=4, guidance_scale=8.0)
    ours = Pipeline.from_pretrained(tmp_path / "model", device="cpu", dtype="fp32")
    result = ours("a cat", latents=noise(), seed=SEED, output_type="latent")
    assert relative_error(result.images, expected) < TOLERANCE
    assert result.parameters["guidance_scale"] == 8.0
