"""Graphs that nobody notices: the same bits as without, whatever changes between two replays.

Tapes stand in for CUDA graphs here and fix what they fix; tests/gpu/ asks the same of real graphs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastsd.errors import FastsdError
from fastsd.graph import Graphs
from fastsd.kernels import dispatch
from fastsd.pipeline import Pipeline
from fastsd.sampling.samplers import SAMPLERS
from tests.support.pipelines import MASK, PHOTO, graphed_pipeline, latents, tiny_pipeline
from tests.support.tape import TapeRecorder
from tests.support.told import told

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")


CHANGES: dict[str, dict[str, Any]] = {
    "another prompt": {"prompt": "a dog in the rain"},
    "another negative prompt": {"negative_prompt": "rain"},
    "another seed": {"seed": 99},
    "more steps": {"num_inference_steps": 11},
    "another guidance scale": {"guidance_scale": 2.25},
    "an image": {"image": PHOTO, "strength": 0.6},
    "less of the image": {"image": PHOTO, "strength": 0.3},
    "a mask": {"image": PHOTO, "mask_image": MASK, "strength": 0.7},
    **{f"sampler {name}": {"sampler": name} for name in SAMPLERS},
}


@pytest.mark.heavy
def test_one_graph_serves_everything_that_keeps_the_shape() -> None:
    pipe, recorder = graphed_pipeline()
    plain = tiny_pipeline()
    for change in ({}, *CHANGES.values(), {}):
        settings = {"prompt": "a cat"} | change
        assert torch.equal(latents(pipe, **settings), latents(plain, **settings)), change
    # The text encoder, the step, and for images the encoder.
    assert recorder.recorded == 3


@pytest.mark.parametrize(
    "change",
    [
        {"width": 96},
        {"num_images_per_prompt": 2},
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.7},
    ],
    ids=str,
)
def test_shapes_have_graphs_of_their_own(change: dict[str, Any]) -> None:
    pipe, recorder = graphed_pipeline()
    plain = tiny_pipeline()
    before = latents(pipe)
    captures = recorder.recorded
    assert torch.equal(latents(pipe, **change), latents(plain, **change))
    assert recorder.recorded == captures + 1
    if "guidance_rescale" in change:  # its value is no part of the graph
        assert torch.equal(latents(pipe, guidance_rescale=0.2), latents(plain, guidance_rescale=0.2))
    assert torch.equal(latents(pipe), before)
    assert recorder.recorded == captures + 1


def test_images_and_inpainting_networks() -> None:
    """The decoder's graph, and the channels that an inpainting network reads beside the latent."""
    pipe, _ = graphed_pipeline()
    assert np.array_equal(pipe("a cat", seed=1).images[0], tiny_pipeline()("a cat", seed=1).images[0])
    pipe, recorder = graphed_pipeline(in_channels=9)
    plain = tiny_pipeline(9)
    for seed, strength in ((1, 1.0), (2, 0.6), (3, 1.0)):
        settings: dict[str, Any] = {"image": PHOTO, "mask_image": MASK, "seed": seed, "strength": strength}
        assert torch.equal(latents(pipe, **settings), latents(plain, **settings))
    assert recorder.recorded == 3


@pytest.mark.heavy
def test_the_hundredth_replay_is_the_first() -> None:
    pipe, recorder = graphed_pipeline()
    first = latents(pipe, num_inference_steps=1)
    for _ in range(99):
        assert torch.equal(latents(pipe, num_inference_steps=1), first)
    assert recorder.recorded == 2


def test_eviction_and_capturing_again() -> None:
    pipe, recorder = graphed_pipeline(max_graphs=2)
    small = latents(pipe)
    latents(pipe, width=96)
    assert len(pipe.graphs) == 2
    before = recorder.recorded
    assert torch.equal(latents(pipe), small)
    assert recorder.recorded > before
    pipe.graphs.forget()
    assert len(pipe.graphs) == 0 and torch.equal(latents(pipe), small)


def test_no_graphs_on_request() -> None:
    pipe, recorder = graphed_pipeline(max_graphs=0)
    assert torch.equal(latents(pipe), latents(tiny_pipeline())) and recorder.recorded == 0


@pytest.mark.heavy
def test_weights_changed_in_place() -> None:
    """A hundred times, as LoRAs come and go: no new graph, the same result as without one."""
    pipe, recorder = graphed_pipeline()
    plain = tiny_pipeline()
    settings: dict[str, Any] = {"num_inference_steps": 1}
    first = latents(pipe, **settings)
    captures = recorder.recorded
    weights = [dict(p.components.unet.named_parameters())["conv_in.weight"] for p in (pipe, plain)]
    address, original = weights[0].data_ptr(), weights[0].detach().clone()
    generator = torch.Generator().manual_seed(0)
    for i in range(100):
        change = 0.1 * torch.randn(original.shape, generator=generator)
        with torch.no_grad():
            for weight in weights:
                weight.copy_(original + change)
        found = latents(pipe, **settings)
        assert not torch.equal(found, first)
        if i % 10 == 0:
            assert torch.equal(found, latents(plain, **settings))
    with torch.no_grad():
        weights[0].copy_(original)
    assert torch.equal(latents(pipe, **settings), first)
    assert weights[0].data_ptr() == address and recorder.recorded == captures


