"""Graphs that nobody notices: the same bits as without, whatever changes between two replays.

CUDA's graphs are replaced by tapes, which freeze what they freeze; tests/gpu/ asks the same of the real ones.
"""

from __future__ import annotations

import gc
import itertools
import threading
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsd import Control
from fastsd.config import ControlNetConfig, SchedulerConfig, TAESDConfig
from fastsd.errors import FastsdError
from fastsd.graph import Graphs
from fastsd.kernels import dispatch
from fastsd.model.controlnet import ControlNet
from fastsd.model.taesd import TAESD
from fastsd.pipeline import Pipeline
from fastsd.sampling.samplers import SAMPLERS
from tests.support.pipelines import tiny_pipeline
from tests.support.tape import TapeRecorder


@pytest.fixture(autouse=True)
def as_on_a_gpu() -> Iterator[None]:
    """PyTorch's operations, as CUDA runs linear layers and convolutions: oneDNN's path looks at numbers on the way."""
    with dispatch.forced("torch"):
        yield


def graphed(max_graphs: int = 16, in_channels: int = 4) -> tuple[Pipeline, TapeRecorder]:
    plain = tiny_pipeline(in_channels)
    recorder = TapeRecorder()
    return Pipeline(plain.components, plain.device, plain.dtype, Graphs(recorder, max_graphs)), recorder


def latents(pipe: Pipeline, prompt: str | list[str] = "a cat", **arguments: Any) -> torch.Tensor:
    return pipe(prompt, **({"seed": 1, "output_type": "latent"} | arguments)).images


PHOTO = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8))
MASK = Image.fromarray(np.kron(np.eye(2, dtype=np.uint8) * 255, np.ones((32, 32), dtype=np.uint8)))

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
    pipe, recorder = graphed()
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
    pipe, recorder = graphed()
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
    pipe, _ = graphed()
    assert np.array_equal(pipe("a cat", seed=1).images[0], tiny_pipeline()("a cat", seed=1).images[0])
    pipe, recorder = graphed(in_channels=9)
    plain = tiny_pipeline(9)
    for seed, strength in ((1, 1.0), (2, 0.6), (3, 1.0)):
        settings: dict[str, Any] = {"image": PHOTO, "mask_image": MASK, "seed": seed, "strength": strength}
        assert torch.equal(latents(pipe, **settings), latents(plain, **settings))
    assert recorder.recorded == 3


def test_tiny_autoencoders() -> None:
    """TAESD in the autoencoder's place, and another for previews: each has graphs of its own, though both decode."""
    torch.manual_seed(0)
    config = TAESDConfig(block_out_channels=(8,) * 4)
    own, shown = (TAESD(config).eval().requires_grad_(False) for _ in range(2))
    plain = tiny_pipeline()
    plain.components.vae = own
    recorder = TapeRecorder()
    eager = Pipeline(plain.components, plain.device, plain.dtype, preview=shown)
    pipe = Pipeline(plain.components, plain.device, plain.dtype, Graphs(recorder), preview=shown)
    for settings in ({"image": PHOTO, "strength": 0.5}, {"image": PHOTO.rotate(90), "strength": 0.9}, {}):
        steps, wanted = (list(p.stream("a cat", seed=1, num_inference_steps=4, **settings)) for p in (pipe, eager))
        assert np.array_equal(steps[0].preview(), wanted[0].preview())
        assert np.array_equal(steps[-1].result.images[0], wanted[-1].result.images[0])
        assert not np.array_equal(steps[0].preview(), pipe.decode(steps[0]._estimate.denoised(SchedulerConfig()))[0])
    assert recorder.recorded == 5  # encoder, two decoders, text, step


@pytest.mark.heavy
def test_the_hundredth_replay_is_the_first() -> None:
    pipe, recorder = graphed()
    first = latents(pipe, num_inference_steps=1)
    for _ in range(99):
        assert torch.equal(latents(pipe, num_inference_steps=1), first)
    assert recorder.recorded == 2


