"""Where noise comes from: which generator, seeded how, for which of a call's images, in which order.

fastsd gives each image a CPU generator of its own. A1111, ComfyUI and diffusers draw in other ways, which `SOURCES`
states; docs/migration.md compares them.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fastsd.errors import FastsdError
from fastsd.generate.philox import Philox
from fastsd.parameters.kinds import MAX_SEED, RANDOM_SEED

SEEDS = MAX_SEED + 1  # sums of seeds count modulo this
FACTOR = 8  # A1111 takes pixels to latents by 8 for "Seed resize from"


class NormalGenerator(Protocol):
    """A stream of normal numbers."""

    def randn(self, shape: Sequence[int]) -> torch.Tensor:
        """The next numbers, fp32 on the CPU."""
        ...


class CpuGenerator:
    """PyTorch's CPU generator."""

    def __init__(self, seed: int):
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def randn(self, shape: Sequence[int]) -> torch.Tensor:
        return torch.randn(tuple(shape), generator=self._generator, dtype=torch.float32, device="cpu")


class GivenGenerator:
    """The caller's generator: it goes on from where it stood when the call began, and the caller's moves on with it.

    Each batch of a call, and each pass, starts from there: as with seeds, noise does not depend on the batches.
    """

    def __init__(self, given: torch.Generator, state: torch.Tensor):
        self._given, self._own = given, torch.Generator(given.device)
        self._own.set_state(state)

    def randn(self, shape: Sequence[int]) -> torch.Tensor:
        device = self._own.device
        noise = torch.randn(tuple(shape), generator=self._own, dtype=torch.float32, device=device)
        self._given.set_state(self._own.get_state())
        return noise.cpu()


@dataclass(frozen=True)
class NoiseSource:
    """One way to draw.

    Attributes:
        first: the generator of the noise that a run starts from.
        steps: the generator of the samplers' noise.
        batched: one generator draws for all images of a call at once, else each image has one of its own.
        restarts: the samplers' noise begins at its seed, else it goes on where the first noise ended.
    """

    first: type[CpuGenerator] | type[Philox]
    steps: type[CpuGenerator] | type[Philox]
    batched: bool = False
    restarts: bool = False


# cpu: fastsd, A1111's "CPU"; gpu: A1111's "GPU" and "NV"; batch: diffusers with one CPU generator; comfy: ComfyUI on
# CUDA, which draws the first noise on the CPU and the samplers' on the GPU.
SOURCES: dict[str, NoiseSource] = {
    "cpu": NoiseSource(CpuGenerator, CpuGenerator),
    "gpu": NoiseSource(Philox, Philox),
    "batch": NoiseSource(CpuGenerator, CpuGenerator, batched=True),
    "comfy": NoiseSource(CpuGenerator, Philox, batched=True, restarts=True),
}


@dataclass(frozen=True)
class NoisePlan:
    """The noise of all images of a call.

    Attributes:
        source: a key of `SOURCES`.
        seeds: of each image.
        subseeds: of each image's second noise; empty: there is none.
        subseed_strength: the share of the second noise.
        resize_from: `(width, height)` in pixels of the image whose noise is put into the middle, or None.
        ensd: added to the seeds for the samplers' noise; 0: that goes on where the first noise ended.
        index, count: with a batched source, the place of the first image in the noise, and for how many images that
            is drawn.
        from_mean: encoding an image draws no noise, else it draws before anything else.
        given: the caller's generators and their states, in place of seeds: one for all images, or one for each.
    """

    source: str
    seeds: tuple[int, ...]
    subseeds: tuple[int, ...] = ()
    subseed_strength: float = 0.0
    resize_from: tuple[int, int] | None = None
    ensd: int = 0
    index: int = 0
    count: int = 0
    from_mean: bool = False
    given: tuple[tuple[torch.Generator, torch.Tensor], ...] = ()

    @classmethod
    def of(cls, settings: Mapping[str, Any], images: int, from_mean: bool) -> NoisePlan:
        """The noise of a call with these settings for so many images."""
        own = [of_image(settings, i, images) for i in range(images)]
        varied = settings["subseed_strength"] or 0.0
        size = settings["seed_resize_from"]
        width, height = map(int, size.split("x")) if size else (0, 0)
        return cls(
            source=settings["noise"],
            seeds=tuple(one["seed"] for one in own),
            subseeds=tuple(one["subseed"] for one in own) if varied else (),
            subseed_strength=varied,
            resize_from=(width, height) if size else None,
            ensd=settings["ensd"] or 0,
            index=settings["noise_index"] or 0,
            count=max(settings["noise_count"] or 0, (settings["noise_index"] or 0) + images),
            from_mean=from_mean,
            given=tuple((one, one.get_state()) for one in settings.get("generator") or ()),
        )


