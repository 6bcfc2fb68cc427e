"""CUDA's own graphs: what tests/test_graph.py asks of tapes, at sizes that matter, and what only a GPU can show."""

from __future__ import annotations

import gc
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsd import Control
from fastsd.components import Components
from fastsd.config import SD15_UNET, SD_VAE, CLIPConfig, ControlNetConfig, SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.graph import CudaRecorder, Graphs
from fastsd.model.clip import TextEncoder
from fastsd.model.controlnet import ControlNet
from fastsd.model.tokenizer import Tokenizer
from fastsd.model.unet import UNet
from fastsd.model.vae import AutoencoderKL
from fastsd.pipeline import Pipeline
from fastsd.runtime import memory
from fastsd.sampling.samplers import SAMPLERS

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def components() -> Components:
    """SD1.5 at full size, with random weights."""
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
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a capture that fails warns
        return pipe(prompt, **settings).images


def test_graphs_change_no_bit(components: Components) -> None:
    plain, pipe = pipeline(components, graphs=False), pipeline(components)
    for change in ({}, {"prompt": "a dog"}, {"seed": 2}, {"guidance_scale": 3.0}, {"guidance_scale": 1.0}, {}):
        assert torch.equal(latents(pipe, **change), latents(plain, **change)), change
    for sampler in SAMPLERS:
        assert torch.equal(latents(pipe, sampler=sampler), latents(plain, sampler=sampler)), sampler
    found, wanted = (p("a cat", seed=1, num_inference_steps=2, output_type="pt").images for p in (pipe, plain))
    assert torch.equal(found, wanted)


def controls_of(components: Components, count: int, seed: int = 0) -> list[Control]:
    """ControlNets of random weights, the first active early and the second late."""
    torch.manual_seed(seed)
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (256, 256, 3), dtype=np.uint8))
    found = []
    for i in range(count):
        with DEVICE:
            net = ControlNet(ControlNetConfig(components.unet.config, (16, 32, 96, 256)))
        net.half().eval().requires_grad_(False).to(memory_format=torch.channels_last)
        found.append(Control(net, picture, weight=0.5, start=0.3 * i, end=0.7 + 0.3 * i))
    return found


def test_controlnets_that_come_and_go(components: Components) -> None:
    plain, pipe = pipeline(components, graphs=False), pipeline(components)
    controls = controls_of(components, 2)
    for sampler in ("euler_a", "dpm++2m", "heun"):
        settings = {"controls": controls, "sampler": sampler, "num_inference_steps": 4}
        found = latents(pipe, **settings)
        assert torch.equal(found, latents(plain, **settings))
        assert not torch.equal(found, latents(pipe, **(settings | {"controls": []})))


def test_a_graph_keeps_no_controlnet(components: Components) -> None:
    """Another one may then lie where it was: the graph is found again, or it is not, and the picture is right."""
    plain, pipe = pipeline(components, graphs=False), pipeline(components)
    taken = []
    for seed in range(4):
        controls = controls_of(components, 1, seed)
        assert torch.equal(latents(pipe, controls=controls), latents(plain, controls=controls))
        taken.append(torch.cuda.memory_allocated(DEVICE))
        del controls
        gc.collect()
    weights = sum(p.nbytes for p in controls_of(components, 1)[0].net.parameters())
    assert taken[-1] - taken[0] < weights / 2, [f"{n / 2**20:.0f} MiB" for n in taken]


def test_the_hundredth_replay_is_the_first(components: Components) -> None:
    pipe = pipeline(components)
    first = latents(pipe)
    count = len(pipe.graphs)
    for _ in range(34):  # of three steps each
        assert torch.equal(latents(pipe), first)
    assert len(pipe.graphs) == count


def test_eviction_and_capturing_again(components: Components) -> None:
    pipe = pipeline(components, max_graphs=2)
    small = latents(pipe, width=256, height=256)
    latents(pipe, width=320, height=256)
    assert torch.equal(latents(pipe, width=256, height=256), small)


def test_weights_changed_in_place(components: Components) -> None:
    """A hundred changes, as LoRAs come and go; the graph reads the weights where they always were."""
    plain, pipe = pipeline(components, graphs=False), pipeline(components)
    weight = components.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_qkv.weight
    address, original = weight.data_ptr(), weight.clone()
    settings = {"num_inference_steps": 1, "width": 256, "height": 256}
    first = latents(pipe, **settings)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for i in range(100):
        weight.copy_(original + 0.1 * torch.randn(weight.shape, generator=generator, device=DEVICE).half())
        found = latents(pipe, **settings)
        if i % 10 == 0:
            assert torch.equal(found, latents(plain, **settings)) and not torch.equal(found, first)
    weight.copy_(original)
    assert torch.equal(latents(pipe, **settings), first) and weight.data_ptr() == address


