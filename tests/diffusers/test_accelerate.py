"""A pipeline of every class generates the same images accelerated, and is afterwards what it was."""

from __future__ import annotations

import gc
import logging
from typing import Any

import pytest
import torch

import fastsd
from fastsd.diffusers.accelerate import PIPELINES
from tests.support.families import Families
from tests.support.hosts import CALLS, TOLERANCE, accelerated, anatomy, make, networks, pixels, weights


def test_every_class_is_called() -> None:
    assert set(PIPELINES) == set(CALLS)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_images_are_the_same_and_everything_is_given_back(
    name: str, families: Families, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = make(families, name)
    expected = pixels(pipe, name)
    whole, numbers = anatomy(pipe), weights(pipe)
    with caplog.at_level(logging.WARNING, "fastsd"), accelerated(pipe):
        found = pixels(pipe, name)
        again = pixels(pipe, name)
    assert not [r for r in caplog.records if r.name.startswith("fastsd")]  # every network was ours
    assert expected.std() > 0.01
    assert (found - expected).abs().max() < TOLERANCE
    assert torch.equal(found, again)
    assert anatomy(pipe) == whole
    assert all(torch.equal(tensor, numbers[key]) for key, tensor in weights(pipe).items())
    assert torch.equal(pixels(pipe, name), expected)


def test_accelerating_twice_changes_nothing(families: Families) -> None:
    pipe = make(families, "StableDiffusionPipeline")
    whole = anatomy(pipe)
    with accelerated(pipe):
        assert fastsd.accelerate(pipe) is pipe
        classes = [type(network).__mro__ for network in networks(pipe).values()]
        assert fastsd.accelerate(pipe) is pipe
        assert [type(network).__mro__ for network in networks(pipe).values()] == classes
    assert anatomy(pipe) == whole
    assert fastsd.restore(pipe) is pipe  # nothing to do
    assert anatomy(pipe) == whole


def tensor_bytes() -> int:
    """Of all tensors in this process, each memory once."""
    gc.collect()
    seen = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor) and item.device.type == "cpu":
            if item.layout == torch._mkldnn:
                seen[id(item)] = item.numel() * item.element_size()
            else:
                seen[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
    return sum(seen.values())


def test_the_weights_are_in_memory_once(families: Families) -> None:
    """A convolution's packed weight may have padded channels; a tiny model's do not."""
    pipe = make(families, "StableDiffusionPipeline")
    own = sum(p.nbytes for network in networks(pipe).values() for p in network.parameters())
    before = tensor_bytes()
    with accelerated(pipe):
        pixels(pipe)
        assert tensor_bytes() - before < 0.1 * own
    assert tensor_bytes() - before < 0.01 * own


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda pipe: setattr(pipe, "unet", torch.compile(pipe.unet)), "pipe.unet: it is compiled"),
        (lambda pipe: pipe.vae.compile(), "pipe.vae: it is compiled"),
        (lambda pipe: pipe.unet.to("meta"), "pipe.unet: it is on meta"),
        (lambda pipe: setattr(pipe.text_encoder, "hf_quantizer", object()), "pipe.text_encoder: it is quantised"),
        (
            lambda pipe: pipe.unet.conv_in._parameters.update(weight=torch.nn.Parameter(torch.ones(1).char(), False)),
            "pipe.unet: it is quantised",
        ),
        (lambda pipe: setattr(pipe.unet.conv_in, "_hf_hook", object()), "pipe.unet: it is offloaded"),
    ],
)
def test_what_is_refused(spoil: Any, says: str, families: Families) -> None:
    import copy

    pipe = make(families, "StableDiffusionPipeline")
    for name, network in networks(pipe).items():
        setattr(pipe, name, copy.deepcopy(network))
    spoil(pipe)
    classes = [id(type(part)) for network in networks(pipe).values() for part in network.modules()]
    with pytest.raises(fastsd.FastsdError, match=says) as refused:
        fastsd.accelerate(pipe)
    assert "\n" not in str(refused.value)
    assert [id(type(part)) for network in networks(pipe).values() for part in network.modules()] == classes


def test_other_objects_are_refused(families: Families) -> None:
    import diffusers

    with pytest.raises(fastsd.FastsdError, match="should be a diffusers pipeline"):
        fastsd.accelerate("a pipeline")
    base = families.pipelines["sd1"]
    other = diffusers.DDIMPipeline(base.unet, base.scheduler)
    with pytest.raises(fastsd.FastsdError, match="no networks for DDIMPipeline"):
        fastsd.accelerate(other)
    with pytest.raises(fastsd.FastsdError, match="no networks for DDIMPipeline"):
        fastsd.restore(other)
