"""Layers and networks pass; layers with a broken op fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastsd.kernels import groupnorm_silu
from fastsd.pipeline import Pipeline
from fastsd.verify.layers import check_layers, check_networks
from tests.support.verification import failures


def test_layers_pass_and_broken_ones_fail(
    pipe: Pipeline, short_run: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = check_layers(pipe, short_run, None)
    assert all(result.passed for result in results)
    kinds = ("text_encoder1", "down_blocks.0.resnets.0", "transformer_blocks.0", "vae.decoder.mid_block.attentions.0")
    assert all(any(kind in result.name for result in results) for kind in kinds)

    correct = groupnorm_silu._groupnorm_silu_cpu
    monkeypatch.setattr(groupnorm_silu, "_groupnorm_silu_cpu", lambda *args: correct(*args) * 1.001)
    broken = failures(check_layers(pipe, short_run, None))
    assert {"unet.mid_block.resnets.0", "vae.decoder.mid_block.attentions.0"} <= broken
    assert not any("transformer_blocks" in name or "text_encoder" in name for name in broken)  # have no group norm


def test_networks_pass(pipe: Pipeline) -> None:
    results = check_networks(pipe, "an eight", None)
    assert [result.name for result in results] == ["text_encoder1", "unet", "vae.encode", "vae.decode"]
    assert all(result.passed for result in results)
