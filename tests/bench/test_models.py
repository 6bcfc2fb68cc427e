"""Benchmarked graphs give the outputs of their modules; tapes stand in for CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import models
from bench.bench_parts import step_inputs
from bench.families import SDXL, TINY
from fastsd.components import Components
from tests.support.tape import TapeRecorder

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def recorder(monkeypatch: Any) -> TapeRecorder:
    recorder = TapeRecorder()
    monkeypatch.setattr(models, "CudaRecorder", lambda device: recorder)
    return recorder


@pytest.fixture(scope="module")
def tiny() -> Components:
    """A model after its first use, at which a CPU packs, and so replaces, the weights."""
    components = models.random_components(TINY, torch.float32, CPU)
    with torch.inference_mode():
        components.unet.denoise(*step_arguments(components, 0))
        components.vae.decode(torch.zeros(1, 8, 8, 4))
    return components


def step_arguments(components: Components, i: int) -> tuple[Any, ...]:
    inputs = step_inputs(components.unet, 1, 64, 8, CPU, i)
    return inputs["latent"], inputs["times"], inputs["key_values"]


@torch.inference_mode()
def test_a_step_is_captured_once_and_accepts_new_inputs(recorder: TapeRecorder, tiny: Components) -> None:
    step = models.captured_step(tiny.unet, CUDA)
    assert step is not None and models.captured_step(tiny.unet, CPU) is None
    for i in range(3):
        arguments = step_arguments(tiny, i)
        torch.testing.assert_close(step(*arguments), tiny.unet.denoise(*arguments), rtol=0, atol=0)
    assert recorder.recorded == 1


@torch.inference_mode()
def test_a_decode_is_captured_once_and_accepts_new_inputs(recorder: TapeRecorder, tiny: Components) -> None:
    decode = models.captured_decode(tiny.vae, CUDA)
    assert decode is not None and models.captured_decode(tiny.vae, CPU) is None
    for i in range(2):
        latent = torch.randn(1, 8, 8, 4, generator=torch.Generator().manual_seed(i))
        torch.testing.assert_close(decode(latent), tiny.vae.decode(latent), rtol=0, atol=0)
    assert recorder.recorded == 1


def test_the_autoencoder_of_sdxl_is_not_upcast() -> None:
    """Otherwise diffusers would run it in fp32, and fastsd in 16 bits."""
    assert not SDXL.vae.force_upcast
