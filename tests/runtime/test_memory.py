"""Whether a model fits is known from its files' headers, whether an image does from its size: before the work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsd.config import SD15_UNET, SD_VAE
from fastsd.errors import FastsdError
from fastsd.pipeline import BUNDLED, Pipeline
from fastsd.runtime import memory
from fastsd.weights import count_parameters, load_folder

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
MODEL = Path("a-model")


def test_what_pytorch_keeps_for_later_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the second image of a size could be refused for the memory that the first one took."""
    for name, found in (("mem_get_info", (100, 9000)), ("memory_reserved", 700), ("memory_allocated", 300)):
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    assert memory.available(CUDA) == 500


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsd.runtime.memory.available", lambda device: 6 * memory.GIB)


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
    monkeypatch.setattr("fastsd.runtime.memory.available", lambda device: None)  # the system does not say
    memory.check_weights(MODEL, 10**15, torch.float32, CPU)


def test_the_numbers_are_those_that_are_loaded(tmp_path: Path) -> None:
    components = load_folder(BUNDLED, torch.float32)
    modules = (components.unet, components.vae, *components.text_encoders)
    wanted = sum(parameter.numel() for module in modules for parameter in module.state_dict().values())
    assert count_parameters(BUNDLED, torch.float32) == wanted
    stored = load_file(BUNDLED / "vae/diffusion_pytorch_model.safetensors")
    inside = sum(tensor.numel() for tensor in stored.values())
    save_file(stored | {"model_ema.weight": torch.zeros(1000)}, tmp_path / "one.safetensors")
    assert count_parameters(tmp_path / "one.safetensors", torch.float16) == inside  # an average is left aside
    assert count_parameters(tmp_path / "nothing", torch.float32) == 0


def test_a_model_that_does_not_fit_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2 * count_parameters(BUNDLED, torch.float32)
    monkeypatch.setattr("fastsd.runtime.memory.available", lambda device: size)
    with monkeypatch.context() as patched:
        patched.setattr("fastsd.pipeline.load_checkpoint", lambda *_: pytest.fail("loaded"))
        with pytest.raises(FastsdError, match="dtype bf16 would fit"):
            Pipeline.from_pretrained(device="cpu", dtype="fp32")
    assert Pipeline.from_pretrained(device="cpu", dtype="bf16").dtype == torch.bfloat16


PHOTO = memory.Workload(SD15_UNET, SD_VAE, 1024, 1024, 4, torch.float32, tiled=False)


def refused(photo: memory.Workload, free: float, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(memory, "available", lambda device: int(free))
    with pytest.raises(FastsdError) as caught:
        memory.check_workload(photo, CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_offered_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each offer is taken up, and has to be accepted."""
    free = PHOTO.size - 1
    said = refused(PHOTO, free, monkeypatch)
    assert "batch_size 2 or vae_tiling or dtype fp16 or bf16 or 512x512 would fit" in said
    for change in ({"batch": 2}, {"tiled": True}, {"dtype": torch.float16}, {"width": 512, "height": 512}):
        memory.check_workload(replace(PHOTO, **change), CPU)


def test_only_what_helps_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    single = replace(PHOTO, batch=1, dtype=torch.float16)
    said = refused(single, single.size * 0.6, monkeypatch)
    assert "batch_size" not in said and "dtype" not in said and "512x512 would fit" in said
    tiled = replace(single, tiled=True)
    assert "vae_tiling" not in refused(tiled, tiled.size * 0.6, monkeypatch)


def test_what_no_single_change_helps_gets_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    large = replace(PHOTO, width=2048, height=512, batch=64)
    together = memory.smaller(replace(large, batch=1, tiled=True, dtype=torch.float16), 2**20)
    assert together is not None and together.width == 4 * together.height  # the shape stays
    said = refused(replace(large, batch=1), 2**20, monkeypatch)
    assert "would fit" in said
    assert "no size fits" in refused(PHOTO, 1000, monkeypatch)


def test_tiles_take_the_decoder_out_of_the_size() -> None:
    assert replace(PHOTO, tiled=True, batch=1).size < replace(PHOTO, batch=1).size / 2
    small = replace(PHOTO, width=512, height=512)
    assert replace(small, tiled=True).size == small.size  # one tile is the image


def test_what_ran_out_unforeseen_offers_what_takes_less() -> None:
    said = str(memory.too_large(PHOTO))
    assert said.startswith("not enough memory for 1024x1024 in batches of 4; batch_size 2 or vae_tiling or")
    assert said.endswith("would take less")
