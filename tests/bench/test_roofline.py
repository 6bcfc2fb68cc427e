"""The counts of work: against torch's flop counter, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.ceilings import Ceilings, measure_ceilings
from bench.families import FAMILIES, SD15, choose
from bench.record import ROOT
from bench.roofline import KINDS, Work, attention_work, counted, decode_work, meta_unet_inputs, step_work, table, total
from fastsd.errors import FastsdError
from fastsd.model.unet import UNet
from fastsd.model.vae import AutoencoderKL

UNIT = Ceilings(1.0, 1.0, 1.0)


def flops(work: list[Work]) -> float:
    return sum(total(work, UNIT, 2).flops.values())


@pytest.mark.heavy
@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "sdxl", "tiny"])
def test_the_unet_agrees_with_torchs_flop_counter(name: str) -> None:
    family = FAMILIES[name]
    side = family.size // family.vae.downscale
    with torch.device("meta"):
        unet = UNet(family.unet)
    x, timestep, context, added = meta_unet_inputs(unet, 2, side, side)
    with counted(unet) as work, FlopCounterMode(display=False) as counter:
        unet(x, timestep, context, added)
    assert flops(work) == pytest.approx(counter.get_total_flops(), rel=0.01)
    # A step excludes the hoisted work: the keys and values of the text, and the time embeddings.
    assert 0.9 * flops(work) < flops(step_work(family, 1, family.size)) < flops(work)


@torch.no_grad()
def test_the_decoder_agrees_with_torchs_flop_counter() -> None:
    with torch.device("meta"):
        vae, latent = AutoencoderKL(SD15.vae), torch.empty(1, 64, 64, 4)
    with FlopCounterMode(display=False) as counter:
        vae.decode(latent)
    assert flops(decode_work(SD15, 1, 512)) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.heavy
def test_work_grows_with_the_batch_and_the_size() -> None:
    one = flops(step_work(SD15, 1, 512))
    assert flops(step_work(SD15, 4, 512)) == pytest.approx(4 * one)
    by_kind = {size: total(step_work(SD15, 1, size), UNIT, 2).flops for size in (512, 1024)}
    assert by_kind[1024]["conv"] == pytest.approx(4 * by_kind[512]["conv"])
    assert by_kind[1024]["attention"] > 10 * by_kind[512]["attention"]  # self-attention grows 16-fold


def test_every_norm_of_a_step_is_counted() -> None:
    """SD1.5 has 61 group norms, and 16 blocks with three layer norms each."""
    norms = [work for work in step_work(SD15, 1, 512) if work.kind == "norm"]
    assert len(norms) == 61 + 16 * 3
    assert sum(work.exps > 0 for work in norms) == 45  # with SiLU: all except those before a transformer


def test_attention_by_hand() -> None:
    """2 images, 3 heads of 5 channels, 7 queries, 11 keys."""
    work = attention_work(2, 7, 11, 15, 3)
    assert work.exps == 2 * 3 * 7 * 11
    assert work.flops == 2 * (2 * 3 * 7 * 11 * 5) * 2
    assert work.elements == 2 * (7 + 11 + 11 + 7) * 15


def test_the_floor_is_the_slowest_of_three_times_and_a_sum_over_ops() -> None:
    ceilings = Ceilings(flops=100.0, bytes=10.0, exps=1.0)
    works = [Work("conv", 1000.0, 1.0), Work("norm", 0.0, 100.0), Work("attention", 100.0, 1.0, 50.0)]
    assert [w.floor(ceilings, 2) for w in works] == [10.0, 20.0, 50.0]
    result = total(works, ceilings, 2)
    assert result.floor == 80.0
    assert result.bytes == 204.0 and result.exps == 50.0
    assert result.flops == dict(zip(KINDS, (1000.0, 0.0, 100.0, 0.0)))


def test_hooks_are_removed() -> None:
    with torch.device("meta"):
        unet = UNet(FAMILIES["tiny"].unet)
    with counted(unet):
        pass
    assert not any(module._forward_hooks for module in unet.modules())


def test_ceilings_are_plausible_rates() -> None:
    """Zero or infinity would invalidate every share. On a busy machine a test cannot require more."""
    ceilings = measure_ceilings(torch.device("cpu"), torch.float32, side=256, megabytes=4)
    assert all(1e6 < rate < 1e16 for rate in (ceilings.flops, ceilings.bytes, ceilings.exps))


def test_unknown_names_of_families_are_errors() -> None:
    assert choose("sd15, sdxl") == ["sd15", "sdxl"]
    for wrong in ("sd15,sd99", ""):
        with pytest.raises(FastsdError, match=r"--models.*sd15"):
            choose(wrong)


def test_the_text_encoders_of_every_family_match_the_unet() -> None:
    for family in FAMILIES.values():
        assert sum(config.hidden_size for config in family.text) == family.unet.cross_attention_dim


def test_the_table_in_the_documentation_is_up_to_date() -> None:
    """Otherwise replace it with the output of `python -m bench.roofline --no-device`."""
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert table(["sd15", "sd21", "sdxl"], None, torch.bfloat16.itemsize) in page
