"""The stage `adversarial`: a checkpoint distilled to a few steps, in the manner of adversarial diffusion distillation
(Sauer et al. 2023)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastsd.errors import FastsdError
from fastsd.model.unet import UNet
from fastsd.sampling.advance import begin, model_input, step, timestep
from fastsd.sampling.build import build
from fastsd.sampling.table import COLUMNS
from fastsd.text.encode import TextFeatures
from fastsd.train.discriminator import FeatureDiscriminator, hinge, unet_maps
from fastsd.train.grids import rows_of_images
from fastsd.train.images import RowOrder
from fastsd.train.noising import NoiseLevels, noised
from fastsd.train.parts import Part
from fastsd.train.stage import Batch, Metrics
from fastsd.train.tuning.loaded import LoadedSettings, LoadedStage, TextSettings
from fastsd.train.tuning.pairs import SAMPLER, Pairs, PairSettings, cached_pairs
from fastsd.weights import save_folder

SHOWN = 10  # columns of a sample grid


@dataclass(frozen=True)
class JudgeSettings:
    """The discriminator on the teacher's features. It learns from the first step on.

    Attributes:
        weight: of its verdict; at 1 it pulls as hard at the student's samples as the teacher's samples do.
        start: the step from which on its verdict counts.
        channels: of its heads.
        r1: weight of the gradient penalty on real samples (Mescheder et al. 2018, equation 9), on the features as in
            Sauer et al. 2023, equation 4; 0: none.
        levels: between which shares of the timesteps samples are noised before they are judged. Low ones show details,
            high ones the layout.
    """

    weight: float = 1.0
    start: int = 0
    channels: int = 64
    r1: float = 0.0
    levels: tuple[float, float] = (0.0, 0.7)

    def check(self) -> None:
        """Raises FastsdError where a value is none that it could have."""
        low, high = self.levels
        if not 0 <= low < high <= 1:
            raise FastsdError("two shares are needed, from 0 to 1, the first below the second",
                              argument="discriminator.levels", value=list(self.levels))  # fmt: skip
        for name, least in (("weight", 0), ("start", 0), ("channels", 2), ("r1", 0)):
            if getattr(self, name) < least:
                raise FastsdError(
                    f"it should be at least {least}", argument=f"discriminator.{name}", value=getattr(self, name)
                )


@dataclass(frozen=True)
class AdversarialSettings(LoadedSettings):
    """What the student learns.

    Attributes:
        steps: of the sampler with which the student is trained and exported. It learns to do with fewer, too.
        distill: weight of the distance to the teacher's samples.
    """

    text: TextSettings = TextSettings(empty=0.0)
    steps: int = 2
    distill: float = 1.0
    pairs: PairSettings = PairSettings()
    discriminator: JudgeSettings = JudgeSettings()

    def check(self) -> None:
        super().check()
        if not 1 <= self.steps <= 8:
            raise FastsdError("it should be from 1 to 8", argument="steps", value=self.steps)
        if not self.distill > 0:
            raise FastsdError("it should be above 0", argument="distill", value=self.distill)
        self.pairs.check()
        self.discriminator.check()


class AdversarialStage(LoadedStage):
    """Trains a copy of the checkpoint's UNet, the student, and a discriminator on the features of the frozen original.

    The student samples from noise in 1 to `steps` steps. What it makes in the last of them should be what the teacher
    makes of the same noise in many steps with guidance, and the discriminator should take it for an image of the data.
    Sauer et al. 2023 let the teacher denoise a noised sample of the student once instead; the same noise as the start
    of both (as in Yin et al. 2024, "One-step diffusion with distribution matching distillation", equation 9) needs no
    more than the pairs made before training.
    """

    name = "adversarial"
    table = AdversarialSettings
    stream = "adversarial"
    settings: AdversarialSettings
    pairs: Pairs

    def build(self) -> None:
        super().build()
        components, judge = self.components, self.settings.discriminator
        if judge.weight:
            text = components.text_encoders[-1].config
            pooled = text.projection_dim or text.hidden_size
            widths = [*components.unet.skip_channels[1:], components.unet.config.block_out_channels[-1]]
            self.discriminator = FeatureDiscriminator(widths, pooled, judge.channels).to(self.job.device)
            self.trained["discriminator"] = self.discriminator

    def check_checkpoint(self) -> None:
        scheduler = replace(self.components.scheduler, sampler=SAMPLER, schedule="default", timestep_spacing="trailing")
        self.scheduler, self.sampling = scheduler, build(SAMPLER, self.settings.steps, scheduler)
        self.alpha_bars = NoiseLevels(scheduler).alpha_bars.float()

    def make(self) -> nn.Module:
        student = self.components.unet
        # Nothing of the teacher is trained, so its weights may have the dtype of its products.
        self.teacher: UNet = copy.deepcopy(student).to(torch.bfloat16 if self.job.bf16 else torch.float32)
        return student.float().requires_grad_(True)

    def prepare(self) -> None:
        super().prepare()
        self.pairs = cached_pairs(self.teacher, self, self.settings.pairs)

    @cached_property
    def pair_order(self) -> RowOrder:
        """The order of the pairs; `order` is that of the real images."""
        rows = np.arange(len(self.pairs.texts), dtype=np.int64)
        return RowOrder([rows], self.job.settings.seed, self.fit.validate_share)

    def batch(self, part: Part) -> Batch:
        random, settings = part.random, self.settings
        rows = self.pair_order.rows(part)
        batch: Batch = {
            "texts": [self.pairs.texts[row] for row in rows],
            "noise": self.pairs.noise(rows),
            "sample": self.pairs.samples[torch.from_numpy(rows)].float(),
            "calls": settings.steps if part.validation else int(random.numpy.integers(settings.steps)) + 1,
        }
        if self._judges(part):
            real = self.rows(part)
            batch["real"] = self.scaled(self.latents.raw(torch.from_numpy(real), random.torch))
            batch["real_texts"] = [self.caption(int(row), random.numpy, settings.text.empty) for row in real]
            for name in ("sample", "real"):
                low, high = (share * len(self.alpha_bars) for share in settings.discriminator.levels)
                times = low + (high - low) * torch.rand(
                    part.size, generator=random.torch, dtype=torch.float32, device="cpu"
                )
                batch[f"{name}_t"] = times.long().clamp_max(len(self.alpha_bars) - 1)
                batch[f"{name}_noise"] = torch.randn(
                    batch[name].shape, generator=random.torch, dtype=torch.float32, device="cpu"
                )
        device = self.job.device
        return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}

    def _judges(self, part: Part) -> bool:
        """Whether the discriminator takes part: not in the validation."""
        return bool(self.settings.discriminator.weight) and not part.validation

    def loss(self, trained: str, batch: Batch, part: Part) -> tuple[torch.Tensor, Metrics]:
        """The student's: the squared distance to the teacher's samples, and what the discriminator adds."""
        if trained == "discriminator":
            return self._judge(batch, part)
        text = self.captions(batch["texts"])
        made = self.student_sample(batch["noise"], text, batch["calls"])
        distance = (made - batch["sample"]).square().mean()
        total = self.settings.distill * distance
        metrics = {"distill": distance.item()}
        if not self._judges(part):
            return total, metrics
        judge = self.settings.discriminator
        pulls = part.step >= judge.start
        maps = self._maps(made if pulls else made.detach(), batch, "sample", text)
        batch["maps"], batch["pooled"] = [x.detach() for x in maps], text.pooled
        if pulls:
            verdicts = self.discriminator(maps, batch["sample_t"], text.pooled)
            adversarial = -torch.stack([verdict.mean() for verdict in verdicts]).mean()
            # Both gradients are taken at the sample, so that the way through the teacher is gone back once.
            (own,) = torch.autograd.grad(total, made, retain_graph=True)
            (pull,) = torch.autograd.grad(adversarial, made)
            weight = judge.weight * own.norm() / (pull.norm() + 1e-8)
            total = total + weight * (adversarial.detach() + ((made - made.detach()) * pull).sum())
            metrics |= {"fooled": -adversarial.item(), "gan_weight": weight.item()}
        return total, metrics

    def _judge(self, batch: Batch, part: Part) -> tuple[torch.Tensor, Metrics]:
        """The discriminator's own loss, with what the student's left in the batch."""
        text, r1 = self.captions(batch["real_texts"]), self.settings.discriminator.r1
        with torch.no_grad():
            maps = self._maps(batch["real"], batch, "real", text)
        maps = [x.float().requires_grad_(r1 > 0) for x in maps]
        real = self.discriminator(maps, batch["real_t"], text.pooled)
        fake = self.discriminator(batch["maps"], batch["sample_t"], batch["pooled"])
        value = torch.stack([hinge(a, b) for a, b in zip(real, fake)]).mean()
        right = [((a > 0).float().mean() + (b < 0).float().mean()).item() / 2 for a, b in zip(real, fake)]
        metrics = {"judge": value.item(), "judge_right": sum(right) / len(right)}
        if r1:
            total = torch.stack([verdict.mean((1, 2, 3)).sum() for verdict in real]).sum()
            gradients = torch.autograd.grad(total, maps, create_graph=True)
            penalty = torch.stack([g.square().sum((1, 2, 3)).mean() for g in gradients]).sum()
            value, metrics["r1"] = value + r1 * penalty, penalty.item()
        return value, metrics

    def _maps(self, x: torch.Tensor, batch: Batch, name: str, text: TextFeatures) -> list[torch.Tensor]:
        """The teacher's maps of latents `x` with the noise that the batch holds for them."""
        t = batch[f"{name}_t"]
        alpha_bar = self.alpha_bars.to(x.device)[t][:, None, None, None]
        noisy = noised(x, batch[f"{name}_noise"], alpha_bar)
        dtype = self.teacher.conv_in.weight.dtype
        added = self.added(text, self.own_sizes(x).to(x.device))
        with torch.autocast(x.device.type, enabled=False):
            return unet_maps(self.teacher, noisy.to(dtype), t.float(), text.context.to(dtype), added)

    def student_sample(self, noise: torch.Tensor, text: TextFeatures, calls: int) -> torch.Tensor:
        """What the student makes of `noise` in `calls` calls, `[B, h, w, C]` fp32: the clean latent that it sees in
        the last of them, or after all the sampler's steps what that leaves.

        Gradients are those of the last call alone.
        """
        unet, state = self.components.unet, begin(self.sampling, noise)
        added = self.added(text, self.own_sizes(noise).to(noise.device))

        def call() -> torch.Tensor:
            t = noise.new_full((len(noise),), timestep(state))
            return unet(model_input(state), t, text.context.float(), added).float()

        with torch.no_grad(), self.job.autocast():
            for _ in range(calls - 1):
                step(state, call())
        row = dict(zip(COLUMNS, map(float, self.sampling.rows[state.index])))
        clean = row["p"] * state.x + row["q"] * call()
        return clean if calls < len(self.sampling) else row["a"] * state.x + row["b0"] * clean

    @torch.no_grad()
    def grid(self) -> Image.Image:
        """The teacher's samples above, below them what the student makes of the same noise in 1 to `steps` steps."""
        order = self.pair_order
        rows = (order.validation if len(order.validation[0]) else order.training)[0][:SHOWN]
        text = self.captions([self.pairs.texts[row] for row in rows])
        noise = self.pairs.noise(rows).to(self.job.device)
        latents = [self.pairs.samples[torch.from_numpy(rows)].float().to(self.job.device)]
        latents += [self.student_sample(noise, text, calls + 1) for calls in range(self.settings.steps)]
        images = [np.concatenate([self.codec.decode(one, False) for one in row.split(1)]) for row in latents]
        return rows_of_images([torch.from_numpy(row).float() / 127.5 - 1 for row in images])

    def export(self, folder: Path) -> bool:
        """Write the model as an fp16 checkpoint folder, which samples in `steps` steps by its own defaults."""
        height, width = self.job.images.side
        defaults: dict[str, Any] = {
            "num_inference_steps": self.settings.steps,
            "guidance_scale": 1.0,
            "sampler": SAMPLER,
            "schedule": "default",
            "width": width,
            "height": height,
        }
        components = self.components
        save_folder(
            replace(components, scheduler=self.scheduler, defaults=components.defaults | defaults, few_step=None),
            folder,
            torch.float16,
        )
        return True
