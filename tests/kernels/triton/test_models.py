"""Whole networks on the kernels in fp32, against the same networks on the specifications in float64.

In float64 a network neither adds products in place nor moves biases from one op to another (`dispatch.folds`), so these
tests compare that too.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastsd.config import CLIPConfig, UNetConfig, VAEConfig
from fastsd.kernels import dispatch
from fastsd.kernels.triton import advance as advance_triton
from fastsd.kernels.triton import flash_attn as flash_attn_triton
from fastsd.kernels.triton import geglu as geglu_triton
from fastsd.kernels.triton import groupnorm_silu as groupnorm_silu_triton
from fastsd.kernels.triton import layernorm as layernorm_module
from fastsd.model.clip import TextEncoder
from fastsd.model.unet import AddedConditioning, UNet
from fastsd.model.vae import AutoencoderKL
from fastsd.pipeline import Pipeline
from tests.support import tiny
from tests.support.triton_checks import DEVICE

MODULE, IMAGE = 1e-5, 1e-4  # relative, of the largest value: of a module, of a whole image

SMALL = UNetConfig(  # heads of 32 and 40 channels, groups that a skip connection's seam divides
    block_out_channels=(64, 80),
    layers_per_block=1,
    transformer_layers_per_block=(1, 1),
    num_attention_heads=(2, 2),
    cross_attention_dim=32,
    norm_num_groups=16,
)
SMALL_XL = replace(SMALL, **tiny.XL)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each op's kernel was launched."""
    calls: Counter[str] = Counter()
    for module, name in (
        (flash_attn_triton, "flash_attn"),
        (groupnorm_silu_triton, "groupnorm_silu"),
        (layernorm_module, "layernorm"),
        (geglu_triton, "geglu_gate"),
        (advance_triton, "advance"),
    ):
        monkeypatch.setattr(module, name, counting(calls, name, getattr(module, name)))
    yield calls


def counting(calls: Counter[str], op: str, launch: Callable) -> Callable:
    def counted(*args, **kwargs):
        calls[op] += 1
        return launch(*args, **kwargs)

    return counted


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def disturbed(module: torch.nn.Module) -> torch.nn.Module:
    """Random norms and biases too."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return module.to(DEVICE).eval().requires_grad_(False)


def truth(module: torch.nn.Module, call: Callable[..., Any], *inputs: torch.Tensor | None) -> Any:
    """`call(module, *inputs)` by the specifications in float64."""
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in inputs]
    with dispatch.reference_only():
        return call(copy.deepcopy(module).double(), *wide)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


@pytest.mark.parametrize(
    ("config", "size"), [(SMALL, (8, 8)), (SMALL, (7, 5)), (SMALL_XL, (8, 8))], ids=["even", "odd", "SDXL"]
)
@torch.no_grad()
def test_unet(config: UNetConfig, size: tuple[int, int], ran: Counter[str]) -> None:
    unet = disturbed(UNet(config))
    added = (rand(2, 24), 100 * rand(2, 6).abs()) if config.addition_time_embed_dim else ()
    inputs = rand(2, *size, 4), torch.tensor([3.0, 801.0], device=DEVICE), rand(2, 77, 32), *added

    def call(unet, x, time, text, *added):
        return unet(x, time, text, AddedConditioning(*added) if added else None)

    assert error(call(unet, *inputs), truth(unet, call, *inputs)) < MODULE
    assert min(ran[op] for op in ("flash_attn", "groupnorm_silu", "layernorm", "geglu_gate")) >= 4


@torch.no_grad()
def test_vae(ran: Counter[str]) -> None:
    vae = disturbed(AutoencoderKL(VAEConfig(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8)))
    image, latent = rand(1, 24, 16, 3), rand(1, 12, 8, 4)
    mean, photo = truth(vae, lambda m, x, z: (m.encode(x).mean, m.decode(z)), image, latent)
    assert error(vae.encode(image).mean, mean) < MODULE
    assert error(vae.decode(latent), photo) < MODULE
    assert ran["groupnorm_silu"] > 10 and ran["flash_attn"] == 2


@torch.no_grad()
def test_clip(ran: Counter[str]) -> None:
    config = CLIPConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    encoder = disturbed(TextEncoder(config))
    ids = torch.randint(0, 49000, (1, 77), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ids[0, 9] = config.eos_token_id
    with dispatch.reference_only():
        wanted = encoder(ids)
    found = encoder(ids)
    assert error(found.hidden, wanted.hidden) < MODULE and error(found.pooled, wanted.pooled) < MODULE
    assert ran["layernorm"] == 5 and ran["flash_attn"] == 2


def test_digits(ran: Counter[str]) -> None:
    """From the prompt to the latent, with the bundled model."""
    pipe = Pipeline.from_pretrained(device=DEVICE, dtype="fp32", graphs=False)
    settings = {"num_inference_steps": 2, "seed": 3, "output_type": "latent", "sampler": "dpm++2m"}
    with dispatch.reference_only():
        wanted = pipe("a thick 8", **settings).images
    assert error(pipe("a thick 8", **settings).images, wanted) < IMAGE
    assert ran["advance"] == 2 and ran["flash_attn"] > 8
