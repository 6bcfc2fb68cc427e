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


def test_the_autoencoder_of_sdxl_is_the_one_that_overflows() -> None:
    """Timed as users of the original files get it: in the dtype that a pipeline gives it."""
    assert SDXL.vae.force_upcast


@pytest.mark.heavy
def test_diffusers_widens_an_autoencoder_that_overflows_itself() -> None:
    """Its pipeline does so where the autoencoder is in the UNet's fp16: so it gets that, whatever ours computes in."""
    pytest.importorskip("diffusers")
    components = models.random_components(TINY, torch.float16, CPU)
    components.vae.float()
    assert models.vae_dtype(components) == torch.float32
    assert models.peer_pipeline(components).vae.dtype == torch.float16
