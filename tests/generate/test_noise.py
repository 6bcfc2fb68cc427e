"""Noise as fastsd draws it, and as A1111, ComfyUI and diffusers draw theirs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastsd.errors import FastsdError
from fastsd.generate.noise import CpuGenerator, Noise, NoisePlan, of_image, put_into_middle, slerp
from fastsd.generate.philox import Philox
from tests.support.pipelines import latents, tiny_pipeline

CPU, SHAPE = torch.device("cpu"), (4, 6, 10)
SEEDS = NoisePlan("cpu", (7, 8, 9))


def drawn(plan: NoisePlan, which: slice = slice(0, 3), shape: tuple[int, int, int] = SHAPE, more: int = 2) -> list:
    """The first noise and the samplers', as other programs hold them, `[N, C, h, w]`."""
    noise = Noise(plan, which, *shape, CPU)
    return [x.permute(0, 3, 1, 2) for x in (noise.first(), *(noise.sample() for _ in range(more)))]


@pytest.mark.parametrize(("source", "generator"), [("cpu", CpuGenerator), ("gpu", Philox)])
def test_each_image_has_a_generator(source: str, generator: type) -> None:
    """A1111, `ImageRNG`: "RNG: CPU", and "GPU" or "NV"; sampler's noise goes on where the first ended."""
    found = drawn(replace(SEEDS, source=source))
    for i, seed in enumerate(SEEDS.seeds):
        own = generator(seed)
        for noise in found:
            assert torch.equal(noise[i], own.randn(SHAPE))
        alone = drawn(replace(SEEDS, source=source, seeds=(seed,)), slice(0, 1))
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, found, strict=True))


@pytest.mark.parametrize("source", ["cpu", "gpu"])
def test_ensd_is_added_to_the_seed_of_the_samplers_noise(source: str) -> None:
    """A1111, `ImageRNG.first`: after it the generators are new ones, of seed + ENSD."""
    plain, moved = drawn(replace(SEEDS, source=source)), drawn(replace(SEEDS, source=source, ensd=31337))
    other = drawn(replace(SEEDS, source=source, seeds=tuple(seed + 31337 for seed in SEEDS.seeds)))
    assert torch.equal(moved[0], plain[0])
    assert torch.equal(moved[1], other[0]) and torch.equal(moved[2], other[1])


@pytest.mark.parametrize("shape", [SHAPE, (4, 9, 9), (4, 1, 1)])
def test_one_generator_for_the_whole_batch(shape: tuple[int, int, int]) -> None:
    """diffusers, `randn_tensor` with one generator; also where 4hw is no multiple of the 16 that PyTorch
    fills at once."""
    generator = torch.Generator().manual_seed(7)
    expected = [torch.randn((3, *shape), generator=generator) for _ in range(3)]
    plan = NoisePlan("batch", (7, 7, 7), count=3)
    for which in (slice(0, 3), slice(0, 2), slice(2, 4)):  # however they are split
        for noise, whole in zip(drawn(plan, which, shape), expected, strict=True):
            assert torch.equal(noise, whole[which])
    last = drawn(NoisePlan("batch", (7,), index=2, count=3), slice(0, 1), shape)
    assert all(torch.equal(noise, whole[2:]) for noise, whole in zip(last, expected, strict=True))


def test_comfyuis_first_noise_is_the_cpus_and_its_samplers_noise_the_gpus() -> None:
    """ComfyUI, comfy/sample.py `prepare_noise`: CPU. comfy/k_diffusion/sampling.py `default_noise_sampler`: a generator
    on the latent's device, of the same seed."""
    first, *steps = drawn(NoisePlan("comfy", (7, 7, 7), count=3))
    assert torch.equal(first, torch.randn((3, *SHAPE), generator=torch.manual_seed(7)))
    gpu = Philox(7)
    assert all(torch.equal(noise, gpu.randn((3, *SHAPE))) for noise in steps)


