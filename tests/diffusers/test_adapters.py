"""LoRAs of any kind act as in diffusers, whenever they are loaded, scaled, fused, swapped or removed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsd
from fastsd.diffusers.hosts import twin_of
from fastsd.graph import Graphs
from fastsd.kernels import dispatch
from tests.support.families import Families
from tests.support.hosts import TOLERANCE, accelerated, make, pixels, save_lora, weights
from tests.support.tape import TapeRecorder

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
OTHERS = ["to_q", "conv1", "conv2", "conv_in", "conv_shortcut", "ff.net.0.proj", "proj_in", "time_emb_proj", "linear_1"]


@pytest.fixture(scope="module")
def files(families: Families, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    logging.getLogger("peft").setLevel(logging.ERROR)
    folder = tmp_path_factory.mktemp("loras")
    unet = families.pipelines["sd1"].unet
    return {
        "attention": save_lora(unet, folder / "attention", 4, ATTENTION),
        "other": save_lora(unet, folder / "other", 4, ATTENTION),
        "wider": save_lora(unet, folder / "wider", 7, ATTENTION),
        "every kind": save_lora(unet, folder / "every kind", 2, OTHERS),
        "dora": save_lora(unet, folder / "dora", 3, ["to_k", "to_out.0"], use_dora=True),
    }


@pytest.fixture
def pipe(families: Families) -> Iterator[Any]:
    pipe = make(families, "StableDiffusionPipeline")
    yield pipe
    fastsd.restore(pipe)
    pipe.unload_lora_weights()


def life(pipe: Any, files: dict[str, Path], begin: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """What a user does with LoRAs, and an image after each; accelerated from the act `begin` on."""
    acts: dict[str, Any] = {
        "none": lambda: None,
        "loaded": lambda: pipe.load_lora_weights(files["attention"], adapter_name="a"),
        "a second": lambda: pipe.load_lora_weights(files["every kind"], adapter_name="b"),
        "both": lambda: pipe.set_adapters(["a", "b"], [0.5, 1.2]),
        "disabled": pipe.disable_lora,
        "enabled": pipe.enable_lora,
        "the second": lambda: pipe.set_adapters(["b"]),
        "DoRA": lambda: pipe.load_lora_weights(files["dora"], adapter_name="c"),
        "the third": lambda: pipe.set_adapters(["c"]),
        "fused": pipe.fuse_lora,
        "unfused": pipe.unfuse_lora,
        "one deleted": lambda: pipe.delete_adapters("b"),
        "the first": lambda: pipe.set_adapters(["a"]),
        "unloaded": pipe.unload_lora_weights,
        "a name again": lambda: pipe.load_lora_weights(files["dora"], adapter_name="a"),
        "gone": pipe.unload_lora_weights,
    }
    for name, act in acts.items():
        act()
        if name == begin:
            fastsd.accelerate(pipe)
        yield name, pixels(pipe)
        if name == "both":
            yield "scaled", pixels(pipe, cross_attention_kwargs={"scale": 0.3})


@pytest.mark.parametrize("begin", ["none", "both", "fused"])
def test_a_life_with_loras(begin: str, pipe: Any, files: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    expected = dict(life(pipe, files))
    before = weights(pipe)
    with caplog.at_level(logging.WARNING, "fastsd"):
        found = dict(life(pipe, files, begin))
    assert not [r for r in caplog.records if r.name.startswith("fastsd")]
    for name, image in found.items():
        assert (image - expected[name]).abs().max() < TOLERANCE, name
    apart = ("loaded", "both", "scaled", "the second", "the third")
    for i, name in enumerate(apart):  # they differ from each other by far more
        for other in ("none", *apart[:i]):
            assert (expected[name] - expected[other]).abs().max() > 100 * TOLERANCE, (name, other)
    fastsd.restore(pipe)
    after = weights(pipe)  # fusing and unfusing is not exact, accelerated or not
    assert max(float((after[key] - before[key]).abs().max()) for key in before) < 1e-5


def test_the_weights_are_bit_for_bit_the_same_after_loras(pipe: Any, files: dict[str, Path]) -> None:
    before = weights(pipe)
    with accelerated(pipe):
        for name in ("attention", "every kind", "dora"):
            pipe.load_lora_weights(files[name], adapter_name=name.replace(" ", ""))
            pixels(pipe)
        pipe.unload_lora_weights()
        pixels(pipe)
    after = weights(pipe)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("prepared", [False, True], ids=["same rank", "any rank"])
def test_a_hot_swap_is_seen(prepared: bool, families: Families, files: dict[str, Path]) -> None:
    """PEFT copies the new adapter's numbers into the old one's memory; nothing else tells."""
    import copy

    def swapped(accelerate: bool) -> list[torch.Tensor]:
        pipe = make(families, "StableDiffusionPipeline")
        pipe.unet = copy.deepcopy(pipe.unet)
        if prepared:
            pipe.enable_lora_hotswap(target_rank=8)
        if accelerate:
            fastsd.accelerate(pipe)
        pipe.load_lora_weights(files["attention"], adapter_name="a")
        images = [pixels(pipe)]
        pipe.load_lora_weights(files["wider" if prepared else "other"], adapter_name="a", hotswap=True)
        images.append(pixels(pipe))
        fastsd.restore(pipe)
        return images

    expected, found = swapped(False), swapped(True)
    assert (expected[0] - expected[1]).abs().max() > 100 * TOLERANCE
    for one, other in zip(expected, found, strict=True):
        assert (one - other).abs().max() < TOLERANCE


def test_a_graph_outlives_every_adapter(pipe: Any, files: dict[str, Path]) -> None:
    """A captured graph reads our weights where they are; loading, swapping and removing adapters moves none."""
    expected = dict(life(pipe, files))
    fastsd.accelerate(pipe)
    twin, recorder = twin_of(pipe.unet), TapeRecorder()
    assert twin is not None
    twin.graphs = Graphs(recorder)
    with dispatch.forced("torch"):  # as on CUDA: convolutions are not packed
        for name, image in life(pipe, files):
            assert (image - expected[name]).abs().max() < TOLERANCE, name
    assert recorder.recorded == 1


def test_an_adapter_of_the_text_encoder(families: Families) -> None:
    import copy

    from peft import LoraConfig, inject_adapter_in_model

    pipe = make(families, "StableDiffusionPipeline")
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)
    plain = pixels(pipe)
    with accelerated(pipe):
        pixels(pipe)
        config = LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj", "fc1"], init_lora_weights=False)
        inject_adapter_in_model(config, pipe.text_encoder, "t")
        found = pixels(pipe)
    assert (found - plain).abs().max() > 10 * TOLERANCE
    assert (pixels(pipe) - found).abs().max() < TOLERANCE


def test_what_peft_cannot_merge_runs_in_diffusers(
    pipe: Any, files: dict[str, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import Linear

    def no_merge(*_: Any, **__: Any) -> None:
        raise NotImplementedError("this kind is not merged")

    pipe.load_lora_weights(files["attention"], adapter_name="a")
    expected = pixels(pipe)
    monkeypatch.setattr(Linear, "merge", no_merge)
    with caplog.at_level(logging.WARNING, "fastsd"), accelerated(pipe):
        assert (pixels(pipe) - expected).abs().max() < TOLERANCE
        pixels(pipe)
    (record,) = [r for r in caplog.records if r.name == "fastsd.diffusers"]
    assert "unet runs in diffusers' own code: PEFT cannot merge" in record.message