def test_two_threads(components: Components) -> None:
    pipe, found = pipeline(components), {}
    wanted = [latents(pipe, seed=seed) for seed in range(6)]

    def draw(seeds: range) -> None:
        for seed in seeds:
            found[seed] = pipe("a cat", seed=seed, num_inference_steps=3, output_type="latent").images

    threads = [threading.Thread(target=draw, args=(range(start, 6, 2),)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], wanted[seed]) for seed in range(6))


def test_threads_with_streams_of_their_own(components: Components) -> None:
    """Callers' work is ordered on the device too, not on the host alone."""
    pipe, found = pipeline(components), {}
    settings: dict[str, Any] = {"num_inference_steps": 3, "width": 256, "height": 256, "output_type": "latent"}
    wanted = [pipe("a cat", seed=seed, **settings).images for seed in range(8)]
    torch.cuda.synchronize(DEVICE)

    def draw(seeds: range) -> None:
        with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
            for seed in seeds:
                found[seed] = pipe("a cat", seed=seed, **settings).images

    threads = [threading.Thread(target=draw, args=(range(start, 8, 2),)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize(DEVICE)
    assert all(torch.equal(found[seed], wanted[seed]) for seed in range(8))


def test_two_streams_of_one_shape_in_turn(components: Components) -> None:
    pipe = pipeline(components)
    settings: dict[str, Any] = {"num_inference_steps": 4, "sampler": "dpm++2m_sde", "width": 256, "height": 256}
    wanted = [latents(pipe, seed=seed, **settings) for seed in (1, 2)]
    streams = [pipe.stream("a cat", seed=seed, output_type="latent", **settings) for seed in (1, 2)]
    for pair in zip(*streams):
        last = pair
        latents(pipe, "a call between", seed=5, **settings)
    for step, want in zip(last, wanted, strict=True):
        assert step.result is not None and torch.equal(step.result.images, want)


PICTURE = Image.effect_noise((512, 512), 64).convert("RGB")


@pytest.mark.parametrize(
    "arguments",
    [
        {"sampler": "euler"},
        {"sampler": "euler_a"},  # draws noise on the CPU in every row
        {"guidance_rescale": 0.7},
        {"image": PICTURE, "mask_image": PICTURE.convert("L"), "strength": 1.0},
    ],
    ids=["euler", "euler_a", "rescaled", "inpainting"],
)
def test_a_step_asks_the_host_for_nothing_and_takes_no_memory(
    components: Components, arguments: dict[str, Any]
) -> None:
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
    assert torch.cuda.memory_allocated(DEVICE) - before < 2**20  # a step's latents, for whoever looks at them


def test_weights_that_take_the_place_of_others_are_captured_anew(components: Components) -> None:
    plain, pipe = pipeline(components, graphs=False), pipeline(components)
    settings = {"width": 256, "height": 256}
    before = latents(pipe, **settings)
    layer = components.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_qkv
    original = layer.weight
    layer.weight = torch.nn.Parameter(original * 1.5, requires_grad=False)
    try:
        found = latents(pipe, **settings)
        assert torch.equal(found, latents(plain, **settings)) and not torch.equal(found, before)
    finally:
        layer.weight = original
    assert torch.equal(latents(pipe, **settings), before)


def test_too_little_memory_for_a_capture(components: Components) -> None:
    """The rest of the GPU is taken; the capture fails, says so, or succeeds without the other graphs; then all is well
    again."""
    pipe = pipeline(components)
    wanted = latents(pipe, width=256, height=256)
    free, _ = torch.cuda.mem_get_info(DEVICE)
    ballast = torch.empty(max(free - 300 * 2**20, 0), dtype=torch.uint8, device=DEVICE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe("a cat", seed=1, num_inference_steps=1, width=1024, height=1024, output_type="latent")
    except FastsdError as error:
        assert "not enough memory" in str(error)  # not even the eager run fits
    finally:
        del ballast
        torch.cuda.empty_cache()
    pipe.graphs.forget()
    assert torch.equal(latents(pipe, width=256, height=256), wanted) and len(pipe.graphs) == 2  # text and step


def test_memory_that_was_given_back_is_free() -> None:
    """As long as PyTorch keeps it for later, the driver does not count it."""
    torch.cuda.empty_cache()
    before = memory.available(DEVICE) or 0
    ballast = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    assert (memory.available(DEVICE) or 0) <= before - 2**30
    del ballast
    assert torch.cuda.mem_get_info(DEVICE)[0] <= before - 2**30
    assert (memory.available(DEVICE) or 0) >= before - 2**20


def test_five_resolutions_in_a_row(components: Components) -> None:
    """With all their graphs the memory grows by at most a tenth over what the largest needs alone."""
    sizes = [(512, 512), (512, 448), (448, 512), (512, 384), (384, 512)]
    pipe = pipeline(components)
    peaks = []
    for width, height in sizes:
        pipe("a cat", seed=1, num_inference_steps=2, width=width, height=height)
        peaks.append(torch.cuda.memory_reserved(DEVICE))
    assert peaks[-1] <= 1.1 * peaks[0], [f"{peak / 2**30:.2f} GiB" for peak in peaks]