def test_eviction_and_capturing_again() -> None:
    pipe, recorder = graphed(max_graphs=2)
    small = latents(pipe)
    latents(pipe, width=96)
    assert len(pipe.graphs) == 2
    before = recorder.recorded
    assert torch.equal(latents(pipe), small)
    assert recorder.recorded > before
    pipe.graphs.forget()
    assert len(pipe.graphs) == 0 and torch.equal(latents(pipe), small)


def test_no_graphs_on_request() -> None:
    pipe, recorder = graphed(max_graphs=0)
    assert torch.equal(latents(pipe), latents(tiny_pipeline())) and recorder.recorded == 0


@pytest.mark.heavy
def test_weights_changed_in_place() -> None:
    """A hundred times, as LoRAs come and go: no new graph, the same result as without one."""
    pipe, recorder = graphed()
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


def test_two_streams_in_turn() -> None:
    """Both work on one graph's buffers, step by step, and one is left before its end."""
    pipe, recorder = graphed()
    wanted = [latents(pipe, seed=seed, num_inference_steps=4) for seed in (1, 2)]
    captures = recorder.recorded
    streams = [pipe.stream("a cat", seed=seed, num_inference_steps=4, output_type="latent") for seed in (1, 2)]
    left = pipe.stream("a dog", seed=3, num_inference_steps=4, output_type="latent")
    found = []
    for steps in zip(streams[0], left, streams[1]):
        found.append([step.latents.clone() for step in steps])
        if len(found) == 2:
            left.close()
            break
    for rest in zip(*streams):
        last = rest
    for step, want in zip(last, wanted, strict=True):
        assert step.result is not None and torch.equal(step.result.images, want)
    assert recorder.recorded == captures


def test_two_threads() -> None:
    pipe, recorder = graphed()
    wanted = [latents(pipe, seed=seed) for seed in range(6)]
    captures, found = recorder.recorded, {}

    def draw(seeds: range) -> None:
        with dispatch.forced("torch"):
            for seed in seeds:
                found[seed] = latents(pipe, seed=seed)

    threads = [threading.Thread(target=draw, args=(range(start, 6, 2),)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], wanted[seed]) for seed in range(6))
    assert recorder.recorded == captures


