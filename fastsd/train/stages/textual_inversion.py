"""The stage `textual_inversion`: vectors for a new word, with all networks as they are (Gal et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastsd.components import TextualInversion
from fastsd.errors import FastsdError
from fastsd.train.tuning.stage import TuningSettings, TuningStage
from fastsd.weights.adapters.embeddings import write_embedding


@dataclass(frozen=True)
class InversionSettings(TuningSettings):
    """What is learned.

    Attributes:
        token: the new word.
        initial: a text whose tokens' vectors it begins with, one after another, the last one repeated.
        vectors: how many the word has.
        templates: texts with `{}` for the word, of which each sample gets one; none: the images' captions, which hold
            the word.
    """

    token: str = "<concept>"
    initial: str = ""
    vectors: int = 1
    templates: tuple[str, ...] = (
        "a photo of {}",
        "a rendering of {}",
        "a close-up photo of {}",
        "an image of {}",
        "{}",
    )

    def check(self) -> None:
        super().check()
        if not self.token.strip() or len(self.token) > 200 or self.token != self.token.strip():
            raise FastsdError("it should be a word of 1 to 200 characters", argument="token", value=self.token)
        if not self.initial.strip():
            raise FastsdError(
                "it should be a word that is close to the concept, such as toy", argument="initial", value=self.initial
            )
        if not 1 <= self.vectors <= 75:
            raise FastsdError("it should be from 1 to 75", argument="vectors", value=self.vectors)
        for template in self.templates:
            if template.count("{}") != 1:
                raise FastsdError("it should hold {} once, where the word stands", argument="templates", value=template)


class LearnedVectors(nn.Module):
    """The vectors of each text encoder, `[n, hidden]`."""

    def __init__(self, start: list[torch.Tensor]):
        super().__init__()
        self.vectors = nn.ParameterList([nn.Parameter(one.detach().float().clone()) for one in start])


class InversionStage(TuningStage):
    """Trains the vectors of one word."""

    name = "textual_inversion"
    table = InversionSettings
    stream = "textual_inversion"
    trains_text = True
    settings: InversionSettings

    def make(self) -> nn.Module:
        components, settings = self.components, self.settings
        start = []
        for encoder, tokenizer in zip(components.text_encoders, components.tokenizers):
            ids = tokenizer.ids(settings.initial)
            if not ids:
                raise FastsdError("it has no token", argument="initial", value=settings.initial)
            ids = (ids + [ids[-1]] * settings.vectors)[: settings.vectors]
            start.append(encoder.text_model.embeddings.token_embedding.weight[ids])
        self.learned = LearnedVectors(start).to(self.job.device)
        components.embeddings[settings.token] = TextualInversion((settings.token,), tuple(self.learned.vectors))
        return self.learned

    def caption(self, row: int, random: np.random.Generator, empty: float) -> str:
        templates, token = self.settings.templates, self.settings.token
        if templates:
            return templates[int(random.integers(len(templates)))].replace("{}", token)
        text = super().caption(row, random, 0.0)
        if token.lower() not in text.lower():
            raise FastsdError(
                f"the caption {text[:60]!r} does not hold the word {token!r}; give templates", argument="templates"
            )
        return text

    def export(self, folder: Path) -> bool:
        """Write the vectors as one file that other programs open."""
        name = "".join(c if c.isalnum() or c in "-_" else "" for c in self.settings.token) or "embedding"
        vectors = tuple(one.detach().cpu() for one in self.learned.vectors)
        write_embedding(folder / f"{name}.safetensors", self.settings.token, vectors)
        self.write_listing(folder)
        return True
