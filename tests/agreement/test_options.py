"""FreeU, perturbed-attention guidance and DeepCache agree with diffusers, and DeepCache with its definition."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastsd import FastsdError
from fastsd.model.call_options import CallOptions, low_frequencies
from fastsd.model.unet import AddedConditioning
from fastsd.pipeline import Pipeline
from tests.support.families import TOLERANCE, Families, generator, latents_of
from tests.support.matching import nchw, nhwc, relative_error

PROMPT = "a cat on a mat"
FREEU = (1.5, 1.6, 0.9, 0.2)
SETTINGS: dict[str, Any] = {"num_inference_steps": 5, "width": 64, "height": 64, "guidance_scale": 4.0}


def ours(families: Families, family: str) -> Pipeline:
    return Pipeline.from_pretrained(families.folder / family, device="cpu", dtype="fp32")


@pytest.mark.parametrize("size", [(8, 8), (6, 5), (1, 7), (2, 1), (1, 1)], ids=str)
def test_two_products_stand_for_the_fourier_transform(size: tuple[int, int]) -> None:
    """Both round in fp32, 6e-8 in each of a few additions a pixel. The scale is one that fp32 holds."""
    from diffusers.utils.torch_utils import fourier_filter

    x = torch.randn(2, 3, *size)
    found = x + (0.25 - 1) * nchw(low_frequencies(nhwc(x)))
    assert relative_error(found, fourier_filter(x, threshold=1, scale=0.25)) < 1e-6


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_call_with_freeu(families: Families, family: str) -> None:
    unet, own = families.pipelines[family].unet, ours(families, family).components.unet
    torch.manual_seed(0)
    x, time = torch.randn(2, 4, 9, 6), torch.tensor([7.0, 801.0])
    text = torch.randn(2, 5, own.config.cross_attention_dim)
    added, extra = None, {}
    if family == "sdxl":
        added = AddedConditioning(torch.randn(2, 24), torch.rand(2, 6) * 64)
        extra = {"added_cond_kwargs": {"text_embeds": added.pooled, "time_ids": added.sizes}}
    options = CallOptions(torch.tensor(FREEU))
    with torch.no_grad():
        unet.enable_freeu(s1=FREEU[2], s2=FREEU[3], b1=FREEU[0], b2=FREEU[1])
        expected = unet(x, time, text, **extra).sample
        unet.disable_freeu()
        given = own.embed_time(time, added), own.project_context(text)
        found = nchw(own.denoise(nhwc(x), *given, options=options))
        plain = nchw(own.denoise(nhwc(x), *given))
    assert relative_error(found, expected) < 1e-5
    assert relative_error(plain, expected) > 1e-3


def test_freeu(families: Families) -> None:
    theirs = families.pipelines["sd1"]
    theirs.enable_freeu(s1=FREEU[2], s2=FREEU[3], b1=FREEU[0], b2=FREEU[1])
    try:
        expected = latents_of(theirs, PROMPT, generator=generator(3), **SETTINGS)
    finally:
        theirs.disable_freeu()
    found = latents_of(ours(families, "sd1"), PROMPT, seed=3, freeu=FREEU, **SETTINGS)
    assert relative_error(found, expected) < TOLERANCE


PAG: dict[str, dict[str, Any]] = {
    "guided": {},
    "rescaled": {"guidance_rescale": 0.6},
    "unguided": {"guidance_scale": 1.0},
    "other layers": {"pag_layers": "down_blocks,up_blocks.1.attentions.1"},
    "adaptive": {"pag_adaptive_scale": 0.006},  # 0 in the last steps
}


@pytest.mark.parametrize("case", PAG)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_perturbed_attention(families: Families, family: str, case: str) -> None:
    import diffusers

    arguments = SETTINGS | {"pag_scale": 3.0} | PAG[case]
    if family == "sdxl" and case == "other layers":
        arguments["pag_layers"] = "down_blocks.1,up_blocks.0.attentions.1"
    theirs_takes = dict(arguments)
    layers = theirs_takes.pop("pag_layers", "mid").split(",")
    xl = "XL" if family == "sdxl" else ""
    components = dict(families.pipelines[family].components)
    extra = {} if xl else {"requires_safety_checker": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = getattr(diffusers, f"StableDiffusion{xl}PAGPipeline")(**components, **extra, pag_applied_layers=layers)
    pipe.set_progress_bar_config(disable=True)
    expected = latents_of(pipe, PROMPT, generator=generator(3), **theirs_takes)
    own = ours(families, family)
    assert relative_error(latents_of(own, PROMPT, seed=3, **arguments), expected) < TOLERANCE
    without = {name: value for name, value in arguments.items() if not name.startswith("pag")}
    assert relative_error(latents_of(own, PROMPT, seed=3, **without), expected) > 10 * TOLERANCE


def test_layers_that_are_not_there(families: Families) -> None:
    for layers in ("up_blocks.9", "mid_bloc", ""):
        with pytest.raises(FastsdError, match=r"^pag_layers: no self-attention is in '.*'; names are as mid"):
            ours(families, "sd1")(PROMPT, pag_scale=3.0, pag_layers=layers, **SETTINGS)


def cached(unet: Any, interval: int, branch: int) -> Callable[[], None]:
    """DeepCache by its definition (Ma et al. 2024, section 3.2), on diffusers' UNet: in calls between, every module
    beyond the branch returns what it returned in the last whole call. Returns what takes it off again."""
    call, last, before = [-1], dict[Any, Any](), list[tuple[Any, Any]]()
    layers = unet.config.layers_per_block
    first = unet.forward

    def counted(*args: Any, **rest: Any) -> Any:
        call[0] += 1
        return first(*args, **rest)

    def wrap(module: Any) -> None:
        forward = module.forward

        def kept(*args: Any, **rest: Any) -> Any:
            if call[0] % interval == 0:
                last[module] = forward(*args, **rest)
            return last[module]

        before.append((module, forward))
        module.forward = kept

    number = 0  # of the skip connection that a module makes
    for block in unet.down_blocks:
        attentions = getattr(block, "attentions", [None] * layers)
        for resnet, attention in zip(block.resnets, attentions, strict=True):
            number += 1
            for module in (resnet, attention) if number > branch else ():
                wrap(module) if module is not None else None
        for module in block.downsamplers or ():
            number += 1
            wrap(module) if number > branch else None
    wrap(unet.mid_block)
    for block in unet.up_blocks:
        attentions = getattr(block, "attentions", [None] * (layers + 1))
        for resnet, attention in zip(block.resnets, attentions, strict=True):
            for module in (resnet, attention) if number > branch else ():
                wrap(module) if module is not None else None
            number -= 1
        for module in block.upsamplers or ():
            wrap(module) if number >= branch + 1 else None
    unet.forward = counted

    def restore() -> None:
        unet.forward = first
        for module, forward in before:
            module.forward = forward

    return restore


@pytest.mark.parametrize("branch", [0, 1, 2, 3])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_deepcache(families: Families, family: str, branch: int) -> None:
    theirs = families.pipelines[family]
    restore = cached(theirs.unet, 3, branch)
    try:
        expected = latents_of(theirs, PROMPT, generator=generator(3), **SETTINGS)
    finally:
        restore()
    own = ours(families, family)
    found = latents_of(own, PROMPT, seed=3, deepcache=3, deepcache_branch=branch, **SETTINGS)
    assert relative_error(found, expected) < TOLERANCE
    assert relative_error(latents_of(own, PROMPT, seed=3, **SETTINGS), expected) > 10 * TOLERANCE
