"""A captured step serves one batch at a time: streams and threads that alternate, networks that change between rows.

Tapes stand in for CUDA graphs, as in tests/test_graph.py.
"""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from fastsd import Control
from fastsd.config import ControlNetConfig, SchedulerConfig, T2IAdapterConfig
from fastsd.generate.denoiser import MAX_ROWS
from fastsd.graph import Graphs
from fastsd.kernels import dispatch
from fastsd.model.controlnet import ControlNet
from fastsd.model.t2i_adapter import T2IAdapter
from fastsd.parameters.kinds import MAX_STEPS
from fastsd.pipeline import Pipeline
from fastsd.sampling.build import build
from tests.support.pipelines import PHOTO, graphed_pipeline, latents, tiny_pipeline
from tests.support.tape import TapeRecorder

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")


def test_two_streams_in_turn() -> None:
    """Both work on one graph's buffers, step by step, and one is left before its end."""
    pipe, recorder = graphed_pipeline()
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
    pipe, recorder = graphed_pipeline()
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


def test_streams_in_threads_see_their_own_latents() -> None:
    """Between a step and the look at it another thread may step on the same buffers."""
    pipe, _ = graphed_pipeline()

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
    pipe, _ = graphed_pipeline()
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
    pipe, recorder = graphed_pipeline()
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
    pipe, _ = graphed_pipeline()
    plain = tiny_pipeline()
    for _ in range(3):
        controls = controls_of(pipe, 1)
        assert torch.equal(latents(pipe, controls=controls), latents(plain, controls=controls))
        net = weakref.ref(controls[0].net)
        del controls
        gc.collect()
        assert net() is None


def test_two_streams_whose_networks_come_and_go() -> None:
    pipe, _ = graphed_pipeline()
    settings: dict[str, Any] = {"num_inference_steps": 5, "controls": controls_of(pipe)}
    wanted = [latents(pipe, seed=seed, **settings) for seed in (1, 2)]
    streams = [pipe.stream("a cat", seed=seed, output_type="latent", **settings) for seed in (1, 2)]
    last: Any = None
    next(streams[0])  # a step ahead of the other
    for steps in itertools.zip_longest(*streams):
        last = [step or before for step, before in zip(steps, last or steps)]
    assert all(torch.equal(step.result.images, want) for step, want in zip(last, wanted, strict=True))


@pytest.mark.parametrize("sampler", ["euler", "seeds_3", "heun++"])
def test_a_captured_table_has_room_for_every_run(sampler: str) -> None:
    """A table on the device has one row more than the host's; a sampler calls the network up to three times a step."""
    assert len(build(sampler, MAX_STEPS, SchedulerConfig())) + 1 <= MAX_ROWS


def test_a_refiner_has_graphs_of_its_own() -> None:
    plain = tiny_pipeline()
    second = tiny_pipeline().components
    with torch.no_grad():
        second.unet.conv_in.weight.mul_(1.5)
    recorder = TapeRecorder()
    pipe = Pipeline(plain.components, plain.device, plain.dtype, Graphs(recorder), second)
    eager = Pipeline(plain.components, plain.device, plain.dtype, None, second)
    for settings in (
        {"seed": 1},
        {"seed": 2, "refiner_switch": 0.4},
        {"prompt": "a dog", "sampler": "dpm++2m", "refiner_switch": 0.7},
    ):
        settings = {"num_inference_steps": 5} | settings
        found = latents(pipe, **settings)
        assert torch.equal(found, latents(eager, **settings))
        assert not torch.equal(found, latents(plain, **{k: v for k, v in settings.items() if k != "refiner_switch"}))
    assert recorder.recorded == 4  # two texts' encoders, two steps


def adapters_of(pipe: Pipeline) -> list[Control]:
    """Two T2I-Adapters of random weights, the first active early and the second late."""
    found = []
    for i in range(2):
        torch.manual_seed(30 + i)
        net = T2IAdapter(
            T2IAdapterConfig(3, pipe.components.unet.config.block_out_channels, 1, 8, False, (False, True))
        )
        found.append(Control(net.eval().requires_grad_(False), PHOTO, 0.5 + i, start=0.4 * i, end=0.6 + 0.4 * i))
    return found


def test_adapters_that_come_and_go() -> None:
    """One graph serves every set of T2I-Adapters: what they add is summed before; another one serves none."""
    pipe, recorder = graphed_pipeline()
    plain = tiny_pipeline()
    controls = adapters_of(pipe)
    settings: dict[str, Any] = {"num_inference_steps": 5, "controls": controls}
    assert torch.equal(latents(pipe, **settings), latents(plain, **settings))
    assert recorder.recorded == 2  # the text and the step
    late = settings | {"controls": controls[1:] + [replace(controls[1], weight=0.1, start=0.8)]}
    assert torch.equal(latents(pipe, **late), latents(plain, **late))
    assert recorder.recorded == 3
    assert not torch.equal(latents(pipe, **late), latents(pipe, **(late | {"controls": []})))
    both = settings | {"controls": [*controls, *controls_of(pipe, 1)]}
    assert torch.equal(latents(pipe, **both), latents(plain, **both))
