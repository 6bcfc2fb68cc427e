"""What a teacher makes of noise: the pairs of a starting noise and a finished sample that a student learns from."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastsd.errors import FastsdError
from fastsd.model.unet import UNet
from fastsd.sampling.advance import begin, model_input, step, timestep
from fastsd.sampling.build import build
from fastsd.train import checkpoint
from fastsd.train.images import Rows
from fastsd.train.latents import digest_of
from fastsd.train.tuning.captions import CaptionEncoder
from fastsd.train.tuning.loaded import LoadedStage

PAIRS_FILE = "pairs.pt"  # in the run's folder
SAMPLER = "ddim"  # deterministic: the noise decides the sample
AT_A_TIME = 64  # samples of a batch of 8 x 8 latents; of larger ones fewer
STREAM = 2  # keys the random choice of captions and noise


@dataclass(frozen=True)
class PairSettings:
    """The teacher's samples.

    Attributes:
        count: how many are made before training.
        steps: of DDIM; 0: the checkpoint's own.
        guidance: the guidance scale, which the student learns to do without; 0: the checkpoint's own.
    """

    count: int = 4000
    steps: int = 0
    guidance: float = 0.0

    def check(self) -> None:
        """Raises FastsdError where a value is none that it could have."""
        for name, low in (("count", 1), ("steps", 0), ("guidance", 0)):
            if getattr(self, name) < low:
                raise FastsdError(f"it should be at least {low}", argument=f"pairs.{name}", value=getattr(self, name))


@dataclass(frozen=True)
class Pairs:
    """Captions, and the latents `[N, h, w, C]` fp16 that the teacher made of them, as the UNet sees latents.

    Attributes:
        seed: of the noise that the teacher began with, see `noise`.
    """

    texts: list[str]
    samples: torch.Tensor
    seed: int
    key: str

    def noise(self, rows: Sequence[int] | Rows) -> torch.Tensor:
        """The starting noise of some pairs, fp32 on the CPU; each has a generator of its own."""
        shape = self.samples.shape[1:]
        drawn = []
        for row in rows:
            root = np.random.SeedSequence([self.seed, STREAM, int(row)])
            generator = torch.Generator("cpu").manual_seed(int(root.generate_state(1, np.uint64)[0] >> 1))
            drawn.append(torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu"))
        return torch.stack(drawn)


def cached_pairs(teacher: UNet, stage: LoadedStage, settings: PairSettings) -> Pairs:
    """The pairs of the run's folder, made anew where another teacher, other data or other settings made them."""
    job, defaults = stage.job, stage.pipe.defaults
    steps = settings.steps or int(defaults["num_inference_steps"])
    guidance = settings.guidance or float(defaults["guidance_scale"])
    digest = digest_of(teacher)
    digest.update(json.dumps([stage.latents.key, settings.count, steps, guidance, stage.settings.text.empty]).encode())
    key, path = digest.hexdigest(), job.out / PAIRS_FILE
    if path.is_file():
        found = Pairs(**checkpoint.load(path))
        if found.key == key:
            return found
    started = time.monotonic()
    job.report(f"the teacher makes {settings.count:,} samples in {steps} steps with guidance {guidance:g}")
    random = np.random.default_rng([job.settings.seed, STREAM])
    rows = random.integers(len(stage.latents), size=settings.count)
    texts = [stage.caption(int(row), random, stage.settings.text.empty) for row in rows]
    height, width = (side // stage.vae.config.downscale for side in job.images.side)
    shape = (settings.count, height, width, stage.components.unet.config.in_channels)
    pairs = Pairs(texts, torch.empty(shape, dtype=torch.float16, device="cpu"), job.settings.seed, key)
    size = max(1, AT_A_TIME * 64 // (height * width))
    chunks = np.split(np.arange(settings.count), range(size, settings.count, size))

    def make(chunk: Rows) -> None:
        job.check_stop()
        made = teach(teacher, stage, pairs.noise(chunk), [texts[row] for row in chunk], steps, guidance)
        pairs.samples[torch.from_numpy(chunk)] = made.half().cpu()

    job.workers.map(make, chunks)
    checkpoint.save(dict(vars(pairs)), path)
    job.report(f"made them in {(time.monotonic() - started) / 60:.1f} min")
    return pairs


@torch.no_grad()
def teach(
    teacher: UNet, stage: LoadedStage, noise: torch.Tensor, texts: list[str], steps: int, guidance: float
) -> torch.Tensor:
    """The teacher's samples `[B, h, w, C]` of `noise`, with classifier-free guidance (Ho and Salimans 2022)."""
    device, weight = stage.job.device, teacher.conv_in.weight
    state = begin(build(SAMPLER, steps, stage.components.scheduler), noise.to(device))
    guided = guidance != 1
    # Not `stage.captions`, which keeps what it encodes: a resumed run has the pairs' file, and would encode these
    # captions later, among the numerics of training.
    options = stage.settings.text
    encode = CaptionEncoder(stage.components, options.clip_skip, options.chunks, remembers=False)
    text = encode([*[""] * len(texts), *texts] if guided else texts)
    count = len(text.context)
    context = text.context.to(weight.dtype)
    added = stage.added(text, stage.own_sizes(noise).to(device)[:1].expand(count, -1))
    while not state.done:
        x = model_input(state).to(weight.dtype)
        inputs: Any = torch.cat([x, x]) if guided else x
        t = torch.full((count,), timestep(state), dtype=torch.float32, device=device)
        step(state, teacher(inputs, t, context, added), guidance)
    return state.x