def test_variations_lie_on_the_arc_between_two_noises() -> None:
    """A1111, `ImageRNG.first` and `slerp`."""
    ends = [drawn(replace(SEEDS, seeds=seeds), more=0)[0] for seeds in ((7, 7, 7), (20, 21, 22))]
    for share in (0.0, 0.25, 1.0):
        plan = NoisePlan("cpu", (7, 7, 7), (20, 21, 22), share)
        found = drawn(plan)
        torch.testing.assert_close(found[0][1], slerp(share, ends[0][1], ends[1][1]))
        assert torch.equal(found[1], drawn(replace(SEEDS, seeds=(7, 7, 7)))[1])  # the samplers' noise is the seed's
    torch.testing.assert_close(slerp(0.0, ends[0][0], ends[1][0]), ends[0][0])
    torch.testing.assert_close(slerp(1.0, ends[0][0], ends[1][0]), ends[1][0])
    x, y = torch.tensor([[[3.0], [0.0]]]), torch.tensor([[[0.0], [5.0]]])  # one column of two numbers
    torch.testing.assert_close(slerp(0.5, x, y), 0.5**0.5 * (x + y))
    assert torch.equal(slerp(0.25, x, x), x)
    torch.testing.assert_close(slerp(0.25, x, 2 * x), 0.25 * x + 0.75 * 2 * x)  # the other way round, as A1111 has it


def test_variations_share_the_seed_and_number_the_second() -> None:
    """A1111, `process_images_inner`: all_seeds and all_subseeds."""
    settings = {"seed": 5, "subseed": 9, "subseed_strength": 0.1}
    assert [of_image(settings, i, 2) for i in range(2)] == [{"seed": 5, "subseed": 9}, {"seed": 5, "subseed": 10}]
    assert [of_image({"seed": 5}, i, 2) for i in range(2)] == [{"seed": 5}, {"seed": 6}]
    batch = {"seed": 5, "noise": "batch"}
    assert [of_image(batch, i, 2)["noise_index"] for i in range(2)] == [0, 1]
    assert of_image(batch, 1, 2) == {"seed": 5, "noise_index": 1, "noise_count": 2}


@pytest.mark.parametrize("size", [(48, 80), (16, 24), (96, 160), (80, 32), (48, 88)])
def test_the_middle_is_the_noise_of_an_image_of_another_size(size: tuple[int, int]) -> None:
    """A1111, `ImageRNG.first` with "Seed resize from": width and height in pixels."""
    height, width = size[0] // 8, size[1] // 8
    found = drawn(replace(SEEDS, resize_from=(size[1], size[0])), more=1)
    generator = torch.Generator().manual_seed(8)
    around = torch.randn(SHAPE, generator=torch.Generator().manual_seed(8))
    small = torch.randn((4, height, width), generator=torch.Generator().manual_seed(8))
    top, left = (SHAPE[1] - height) // 2, (SHAPE[2] - width) // 2
    for y in range(SHAPE[1]):
        for x in range(SHAPE[2]):
            inside = 0 <= y - top < height and 0 <= x - left < width
            if (top >= 0 or 0 <= y - top < height + top) and (left >= 0 or 0 <= x - left < width + left):
                expected = small[:, y - top, x - left] if inside else around[:, y, x]
                assert torch.equal(found[0][1][:, y, x], expected), (y, x)
    torch.randn(SHAPE, generator=generator)
    assert torch.equal(found[1][1], torch.randn(SHAPE, generator=generator))
    assert torch.equal(put_into_middle(small[None], around[None])[0], found[0][1])


def test_encoding_draws_from_the_stream_or_not_at_all() -> None:
    for source in ("cpu", "batch"):
        plan = NoisePlan(source, (7, 7), count=2)
        noise = Noise(plan, slice(0, 2), *SHAPE, CPU)
        each = Noise(plan, slice(0, 2), *SHAPE, CPU).encoding(each=True)
        assert torch.equal(each, Noise(plan, slice(0, 2), *SHAPE, CPU).first())
        once = CpuGenerator(7).randn(SHAPE).permute(1, 2, 0)  # a batch's generator encodes one image once
        assert torch.equal(noise.encoding(), each if source == "cpu" else torch.stack([once, once]))
        mean = Noise(replace(plan, from_mean=True), slice(0, 2), *SHAPE, CPU)
        assert not mean.encoding().any() and mean.encoding().shape == (2, 6, 10, 4)
        assert torch.equal(mean.first(), Noise(plan, slice(0, 2), *SHAPE, CPU).first())