def test_a_capture_that_fails_is_said_once_and_runs_eagerly() -> None:
    plain = tiny_pipeline()
    recorder = TapeRecorder([RuntimeError("operation not permitted when stream is capturing\nmore")] * 99)
    pipe = Pipeline(plain.components, plain.device, plain.dtype, Graphs(recorder))
    with pytest.warns(UserWarning, match=r"without CUDA graphs, slower: .*\(operation not permitted.* capturing\)$"):
        found = latents(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(latents(pipe), found)
    assert torch.equal(latents(plain), found) and len(pipe.graphs) == 0
    assert len(recorder.fail) == 99 - 2  # the text encoder and the step, each tried once


def test_too_little_memory_for_a_capture_frees_the_others_first() -> None:
    pipe, recorder = graphed()
    wanted = latents(pipe)
    recorder.fail = [torch.OutOfMemoryError("CUDA out of memory")]
    assert torch.equal(latents(pipe, width=96), latents(tiny_pipeline(), width=96))
    assert recorder.freed == 1 and len(pipe.graphs) == 1  # the new step's alone
    assert torch.equal(latents(pipe), wanted)
    recorder.fail = [torch.OutOfMemoryError("CUDA out of memory")] * 2
    with pytest.warns(UserWarning, match="CUDA out of memory"):
        assert torch.equal(latents(pipe, width=32), latents(tiny_pipeline(), width=32))


def test_the_autoencoder_that_overflows_is_widened_once() -> None:
    """20 of 20 images; the graphs of the old weights are dropped, and one note says so."""
    plain = tiny_pipeline(dtype=torch.float16)
    pipe = Pipeline(plain.components, plain.device, plain.dtype, Graphs(TapeRecorder()))
    with torch.no_grad():
        plain.components.vae.decoder.conv_in.weight.mul_(1e5)  # beyond fp16's 65504 in a map, fine in fp32
    notes = []
    for seed in range(20):
        result = pipe("a cat", seed=seed, num_inference_steps=1)
        assert np.asarray(result.images[0]).std() > 0
        notes += result.notes
    assert notes == ["the autoencoder overflowed in fp16; it runs in fp32 from now on"]


def test_weights_that_take_the_place_of_others_are_captured_anew() -> None:
    """A graph on memory that was given back would read whatever is there now."""
    pipe, recorder = graphed()
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
    pipe, recorder = graphed()
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
    with pytest.warns(UserWarning, match="CUDA out of memory"):
        wanted = latents(pipe)  # the text encoder fails twice, the step is captured
    pipe.graphs.forget()
    recorder.recorded = 0
    assert torch.equal(latents(pipe), wanted) and recorder.recorded == 2


def test_streams_in_threads_see_their_own_latents() -> None:
    """Between a step and the look at it another thread may step on the same buffers."""
    pipe, _ = graphed()

    def watch(seed: int) -> list[torch.Tensor]:
        steps = pipe.stream("a cat", seed=seed, num_inference_steps=12, sampler="euler_a", output_type="latent")
        return [step.latents.clone() for step in steps]

    wanted, found = [watch(seed) for seed in range(3)], {}

    def work(seed: int) -> None:
        with dispatch.forced("torch"):
            found[seed] = watch(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, want in enumerate(wanted):
        assert all(torch.equal(a, b) for a, b in zip(found[seed], want, strict=True))


def test_a_stream_left_half_way_holds_no_other_thread_up() -> None:
    pipe, _ = graphed()
    wanted = latents(pipe, seed=2)
    left = pipe.stream("a dog", seed=3)
    next(left)
    found: list[torch.Tensor] = []

    def work() -> None:
        with dispatch.forced("torch"):
            found.append(latents(pipe, seed=2))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout=120)
    assert found and torch.equal(found[0], wanted)


def test_large_images_leave_the_autoencoder_uncaptured(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, recorder = graphed()
    latents(pipe, image=PHOTO)
    captures = recorder.recorded
    monkeypatch.setattr("fastsd.generate.latents.CAPTURED", 64 * 64 - 1)
    photo = pipe("a cat", seed=1).images[0]
    assert recorder.recorded == captures
    monkeypatch.undo()
    assert np.array_equal(pipe("a cat", seed=1).images[0], photo) and recorder.recorded == captures + 1


def test_an_encoder_that_overflows_is_widened_too() -> None:
    plain = tiny_pipeline(dtype=torch.float16)
    pipe = Pipeline(plain.components, plain.device, plain.dtype, Graphs(TapeRecorder()))
    with torch.no_grad():
        plain.components.vae.encoder.conv_in.weight.mul_(1e5)  # itself within fp16, its map not
    notes = []
    for seed in range(3):
        result = pipe("a cat", image=PHOTO, seed=seed, strength=0.5, num_inference_steps=2, output_type="latent")
        assert torch.isfinite(result.images).all()
        notes += result.notes
    assert notes == ["the autoencoder overflowed in fp16; it runs in fp32 from now on"]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_one_value_that_is_not_finite_is_enough(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_pipeline(dtype=torch.float16)
    vae, decode = plain.components.vae, plain.components.vae.decode
    ran = []

    def spoilt(z: torch.Tensor) -> torch.Tensor:
        ran.append(z.dtype)
        image = decode(z)
        if z.dtype == torch.float16:
            image[0, 5, 7, 1] = value
        return image

    monkeypatch.setattr(vae, "decode", spoilt)
    for _ in range(3):
        assert plain("a cat", seed=1, num_inference_steps=1).images[0].size == (64, 64)
    assert ran == [torch.float16] + [torch.float32] * 3  # one image is decoded twice, and the weights converted once


def test_a_model_that_is_not_finite_is_an_error_and_leaves_the_autoencoder_as_it_is() -> None:
    plain = tiny_pipeline(dtype=torch.float16)
    with torch.no_grad():
        plain.components.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(FastsdError, match="not finite.*dtype"):
        plain("a cat", seed=1, num_inference_steps=1)
    assert plain.components.vae.quant_conv.weight.dtype == torch.float16


def test_memory_that_runs_out_is_one_line_with_what_takes_less(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = graphed()

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


def controls_of(pipe: Pipeline, count: int = 2) -> list[Control]:
    """ControlNets of random weights, the first active early and the second late."""
    found = []
    for i in range(count):
        torch.manual_seed(20 + i)
        net = ControlNet(ControlNetConfig(replace(pipe.components.unet.config, in_channels=4), (8, 8, 8, 8)))
        net.eval().requires_grad_(False)
        found.append(Control(net, PHOTO, weight=0.5 + i, start=0.4 * i, end=0.6 + 0.4 * i))
    return found


@pytest.mark.heavy
@pytest.mark.parametrize("sampler", ["euler_a", "dpm++2m", "heun"])
def test_networks_that_come_and_go(sampler: str) -> None:
    """A graph for each set of ControlNets; the state goes from one graph's buffers to the next's and back."""
    pipe, recorder = graphed()
    plain = tiny_pipeline()
    controls = controls_of(pipe)
    settings: dict[str, Any] = {"num_inference_steps": 5, "sampler": sampler, "controls": controls}
    first = latents(pipe, **settings)
    assert torch.equal(first, latents(plain, **settings))
    captures = recorder.recorded  # the text, and the step with the first, with both and with the second
    assert captures == 4
    for change in (
        {"seed": 9},
        {"prompt": "a [dog:cat:2]"},
        {"controls": [replace(controls[0], weight=0.1, image=Image.new("RGB", (64, 64), "red")), controls[1]]},
    ):
        assert torch.equal(latents(pipe, **(settings | change)), latents(plain, **(settings | change))), change
    assert not torch.equal(first, latents(pipe, **(settings | {"controls": []})))
    assert torch.equal(first, latents(pipe, **settings))
    assert recorder.recorded == captures + 1  # without any


@pytest.mark.heavy
def test_a_graph_keeps_no_controlnet() -> None:
    """One that its owner gives up gives its memory back, though a graph was made with it."""
    pipe, _ = graphed()
    plain = tiny_pipeline()
    for _ in range(3):
        controls = controls_of(pipe, 1)
        assert torch.equal(latents(pipe, controls=controls), latents(plain, controls=controls))
        net = weakref.ref(controls[0].net)
        del controls
        gc.collect()
        assert net() is None


def test_two_streams_whose_networks_come_and_go() -> None:
    pipe, _ = graphed()
    settings: dict[str, Any] = {"num_inference_steps": 5, "controls": controls_of(pipe)}
    wanted = [latents(pipe, seed=seed, **settings) for seed in (1, 2)]
    streams = [pipe.stream("a cat", seed=seed, output_type="latent", **settings) for seed in (1, 2)]
    last: Any = None
    next(streams[0])  # a step ahead of the other
    for steps in itertools.zip_longest(*streams):
        last = [step or before for step, before in zip(steps, last or steps)]
    assert all(torch.equal(step.result.images, want) for step, want in zip(last, wanted, strict=True))


def test_a_refiner_has_graphs_of_its_own() -> None:
    plain = tiny_pipeline()
    second = tiny_pipeline().components
    with torch.no_grad():
        second.unet.conv_in.weight.mul_(1.5)
    recorder = TapeRecorder()
    pipe = Pipeline(plain.components, plain.device, plain.dtype, Graphs(recorder), second)
    eager = Pipeline(plain.components, plain.device, plain.dtype, None, second)
    for settings in ({"seed": 1}, {"seed": 2, "refiner_switch": 0.4}, {"prompt": "a dog", "sampler": "dpm++2m"}):
        settings = {"num_inference_steps": 5} | settings
        found = latents(pipe, **settings)
        assert torch.equal(found, latents(eager, **settings))
        assert not torch.equal(found, latents(plain, **{k: v for k, v in settings.items() if k != "refiner_switch"}))
    assert recorder.recorded == 4  # two texts' encoders, two steps
