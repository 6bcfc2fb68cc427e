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

FAMILIES = ("sd1", "sd2", "inpainting", "sdxl", "refiner")
# What this processor runs by itself, what training runs, and the specification.
BACKENDS = (nullcontext, lambda: dispatch.forced("torch"), dispatch.reference_only)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def last(x: torch.Tensor) -> torch.Tensor:
    """Channels first to channels last."""
    return x.permute(0, 2, 3, 1).contiguous()


def first(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, families: Any) -> tuple[Components, Any]:
    return load_folder(families.folder / request.param, torch.float32), families.pipelines[request.param]


@pytest.mark.parametrize("size", [(8, 8), (7, 13)], ids=["even", "odd, so that levels do not divide"])
@torch.no_grad()
def test_unet(pair: tuple[Components, Any], size: tuple[int, int]) -> None:
    ours, theirs = pair[0].unet, pair[1].unet
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, ours.config.in_channels, *size, generator=generator)
    context = torch.randn(2, 9, ours.config.cross_attention_dim, generator=generator)
    timestep = torch.tensor([3.0, 801.0])
    added, named = None, {}
    if ours.add_embedding is not None:
        pooled = torch.randn(2, 24, generator=generator)
        numbers = (ours.config.projection_class_embeddings_input_dim - 24) // ours.config.addition_time_embed_dim
        sizes = 1000 * torch.rand(2, numbers, generator=generator)
        added = AddedConditioning(pooled, sizes)
        named = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    wanted = theirs(x, timestep, context, **named).sample
    for backend in BACKENDS:
        with backend():
            assert error(first(ours(last(x), timestep, context, added)), wanted) < 1e-5


@torch.no_grad()
def test_every_block_of_the_unet(pair: tuple[Components, Any]) -> None:
    ours, theirs = pair[0].unet, pair[1].unet
    generator = torch.Generator().manual_seed(2)
    embedding = torch.randn(1, ours.config.time_embed_dim, generator=generator)
    times = iter(ours.time_projections(torch.nn.functional.silu(embedding)).split(ours.time_sizes, dim=-1))
    context = torch.randn(1, 5, ours.config.cross_attention_dim, generator=generator)
    seen = 0
    for name, module in ours.named_modules():
        if isinstance(module, ResBlock):
            x = torch.randn(1, len(module.norm1.weight), 6, 5, generator=generator)
            wanted = theirs.get_submodule(name)(x, embedding)
            assert error(first(module(last(x), next(times))), wanted) < 1e-5, name
        elif isinstance(module, SpatialTransformer):
            x = torch.randn(1, len(module.norm.weight), 6, 5, generator=generator)
            wanted = theirs.get_submodule(name)(x, context).sample
            texts = iter([block.attn2.project_context(context) for block in module.transformer_blocks])
            assert error(first(module(last(x), texts)), wanted) < 1e-5, name
        else:
            continue
        seen += 1
    assert seen > 8 and next(times, None) is None


@torch.no_grad()
def test_vae(pair: tuple[Components, Any]) -> None:
    ours, theirs = pair[0].vae, pair[1].vae
    image = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)
    wanted, found = theirs.encode(image).latent_dist, ours.encode(last(image))
    assert error(first(found.mean), wanted.mean) < 1e-5
    assert error(first(found.logvar), wanted.logvar) < 1e-5
    noise = torch.randn_like(wanted.mean)
    assert error(first(found.sample(last(noise))), wanted.mean + wanted.std * noise) < 1e-5
    assert error(first(ours.decode(found.mode())), theirs.decode(wanted.mean).sample) < 1e-5


@torch.no_grad()
def test_text_encoders(pair: tuple[Components, Any]) -> None:
    theirs = [e for e in (getattr(pair[1], "text_encoder", None), getattr(pair[1], "text_encoder_2", None)) if e]
    assert len(theirs) == len(pair[0].text_encoders)
    for ours, tokenizer, other in zip(pair[0].text_encoders, pair[0].tokenizers, theirs, strict=True):
        ids = tokenizer(["a cat", "", "a very long prompt " * 40])
        wanted = other(ids, output_hidden_states=True)
        found = ours(ids)
        assert error(found.hidden, wanted.last_hidden_state) < 1e-5
        pooled = wanted.text_embeds if ours.text_projection is not None else wanted.pooler_output
        assert error(found.pooled, pooled) < 1e-5
        for layer in (-2, -3):
            assert error(ours(ids, hidden_layer=layer).hidden, wanted.hidden_states[layer]) < 1e-5


@pytest.mark.parametrize("family", ["sd1", "sdxl", "refiner"])
@torch.no_grad()
def test_what_fastsd_saves_opens_in_diffusers(family: str, families: Any, tmp_path: Path) -> None:
    import diffusers

    save_folder(load_folder(families.folder / family, torch.float32), tmp_path, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    original = families.pipelines[family]
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        wanted = getattr(original, part, None)
        if wanted is not None:
            found = getattr(opened, part).state_dict()
            assert found.keys() == wanted.state_dict().keys()
            assert all(torch.equal(value, wanted.state_dict()[key]) for key, value in found.items()), part
    assert opened.scheduler.config.beta_start == original.scheduler.config.beta_start
    assert opened.scheduler.config.prediction_type == original.scheduler.config.prediction_type
