"""Whether a model fits is known from its files' headers, before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsd import memory
from fastsd.errors import FastsdError
from fastsd.pipeline import BUNDLED, Pipeline
from fastsd.weights import count_numbers, load_folder

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
MODEL = Path("a-model")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsd.memory.available", lambda device: 6 * memory.GIB)


@pytest.mark.parametrize(
    ("numbers", "dtype", "device", "said"),
    [
        (2 * memory.GIB, torch.float32, CPU, "take 8.0 GiB in fp32, 6.0 GiB are free on cpu; dtype bf16 would fit"),
        (2 * memory.GIB, torch.float32, CUDA, "free on cuda:0; dtype fp16 would fit (4.0 GiB)"),
        (4 * memory.GIB, torch.float32, CPU, "take a smaller model"),
        (4 * memory.GIB, torch.bfloat16, CPU, "take 8.0 GiB in bf16, 6.0 GiB are free on cpu; close other programs"),
    ],
)
def test_what_would_fit_is_named(free: None, numbers: int, dtype: torch.dtype, device: torch.device, said: str) -> None:
    with pytest.raises(FastsdError) as caught:
        memory.check_weights(MODEL, numbers, dtype, device)
    assert str(caught.value).startswith(str(MODEL)) and said in str(caught.value) and "\n" not in str(caught.value)


def test_what_fits_is_not_refused(free: None, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.check_weights(MODEL, 3 * memory.GIB, torch.float16, CPU)
    monkeypatch.setattr("fastsd.memory.available", lambda device: None)  # the system does not say
    memory.check_weights(MODEL, 10**15, torch.float32, CPU)


def test_the_numbers_are_those_that_are_loaded(tmp_path: Path) -> None:
    components = load_folder(BUNDLED, torch.float32)
    modules = (components.unet, components.vae, *components.text_encoders)
    wanted = sum(parameter.numel() for module in modules for parameter in module.state_dict().values())
    assert count_numbers(BUNDLED, torch.float32) == wanted
    stored = load_file(BUNDLED / "vae/diffusion_pytorch_model.safetensors")
    inside = sum(tensor.numel() for tensor in stored.values())
    save_file(stored | {"model_ema.weight": torch.zeros(1000)}, tmp_path / "one.safetensors")
    assert count_numbers(tmp_path / "one.safetensors", torch.float16) == inside  # an average is left aside
    assert count_numbers(tmp_path / "nothing", torch.float32) == 0


def test_a_model_that_does_not_fit_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2 * count_numbers(BUNDLED, torch.float32)
    monkeypatch.setattr("fastsd.memory.available", lambda device: size)
    with monkeypatch.context() as patched:
        patched.setattr("fastsd.pipeline.load_checkpoint", lambda *_: pytest.fail("loaded"))
        with pytest.raises(FastsdError, match="dtype bf16 would fit"):
            Pipeline.from_pretrained(device="cpu", dtype="fp32")
    assert Pipeline.from_pretrained(device="cpu", dtype="bf16").dtype == torch.bfloat16
