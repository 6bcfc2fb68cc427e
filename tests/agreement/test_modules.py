"""Every network agrees with diffusers and transformers on the same weights, to 1e-5 relative in fp32."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd.components import Components
from fastsd.kernels import dispatch
from fastsd.model.layers import ResBlock, SpatialTransformer
from fastsd.model.unet import AddedConditioning
from fastsd.weights import load_folder, save_folder
from tests.support.matching import nchw, nhwc, relative_error

FAMILIES = ("sd1", "sd2", "inpainting", "sdxl", "refiner")
# The processor's own backend, that of training, and the specification.
BACKENDS = (nullcontext, lambda: dispatch.forced("torch"), dispatch.reference_only)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, families: Any) -> tuple[Components, Any]:
    return load_folder(families.folder / request.param, torch.float32), families.pipelines[request.param]


@pytest.mark.parametrize("size", [(8, 8), (7, 13)], ids=["even", "odd at every level"])
@torch.no_grad()
def test_unet(pair: tuple[Components, Any], size: tuple[int, int]) -> None:
    ours, theirs = pair[0].unet, pair[1].unet
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, ours.config.in_channels, *size, generator=generator)
    context = torch.randn(2, 9, ours.config.cross_attention_dim, generator=generator)
    timestep = torch.tensor([3.0, 801.0])
    added, their_added = None, {}
    if ours.add_embedding is not None:
        pooled = torch.randn(2, 24, generator=generator)
        count = (ours.config.projection_class_embeddings_input_dim - 24) // ours.config.addition_time_embed_dim
        sizes = 1000 * torch.rand(2, count, generator=generator)
        added = AddedConditioning(pooled, sizes)
        their_added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    expected = theirs(x, timestep, context, **their_added).sample
    for backend in BACKENDS:
        with backend():
            assert relative_error(nchw(ours(nhwc(x), timestep, context, added)), expected) < 1e-5


@torch.no_grad()
def test_every_block_of_the_unet(pair: tuple[Components, Any]) -> None:
    ours, theirs = pair[0].unet, pair[1].unet
    generator = torch.Generator().manual_seed(2)
    embedding = torch.randn(1, ours.config.time_embed_dim, generator=generator)
    times = iter(ours.project_time(embedding).split(ours.time_sizes, dim=-1))
    context = torch.randn(1, 5, ours.config.cross_attention_dim, generator=generator)
    compared = 0
    for name, module in ours.named_modules():
        if isinstance(module, ResBlock):
            x = torch.randn(1, len(module.norm1.weight), 6, 5, generator=generator)
            expected = theirs.get_submodule(name)(x, embedding)
            assert relative_error(nchw(module(nhwc(x), next(times))), expected) < 1e-5, name
        elif isinstance(module, SpatialTransformer):
            x = torch.randn(1, len(module.norm.weight), 6, 5, generator=generator)
            expected = theirs.get_submodule(name)(x, context).sample
            texts = [block.attn2.project_context(context) for block in module.transformer_blocks]
            assert relative_error(nchw(module(nhwc(x), texts)), expected) < 1e-5, name
        else:
            continue
        compared += 1
    assert compared > 8 and next(times, None) is None


@torch.no_grad()
def test_vae(pair: tuple[Components, Any]) -> None:
    ours, theirs = pair[0].vae, pair[1].vae
    image = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)
    encoded, expected = ours.encode(nhwc(image)), theirs.encode(image).latent_dist
    assert relative_error(nchw(encoded.mean), expected.mean) < 1e-5
    assert relative_error(nchw(encoded.logvar), expected.logvar) < 1e-5
    noise = torch.randn_like(expected.mean)
    assert relative_error(nchw(encoded.sample(nhwc(noise))), expected.mean + expected.std * noise) < 1e-5
    assert relative_error(nchw(ours.decode(encoded.mode())), theirs.decode(expected.mean).sample) < 1e-5


@torch.no_grad()
def test_text_encoders(pair: tuple[Components, Any]) -> None:
    encoders = [e for e in (getattr(pair[1], "text_encoder", None), getattr(pair[1], "text_encoder_2", None)) if e]
    for ours, tokenizer, theirs in zip(pair[0].text_encoders, pair[0].tokenizers, encoders, strict=True):
        ids = tokenizer(["a cat", "", "a very long prompt " * 40])
        output, expected = ours(ids), theirs(ids, output_hidden_states=True)
        assert relative_error(output.hidden, expected.last_hidden_state) < 1e-5
        pooled = expected.text_embeds if ours.text_projection is not None else expected.pooler_output
        assert relative_error(output.pooled, pooled) < 1e-5
        for layer in (-2, -3):
            assert relative_error(ours(ids, hidden_layer=layer).hidden, expected.hidden_states[layer]) < 1e-5


@pytest.mark.parametrize("family", ["sd1", "sdxl", "refiner"])
@torch.no_grad()
def test_a_folder_that_fastsd_saves_opens_in_diffusers(family: str, families: Any, tmp_path: Path) -> None:
    import diffusers

    save_folder(load_folder(families.folder / family, torch.float32), tmp_path, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    original = families.pipelines[family]
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(original, part, None) is not None:
            weights, expected = getattr(opened, part).state_dict(), getattr(original, part).state_dict()
            assert weights.keys() == expected.keys()
            assert all(torch.equal(value, expected[key]) for key, value in weights.items()), part
    assert opened.scheduler.config.beta_start == original.scheduler.config.beta_start
    assert opened.scheduler.config.prediction_type == original.scheduler.config.prediction_type
