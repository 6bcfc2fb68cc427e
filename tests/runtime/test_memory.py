"""A model that does not fit is refused by its files' headers, a workload by its size: before the work starts."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsd.bundled import BUNDLED
from fastsd.config import SD15_UNET, SD_VAE
from fastsd.errors import FastsdError
from fastsd.pipeline import Pipeline
from fastsd.runtime import memory
from fastsd.weights import count_parameters, load_folder

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
MODEL = Path("a-model")


def test_memory_that_pytorch_caches_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the first image's cached memory could get the second of the same size refused."""
    for name, value in (("mem_get_info", (100, 9000)), ("memory_reserved", 700), ("memory_allocated", 300)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.available(CUDA) == 500


@pytest.fixture
def six_gib_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsd.runtime.memory.available", lambda device: 6 * memory.GIB)


@pytest.mark.parametrize(
    ("parameters", "dtype", "device", "message"),
    [
        (2 * memory.GIB, torch.float32, CPU, "take 8.0 GiB in fp32, 6.0 GiB are free on cpu; dtype bf16 would fit"),
        (2 * memory.GIB, torch.float32, CUDA, "free on cuda:0; dtype fp16 would fit (4.0 GiB)"),
        (4 * memory.GIB, torch.float32, CPU, "take a smaller model"),
        (4 * memory.GIB, torch.bfloat16, CPU, "take 8.0 GiB in bf16, 6.0 GiB are free on cpu; close other programs"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_a_precision_that_does(
    six_gib_free: None, parameters: int, dtype: torch.dtype, device: torch.device, message: str
) -> None:
    with pytest.raises(FastsdError) as caught:
        memory.check_weights(MODEL, parameters, dtype, device)
    assert str(caught.value).startswith(str(MODEL)) and message in str(caught.value) and "\n" not in str(caught.value)


def test_weights_that_fit_are_accepted(six_gib_free: None, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.check_weights(MODEL, 3 * memory.GIB, torch.float16, CPU)
    monkeypatch.setattr("fastsd.runtime.memory.available", lambda device: None)  # the system does not say
    memory.check_weights(MODEL, 10**15, torch.float32, CPU)


def test_the_parameter_count_is_that_of_the_loaded_weights(tmp_path: Path) -> None:
    components = load_folder(BUNDLED["digits"], torch.float32)
    modules = (components.unet, components.vae, *components.text_encoders)
    loaded = sum(parameter.numel() for module in modules for parameter in module.state_dict().values())
    assert count_parameters(BUNDLED["digits"], torch.float32) == loaded
    vae = load_file(BUNDLED["digits"] / "vae/diffusion_pytorch_model.safetensors")
    without_average = sum(tensor.numel() for tensor in vae.values())
    save_file(vae | {"model_ema.weight": torch.zeros(1000)}, tmp_path / "vae.safetensors")
    assert count_parameters(tmp_path / "vae.safetensors", torch.float16) == without_average
    assert count_parameters(tmp_path / "nothing", torch.float32) == 0


def test_a_model_that_does_not_fit_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    half_of_it = 2 * count_parameters(BUNDLED["digits"], torch.float32)
    monkeypatch.setattr("fastsd.runtime.memory.available", lambda device: half_of_it)
    with monkeypatch.context() as patched:
        patched.setattr("fastsd.pipeline.load_checkpoint", lambda *_: pytest.fail("loaded"))
        with pytest.raises(FastsdError, match="dtype bf16 would fit"):
            Pipeline.from_pretrained(device="cpu", dtype="fp32")
    assert Pipeline.from_pretrained(device="cpu", dtype="bf16").dtype == torch.bfloat16


WORKLOAD = memory.Workload(SD15_UNET, SD_VAE, 1024, 1024, 4, torch.float32, tiled=False)


def refusal(workload: memory.Workload, free: float, monkeypatch: pytest.MonkeyPatch) -> str:
    """The message for a workload that needs more than `free` bytes."""
    monkeypatch.setattr(memory, "available", lambda device: int(free))
    with pytest.raises(FastsdError) as caught:
        memory.check_workload(workload, CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_offer_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(WORKLOAD, WORKLOAD.activation_bytes - 1, monkeypatch)
    assert "batch_size 2 or vae_tiling or dtype fp16 or bf16 or 512x512 would fit" in message
    for change in ({"batch": 2}, {"tiled": True}, {"dtype": torch.float16}, {"width": 512, "height": 512}):
        memory.check_workload(replace(WORKLOAD, **change), CPU)


def test_changes_that_do_not_help_are_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    single = replace(WORKLOAD, batch=1, dtype=torch.float16)
    message = refusal(single, single.activation_bytes * 0.6, monkeypatch)
    assert "batch_size" not in message and "dtype" not in message and "512x512 would fit" in message
    tiled = replace(single, tiled=True)
    assert "vae_tiling" not in refusal(tiled, tiled.activation_bytes * 0.6, monkeypatch)


def test_where_no_single_change_is_enough_all_are_offered_together(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 2**20
    large = replace(WORKLOAD, width=2048, height=512, batch=64)
    changed = replace(large, batch=1, tiled=True, dtype=torch.float16)
    shrunk = memory.shrink(changed, free)
    assert shrunk is not None and shrunk.width == 4 * shrunk.height  # the aspect ratio stays
    offer = f"{shrunk.width}x{shrunk.height} with batch_size 1, vae_tiling and dtype fp16 or bf16 would fit"
    assert offer in refusal(large, free, monkeypatch)
    assert "no size fits" in refusal(WORKLOAD, 1000, monkeypatch)


def test_tiling_bounds_the_decoders_share() -> None:
    assert replace(WORKLOAD, tiled=True, batch=1).activation_bytes < replace(WORKLOAD, batch=1).activation_bytes / 2
    small = replace(WORKLOAD, width=512, height=512)
    assert replace(small, tiled=True).activation_bytes == small.activation_bytes  # the image is one tile


@pytest.mark.parametrize(
    "cause", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDNN_STATUS_ALLOC_FAILED")]
)
def test_memory_that_ran_out_after_the_check_is_reported_with_what_takes_less(cause: Exception) -> None:
    """In one line, whoever said it; and who keeps the error keeps no tensor of the work that failed."""
    held: list[Any] = []

    def work() -> None:
        activation = torch.ones(1000)
        held.append(weakref.ref(activation))
        raise cause

    with pytest.raises(FastsdError) as caught, memory.fitting(WORKLOAD):
        work()
    message = str(caught.value)
    assert message.startswith("not enough memory for 1024x1024 in batches of 4; batch_size 2 or vae_tiling or")
    assert message.endswith("would take less") and caught.value.__cause__ is cause and held[0]() is None


def test_a_wider_autoencoder_takes_more() -> None:
    half = replace(WORKLOAD, dtype=torch.float16)
    wide, both = replace(half, vae_dtype=torch.float32), replace(half, dtype=torch.float32)
    assert half.activation_bytes < wide.activation_bytes < both.activation_bytes
    assert replace(half, vae_dtype=torch.bfloat16).activation_bytes == half.activation_bytes


def test_other_errors_pass_the_check_of_memory_as_they_are() -> None:
    with pytest.raises(ValueError, match="of another kind"), memory.fitting(WORKLOAD):
        raise ValueError("of another kind")
