"""What is measured as a CUDA graph gives what the module gives, with a stand-in for graphs that runs here."""

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
    found = TapeRecorder()
    monkeypatch.setattr(models, "CudaRecorder", lambda device: found)
    return found


@pytest.fixture(scope="module")
def tiny() -> Components:
    """Run once, since on a CPU weights are packed, and so replaced, at their first use."""
    found = models.random_components(TINY, torch.float32, CPU)
    with torch.inference_mode():
        given = step_inputs(found.unet, 1, 64, 8, CPU, 0)
        found.unet.denoise(given["rows"], given["times"], given["key_values"])
        found.vae.decode(torch.zeros(1, 8, 8, 4))
    return found


@torch.inference_mode()
def test_a_step_is_captured_once_and_takes_other_inputs(recorder: TapeRecorder, tiny: Components) -> None:
    step = models.captured_step(tiny.unet, CUDA)
    assert step is not None and models.captured_step(tiny.unet, CPU) is None
    for i in range(3):
        given = step_inputs(tiny.unet, 1, 64, 8, CPU, i)
        arguments = given["rows"], given["times"], given["key_values"]
        torch.testing.assert_close(step(*arguments), tiny.unet.denoise(*arguments), rtol=0, atol=0)
    assert recorder.recorded == 1


@torch.inference_mode()
def test_a_decoding_likewise(recorder: TapeRecorder, tiny: Components) -> None:
    decode = models.captured_decode(tiny.vae, CUDA)
    assert decode is not None and models.captured_decode(tiny.vae, CPU) is None
    for i in range(2):
        latent = torch.randn(1, 8, 8, 4, generator=torch.Generator().manual_seed(i))
        torch.testing.assert_close(decode(latent), tiny.vae.decode(latent), rtol=0, atol=0)
    assert recorder.recorded == 1


def test_nobody_is_slowed_by_an_autoencoder_that_is_upcast() -> None:
    """diffusers would run one that says so in fp32, and fastsd one that was made in memory in 16 bits."""
    assert not SDXL.vae.force_upcast
