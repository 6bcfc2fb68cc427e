"""CUDA graphs on a GPU: the checks of tests/test_graph.py at real sizes, and those that need a GPU."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsd import Control
from fastsd.components import Components
from fastsd.config import SD15_UNET, SD_VAE, CLIPConfig, ControlNetConfig, SchedulerConfig
from fastsd.cuda.capture import CudaRecorder
from fastsd.errors import FastsdError
from fastsd.graph import Graphs
from fastsd.model.clip import TextEncoder
from fastsd.model.controlnet import ControlNet
from fastsd.model.tokenizer import Tokenizer
from fastsd.model.unet import UNet
from fastsd.model.vae import AutoencoderKL
from fastsd.pipeline import Pipeline
from fastsd.runtime import memory
from fastsd.sampling.samplers import SAMPLERS
from tests.support.told import heard

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def components() -> Components:
    """SD1.5 at full size with random weights."""
    torch.manual_seed(0)
    with DEVICE:
        parts = (UNet(SD15_UNET), AutoencoderKL(SD_VAE), TextEncoder(CLIPConfig()))
    unet, vae, text = (part.half().eval().requires_grad_(False) for part in parts)
    for module in (unet, vae):
        module.to(memory_format=torch.channels_last)
    return Components(unet, vae, (text,), (Tokenizer(),), SchedulerConfig(sampler="euler"), sample_size=64)


def pipeline(components: Components, graphs: bool = True, max_graphs: int = 16) -> Pipeline:
    recorder = CudaRecorder(DEVICE) if graphs else None
    return Pipeline(components, DEVICE, torch.float16, Graphs(recorder, max_graphs))


def latents(pipe: Pipeline, prompt: str = "a cat", **arguments: Any) -> torch.Tensor:
    settings = {"seed": 1, "num_inference_steps": 3, "output_type": "latent"} | arguments
    return pipe(prompt, **settings).images  # a failed capture warns, which would be an error here


def test_graphs_are_bit_identical_to_eager_runs(components: Components) -> None:
    plain, pipe = pipeline(components, graphs=False), pipeline(components)
    for change in ({}, {"prompt": "a dog"}, {"seed": 2}, {"guidance_scale": 3.0}, {"guidance_scale": 1.0}, {}):
        assert torch.equal(latents(pipe, **change), latents(plain, **change)), change
    for sampler in SAMPLERS:
        assert torch.equal(latents(pipe, sampler=sampler), latents(plain, sampler=sampler)), sampler
    images, expected = (p("a cat", seed=1, num_inference_steps=2, output_type="pt").images for p in (pipe, plain))
    assert torch.equal(images, expected)


def make_controls(components: Components, count: int, seed: int = 0) -> list[Control]:
    """ControlNets with random weights; the first is active in early steps, the second in late ones."""
    torch.manual_seed(seed)
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (256, 256, 3), dtype=np.uint8))
    controls = []
    for i in range(count):
        with DEVICE:
            net = ControlNet(ControlNetConfig(components.unet.config, (16, 32, 96, 256)))
        net.half().eval().requires_grad_(False).to(memory_format=torch.channels_last)
        controls.append(Control(net, image, weight=0.5, start=0.3 * i, end=0.7 + 0.3 * i))
    return controls


def test_controlnets_that_start_and_end(components: Components) -> None:
    plain, pipe = pipeline(components, graphs=False), pipeline(components)
    controls = make_controls(components, 2)
    for sampler in ("euler_a", "dpm++2m", "heun"):
        settings = {"controls": controls, "sampler": sampler, "num_inference_steps": 4}
        result = latents(pipe, **settings)
        assert torch.equal(result, latents(plain, **settings))
        assert not torch.equal(result, latents(pipe, **(settings | {"controls": []})))


def test_a_graph_holds_no_controlnet(components: Components) -> None:
    """A new ControlNet may reuse the memory of a freed one; the image is correct whether or not its graph is reused."""
    plain, pipe = pipeline(components, graphs=False), pipeline(components)
    allocated = []
    for seed in range(4):
        controls = make_controls(components, 1, seed)
        assert torch.equal(latents(pipe, controls=controls), latents(plain, controls=controls))
        allocated.append(torch.cuda.memory_allocated(DEVICE))
        del controls
        gc.collect()
    weights = sum(p.nbytes for p in make_controls(components, 1)[0].net.parameters())
    assert allocated[-1] - allocated[0] < weights / 2, [f"{n / 2**20:.0f} MiB" for n in allocated]


def test_the_hundredth_replay_equals_the_first(components: Components) -> None:
    pipe = pipeline(components)
    first = latents(pipe)
    count = len(pipe.graphs)
    for _ in range(34):  # three steps each
        assert torch.equal(latents(pipe), first)
    assert len(pipe.graphs) == count


def test_an_evicted_graph_is_captured_again(components: Components) -> None:
    pipe = pipeline(components, max_graphs=2)
    small = latents(pipe, width=256, height=256)
    latents(pipe, width=320, height=256)
    assert torch.equal(latents(pipe, width=256, height=256), small)


def test_weights_changed_in_place(components: Components) -> None:
    """A hundred changes, as by LoRAs; the graph reads the weights at the same address."""
    plain, pipe = pipeline(components, graphs=False), pipeline(components)
    weight = components.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_qkv.weight
    address, original = weight.data_ptr(), weight.clone()
    settings = {"num_inference_steps": 1, "width": 256, "height": 256}
    first = latents(pipe, **settings)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for i in range(100):
        weight.copy_(original + 0.1 * torch.randn(weight.shape, generator=generator, device=DEVICE).half())
        result = latents(pipe, **settings)
        if i % 10 == 0:
            assert torch.equal(result, latents(plain, **settings)) and not torch.equal(result, first)
    weight.copy_(original)
    assert torch.equal(latents(pipe, **settings), first) and weight.data_ptr() == address


def test_two_threads(components: Components) -> None:
    pipe, results = pipeline(components), {}
    expected = [latents(pipe, seed=seed) for seed in range(6)]

    def generate(seeds: range) -> None:
        for seed in seeds:
            results[seed] = pipe("a cat", seed=seed, num_inference_steps=3, output_type="latent").images

    threads = [threading.Thread(target=generate, args=(range(start, 6, 2),)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[seed], expected[seed]) for seed in range(6))


def test_threads_with_separate_streams(components: Components) -> None:
    """Calls are ordered on the device, not only on the host."""
    pipe, results = pipeline(components), {}
    settings: dict[str, Any] = {"num_inference_steps": 3, "width": 256, "height": 256, "output_type": "latent"}
    expected = [pipe("a cat", seed=seed, **settings).images for seed in range(8)]
    torch.cuda.synchronize(DEVICE)

    def generate(seeds: range) -> None:
        with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
            for seed in seeds:
                results[seed] = pipe("a cat", seed=seed, **settings).images

    threads = [threading.Thread(target=generate, args=(range(start, 8, 2),)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize(DEVICE)
    assert all(torch.equal(results[seed], expected[seed]) for seed in range(8))


def test_two_alternating_streams_of_one_shape(components: Components) -> None:
    pipe = pipeline(components)
    settings: dict[str, Any] = {"num_inference_steps": 4, "sampler": "dpm++2m_sde", "width": 256, "height": 256}
    expected = [latents(pipe, seed=seed, **settings) for seed in (1, 2)]
    streams = [pipe.stream("a cat", seed=seed, output_type="latent", **settings) for seed in (1, 2)]
    for pair in zip(*streams):
        last = pair
        latents(pipe, "a call between", seed=5, **settings)
    for step, image in zip(last, expected, strict=True):
        assert step.result is not None and torch.equal(step.result.images, image)


NOISE_IMAGE = Image.effect_noise((512, 512), 64).convert("RGB")


@pytest.mark.parametrize(
    "arguments",
    [
        {"sampler": "euler"},
        {"sampler": "euler_a"},  # samples noise on the CPU in every step
        {"guidance_rescale": 0.7},
        {"image": NOISE_IMAGE, "mask_image": NOISE_IMAGE.convert("L"), "strength": 1.0},
    ],
    ids=["euler", "euler_a", "rescaled", "inpainting"],
)
def test_a_step_does_not_synchronise_and_allocates_no_memory(components: Components, arguments: dict[str, Any]) -> None:
    pipe = pipeline(components)
    steps = pipe.stream("a cat", seed=1, num_inference_steps=6, **arguments)
    next(steps), next(steps)
    before = torch.cuda.memory_allocated(DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step = next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    del step
    assert torch.cuda.memory_allocated(DEVICE) - before < 2**20  # only the latents that the step returns


def test_replaced_weights_are_captured_again(components: Components) -> None:
    plain, pipe = pipeline(components, graphs=False), pipeline(components)
    settings = {"width": 256, "height": 256}
    before = latents(pipe, **settings)
    layer = components.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_qkv
    original = layer.weight
    layer.weight = torch.nn.Parameter(original * 1.5, requires_grad=False)
    try:
        result = latents(pipe, **settings)
        assert torch.equal(result, latents(plain, **settings)) and not torch.equal(result, before)
    finally:
        layer.weight = original
    assert torch.equal(latents(pipe, **settings), before)


def test_not_enough_memory_for_a_capture(components: Components) -> None:
    """With the memory of the GPU occupied, the call succeeds without graphs or raises; afterwards graphs work again."""
    pipe = pipeline(components)
    expected = latents(pipe, width=256, height=256)
    free, _ = torch.cuda.mem_get_info(DEVICE)
    ballast = torch.empty(max(free - 300 * 2**20, 0), dtype=torch.uint8, device=DEVICE)
    try:
        with heard():
            pipe("a cat", seed=1, num_inference_steps=1, width=1024, height=1024, output_type="latent")
    except FastsdError as error:
        assert "not enough memory" in str(error)  # the eager run does not fit either
    finally:
        del ballast
        torch.cuda.empty_cache()
    pipe.graphs.forget()
    assert torch.equal(latents(pipe, width=256, height=256), expected) and len(pipe.graphs) == 2  # text and step


def test_after_a_capture_that_fails_the_next_one_works() -> None:
    """The caller's stream is current, and memory that was allocated inside goes back to the driver."""
    recorder, x = CudaRecorder(DEVICE), torch.ones(2**26, device=DEVICE)
    stream = torch.cuda.current_stream(DEVICE)
    torch.cuda.synchronize(DEVICE)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(DEVICE)

    def looks_at_the_device() -> None:
        y = x * 2
        if torch.cuda.is_current_stream_capturing():
            y.sum().item()

    with pytest.raises(RuntimeError):
        recorder.record(looks_at_the_device)
    assert torch.cuda.current_stream(DEVICE) == stream
    recorder.free()
    assert torch.cuda.memory_reserved(DEVICE) <= before
    row = x[:1024]
    replay = recorder.record(lambda: row @ row.view(-1, 1))
    x.fill_(2.0)
    assert replay().item() == 4096.0


def test_freed_memory_is_available() -> None:
    """Memory in PyTorch's cache counts, although the driver does not report it as free."""
    torch.cuda.empty_cache()
    before = memory.available(DEVICE) or 0
    ballast = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    assert (memory.available(DEVICE) or 0) <= before - 2**30
    del ballast
    assert torch.cuda.mem_get_info(DEVICE)[0] <= before - 2**30
    assert (memory.available(DEVICE) or 0) >= before - 2**20


def test_the_graphs_of_five_resolutions_share_memory(components: Components) -> None:
    """The memory exceeds that of the largest resolution by at most a tenth."""
    sizes = [(512, 512), (512, 448), (448, 512), (512, 384), (384, 512)]
    pipe = pipeline(components)
    peaks = []
    for width, height in sizes:
        pipe("a cat", seed=1, num_inference_steps=2, width=width, height=height)
        peaks.append(torch.cuda.memory_reserved(DEVICE))
    assert peaks[-1] <= 1.1 * peaks[0], [f"{peak / 2**30:.2f} GiB" for peak in peaks]