def test_a_capture_that_fails_is_said_once_and_runs_eagerly() -> None:
    plain = tiny_pipeline()
    recorder = TapeRecorder([RuntimeError("operation not permitted when stream is capturing\nmore")] * 99)
    pipe = Pipeline(plain.components, plain.device, plain.dtype, Graphs(recorder))
    with told(match=r"without CUDA graphs, slower: .*\(operation not permitted.* capturing\)$"):
        found = latents(pipe)
    assert torch.equal(latents(pipe), found)  # a second warning would be an error here
    assert torch.equal(latents(plain), found) and len(pipe.graphs) == 0
    assert len(recorder.fail) == 99 - 4  # the text encoder and the step, each tried twice


def test_too_little_memory_for_a_capture_frees_the_others_first() -> None:
    pipe, recorder = graphed_pipeline()
    wanted = latents(pipe)
    recorder.fail = [torch.OutOfMemoryError("CUDA out of memory")]
    assert torch.equal(latents(pipe, width=96), latents(tiny_pipeline(), width=96))
    assert recorder.freed == 1 and len(pipe.graphs) == 1  # the new step's alone
    assert torch.equal(latents(pipe), wanted)
    recorder.fail = [torch.OutOfMemoryError("CUDA out of memory")] * 2
    with told(match="CUDA out of memory"):
        assert torch.equal(latents(pipe, width=32), latents(tiny_pipeline(), width=32))


def test_weights_that_take_the_place_of_others_are_captured_anew() -> None:
    """A graph on memory that was given back would read whatever is there now."""
    pipe, recorder = graphed_pipeline()
    plain = tiny_pipeline()
    latents(pipe)
    captures = recorder.recorded
    for p in (pipe, plain):
        layer = p.components.unet.conv_in
        layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5, requires_grad=False)
    assert torch.equal(latents(pipe), latents(plain)) and recorder.recorded == captures + 1  # the step, not the text
    for p in (pipe, plain):
        p.components.vae.to(memory_format=torch.channels_last)
        p.components.vae.decoder.conv_out.bias = torch.nn.Parameter(torch.full((3,), 0.3), requires_grad=False)
    assert np.array_equal(pipe("a cat", seed=1).images[0], plain("a cat", seed=1).images[0])


def test_a_forced_backend_has_graphs_of_its_own() -> None:
    pipe, recorder = graphed_pipeline()
    plain = tiny_pipeline()
    latents(pipe)
    captures = recorder.recorded
    with dispatch.reference_only():
        assert torch.equal(latents(pipe), latents(plain))
    assert recorder.recorded == 2 * captures


def test_a_shape_that_found_no_memory_is_captured_when_there_is_some() -> None:
    plain = tiny_pipeline()
    recorder = TapeRecorder([torch.OutOfMemoryError("CUDA out of memory")] * 2)
    pipe = Pipeline(plain.components, plain.device, plain.dtype, Graphs(recorder))
    with told(match="CUDA out of memory"):
        wanted = latents(pipe)  # the text encoder fails twice, the step is captured
    pipe.graphs.forget()
    recorder.recorded = 0
    assert torch.equal(latents(pipe), wanted) and recorder.recorded == 2


def test_memory_that_runs_out_is_one_line_with_what_takes_less(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = graphed_pipeline()

    def no_memory(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(pipe.components.unet, "project_context", no_memory)
    with pytest.raises(FastsdError, match="not enough memory for 64x64 in batches of 4; batch_size 2 .*32x32"):
        pipe("a cat", num_images_per_prompt=4)
    monkeypatch.undo()
    assert torch.equal(latents(pipe), latents(tiny_pipeline()))  # and the lock is free


def test_a_tape_sees_what_a_graph_would_not() -> None:
    """The stand-in itself: numbers of the host are frozen, buffers are read anew, asking the device is refused."""
    x, factor = torch.ones(2), [2.0]
    replay = TapeRecorder().record(lambda: x * factor[0])
    x.fill_(5.0)
    factor[0] = 100.0
    assert replay().tolist() == [10.0, 10.0]
    with pytest.raises(RuntimeError, match="a graph cannot"):
        TapeRecorder().record(lambda: x if x.sum() > 0 else -x)