def check_place(settings: Mapping[str, Any]) -> None:
    """Refuse a place in noise that is drawn for several images, where it is not so drawn, or has fewer places.

    Raises:
        FastsdError: it names the setting.
    """
    for name in ("noise_index", "noise_count"):
        if settings[name] is not None and not SOURCES[settings["noise"]].batched:
            raise FastsdError(f"{{noise}} {settings['noise']} draws for each image alone", argument=name)
    index, count = settings["noise_index"], settings["noise_count"]
    if index is not None and count is not None and index >= count:
        raise FastsdError(
            f"it should be below {{noise_count}}, {count}: the first is 0", argument="noise_index", value=index
        )


def fill_subseed(subseed: int | None, strength: float | None) -> int | None:
    """The seed of the second noise; a random one where there is such noise and its seed is left to chance."""
    if subseed not in (None, RANDOM_SEED):
        return subseed
    return secrets.randbelow(2**32) if strength else None


def of_image(settings: Mapping[str, Any], i: int, images: int) -> dict[str, Any]:
    """The settings that image `i` of a call of `images` has for itself.

    A seed each, or that of its generator; as in A1111, with a variation strength one seed for all and a variation seed
    each; with a batched source one seed and one variation seed for all, and a place in the noise each.
    """
    seed, subseed = settings["seed"], settings.get("subseed")
    generators = settings.get("generator") or ()
    varied = bool(settings.get("subseed_strength")) and subseed is not None
    batched = SOURCES[settings.get("noise") or "cpu"].batched
    own: dict[str, Any] = {"subseed": ((subseed or 0) + (0 if batched else i)) % SEEDS} if varied else {}
    if len(generators) > 1:
        return own | {"seed": generators[i].initial_seed()}
    if batched:
        index = settings.get("noise_index") or 0
        place = {"noise_index": index + i, "noise_count": max(settings.get("noise_count") or 0, index + images)}
        return own | place | {"seed": seed}
    return own | {"seed": seed if varied else seed + i}


