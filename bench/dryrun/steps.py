"""One guided step of a model family on a fake GPU."""

from __future__ import annotations

import torch

from bench.dryrun.device import DEVICE
from bench.dryrun.networks import on_gpu
from bench.dryrun.record import DryRun, Section
from bench.families import ModelFamily
from fastsd.generate.denoiser import Conditioning, GuidanceScales, StepInputs, denoise_row
from fastsd.generate.image_prompts import levels_of
from fastsd.model.unet import AddedConditioning, UNet
from fastsd.sampling.advance import begin
from fastsd.sampling.build import build


@torch.inference_mode()
def guided_step(run: DryRun, family: ModelFamily, batch: int = 1, size: int = 0, image_tokens: int = 0) -> Section:
    """`denoise_row` with guidance for `batch` images of `size` pixels, without the pipeline around it.

    image_tokens: of an image prompt with a mask; 0: there is none.
    """
    side = (size or family.size) // family.vae.downscale
    unet: UNet = on_gpu(UNet, family.unet)
    run.name("unet", unet)
    config = unet.config
    half = {"dtype": torch.float16, "device": DEVICE}
    added = None
    if config.addition_time_embed_dim:
        sizes = torch.empty(2 * batch, 6, **half)
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = AddedConditioning(torch.empty(2 * batch, pooled, **half), sizes)
    time = unet.embed_time(torch.empty(1, device=DEVICE), added)
    texts = unet.project_context(torch.empty(2 * batch, 77, config.cross_attention_dim, **half))
    if image_tokens:
        texts += unet.project_context(torch.empty(2 * batch, image_tokens, config.cross_attention_dim, **half))
        texts += tuple(torch.empty(1, (side >> level) ** 2, 1, **half) for level in levels_of(unet))
    noise = torch.empty(batch, side, side, config.in_channels, device=DEVICE)
    state = begin(build("euler", 20, family.scheduler), noise)
    inputs = StepInputs(state, Conditioning([time], texts), GuidanceScales(torch.empty(1, device=DEVICE)))
    section = Section("step")
    run.sections.append(section)
    with run.section(section):
        denoise_row(unet, inputs, 0)
    return section