def test_a_call_takes_each_by_its_name() -> None:
    pipe = tiny_pipeline()
    shape = (4, 8, 8)
    given = {
        "cpu": torch.stack([CpuGenerator(seed).randn(shape) for seed in (1, 2)]),
        "gpu": torch.stack([Philox(seed).randn(shape) for seed in (1, 2)]),
        "batch": CpuGenerator(1).randn((2, *shape)),
    }
    for name, noise in given.items():
        found = latents(pipe, noise=name, num_images_per_prompt=2)
        assert torch.equal(found, latents(pipe, latents=noise, num_images_per_prompt=2)), name
    whole = pipe("a cat", seed=1, noise="batch", num_images_per_prompt=3, batch_size=2, sampler="euler_a")
    assert whole.seeds == [1, 1, 1] and whole.own[2] == {"seed": 1, "noise_index": 2, "noise_count": 3}
    one = pipe("a cat", noise="batch", sampler="euler_a", **whole.own[2])
    np.testing.assert_array_equal(one.images[0], whole.images[2])
    varied = pipe("a cat", seed=1, subseed=4, subseed_strength=0.2, num_images_per_prompt=2)
    assert varied.own == [{"subseed": 4, "seed": 1}, {"subseed": 5, "seed": 1}]
    np.testing.assert_array_equal(varied.images[1], pipe("a cat", seed=1, subseed=5, subseed_strength=0.2).images[0])


def test_what_has_no_effect_is_refused() -> None:
    pipe = tiny_pipeline()
    with pytest.raises(FastsdError, match="^subseed: given without subseed_strength"):
        pipe("x", subseed=3)


@pytest.mark.parametrize("left", [{}, {"subseed": -1}])
def test_a_second_seed_left_to_chance_is_said_and_repeats_the_image(left: dict[str, int]) -> None:
    pipe, settings = tiny_pipeline(), {"seed": 1, "subseed_strength": 0.5, "num_inference_steps": 1}
    one, other = (pipe("a cat", **settings, **left) for _ in range(2))
    assert one.own[0]["subseed"] != other.own[0]["subseed"]
    again = pipe("a cat", **settings, subseed=one.own[0]["subseed"])
    np.testing.assert_array_equal(np.asarray(one.images[0]), np.asarray(again.images[0]))
    with pytest.raises(FastsdError, match="^noise_index: noise cpu draws for each image alone"):
        pipe("x", noise_index=3)
    with pytest.raises(FastsdError, match="^seed_resize_from is '7x512'; it should be a width and a height"):
        pipe("x", seed_resize_from="7x512")


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1])
def test_the_largest_seeds_are_pytorchs(seed: int) -> None:
    """PyTorch takes a seed as 64 bits: those from 2^63 on are its negative ones."""
    settings = {"noise": "cpu", "seed": seed, "subseed_strength": 0.0, "seed_resize_from": None}
    settings |= dict.fromkeys(("ensd", "noise_index", "noise_count", "subseed"))
    noise = Noise(NoisePlan.of(settings, 1, False), slice(0, 1), 4, 2, 3, torch.device("cpu")).first()
    expected = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(seed - 2**64))
    assert torch.equal(noise[0], expected.permute(1, 2, 0))


@pytest.mark.parametrize("source", ["cpu", "gpu", "comfy"])
def test_sums_with_the_largest_seed_begin_at_0_again(source: str) -> None:
    def drawn(**settings: int | float) -> list[torch.Tensor]:
        own = {"noise": source, "seed_resize_from": None, "subseed_strength": 0.5}
        own |= dict.fromkeys(("ensd", "noise_index", "noise_count"))
        noise = Noise(NoisePlan.of(own | settings, 2, False), slice(0, 2), 4, 2, 3, torch.device("cpu"))
        return [noise.first(), noise.sample()]

    most = 2**64 - 1
    varied = drawn(seed=1, subseed=most)[0]
    again = drawn(seed=1, subseed=0)[0]
    if source != "comfy":  # whose variation seed is one for all images
        assert torch.equal(varied[1], again[0])
    delayed, direct = drawn(seed=most, subseed=3, ensd=6), drawn(seed=5, subseed=3, ensd=2**64)
    assert torch.equal(delayed[1], direct[1]) and not torch.equal(delayed[0], direct[0])