class Noise:
    """The noise of some images of a call. Without a batched source it depends on the image's seeds alone: not on the
    device, the batch, or the place in the batch.

    Args:
        plan: of the whole call.
        which: the images.
        channels, height, width: of the latents.
    """

    def __init__(
        self, plan: NoisePlan, which: slice, channels: int, height: int, width: int, device: torch.device
    ) -> None:
        self.plan, self.device = plan, device
        self.source = SOURCES[plan.source]
        self.shape = (channels, height, width)
        if self.source.batched:  # one generator; `rows` are its images that are kept
            self.rows = slice(plan.index + which.start, plan.index + min(which.stop, len(plan.seeds)))
            which = slice(0, 1)
        self.seeds, self.subseeds = plan.seeds[which], plan.subseeds[which]
        self.generators: list[NormalGenerator] = [GivenGenerator(*given) for given in plan.given[which]]
        self.generators = self.generators or [self.source.first(seed) for seed in self.seeds]

    def first(self) -> torch.Tensor:
        """The noise that a run starts from, `[N, h, w, C]` fp32."""
        noise = [self._first(i) for i in range(len(self.generators))]
        if self.plan.ensd or self.source.restarts:
            self.generators = [self.source.steps((seed + self.plan.ensd) % SEEDS) for seed in self.seeds]
        return self._on_device(noise)

    def sample(self) -> torch.Tensor:
        """The next noise of every image, `[N, h, w, C]` fp32."""
        return self._on_device([self._draw(generator, self.shape) for generator in self.generators])

    def encoding(self, each: bool = False) -> torch.Tensor:
        """The noise with which an image is encoded, `[N, h, w, C]` fp32: zeros where the latent is the mean.

        A generator of the batch encodes one image once, whatever the number of images that start from it, as in
        diffusers (`StableDiffusionImg2ImgPipeline.prepare_latents`).

        Args:
            each: an image for each latent.
        """
        count = self.rows.stop - self.rows.start if self.source.batched else len(self.generators)
        if not self.plan.from_mean:
            if each or not self.source.batched:
                return self.sample()
            return self._on_device([self.generators[0].randn(self.shape)[None]]).expand(count, -1, -1, -1)
        return torch.zeros(count, *self.shape[1:], self.shape[0], dtype=torch.float32, device=self.device)

    def _draw(self, generator: NormalGenerator, shape: tuple[int, ...]) -> torch.Tensor:
        """`[n, C, h, w]`: of one image, or of those of a batch that are kept."""
        if not self.source.batched:
            return generator.randn(shape)[None]
        return generator.randn((self.plan.count, *shape))[self.rows]

    def _first(self, i: int) -> torch.Tensor:
        """The first noise of a generator, as A1111's `ImageRNG.first` in modules/rng.py makes it."""
        plan, seed = self.plan, self.seeds[i]
        size = plan.resize_from
        shape = self.shape if size is None else (self.shape[0], size[1] // FACTOR, size[0] // FACTOR)
        whole = shape == self.shape
        noise = self._draw(self.generators[i] if whole else self.source.first(seed), shape)
        if self.subseeds:
            other = self._draw(self.source.first(self.subseeds[i]), shape)
            noise = torch.stack([slerp(plan.subseed_strength, *pair) for pair in zip(noise, other, strict=True)])
        return noise if whole else put_into_middle(noise, self._draw(self.generators[i], self.shape))

    def _on_device(self, noise: Sequence[torch.Tensor]) -> torch.Tensor:
        maps = torch.cat(list(noise)).permute(0, 2, 3, 1).contiguous()
        # A copy from pinned memory does not wait, and PyTorch keeps that memory until the copy is done.
        return maps.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else maps


def slerp(share: float, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Between two noises `[C, h, w]` along a great circle (Shoemake 1985, slerp), with A1111's two habits
    (modules/rng.py, `slerp`): each column of h numbers is a vector of its own, and nearly equal noises are mixed the
    other way round. Columns on one line have no circle between them, such as those of one number; they are mixed
    linearly, where A1111 divides by zero.
    """
    unit_low, unit_high = (x / torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (low, high))
    dot = (unit_low * unit_high).sum(1)
    if dot.mean() > 0.9995:
        return low * share + high * (1 - share)
    angle = torch.acos(dot)
    sine = torch.sin(angle)
    weights = (torch.where(sine > 0, torch.sin(part * angle) / sine, part) for part in (1.0 - share, share))
    return sum((w[:, None] * x for w, x in zip(weights, (low, high), strict=True)), torch.zeros_like(low))


def put_into_middle(noise: torch.Tensor, around: torch.Tensor) -> torch.Tensor:
    """`around` `[n, C, h, w]` with the middle of `noise` in its middle (A1111's "Seed resize from")."""
    result = around.clone()
    target, source = [], []
    for ours, theirs in zip(around.shape[2:], noise.shape[2:], strict=True):
        gap = (ours - theirs) // 2  # A1111 rounds down, also where the noise is the larger
        size = theirs if gap >= 0 else theirs + 2 * gap
        target.append(slice(max(gap, 0), max(gap, 0) + size))
        source.append(slice(max(-gap, 0), max(-gap, 0) + size))
    result[..., target[0], target[1]] = noise[..., source[0], source[1]]
    return result
