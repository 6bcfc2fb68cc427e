"""The texts of a call: a prompt and a negative prompt for each image, or features that the caller made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from fastsd.components import Components
from fastsd.errors import FastsdError
from fastsd.generate.like import LIKE, Rules
from fastsd.parameters import Settings, not_stored
from fastsd.parameters.kinds import MAX_IMAGES
from fastsd.text.encode import TextFeatures
from fastsd.text.parse import MAX_CHUNKS, ParsedPrompts, parse_prompts

T = TypeVar("T")
POOLED = {"prompt_embeds": "pooled_prompt_embeds", "negative_prompt_embeds": "negative_pooled_prompt_embeds"}


@dataclass(frozen=True)
class Prompts:
    """What each image is to follow and to stay away from.

    Attributes:
        positive, negative: texts, "" where the caller gave features.
        features, negative_features: of each image; empty where the texts count. All have as many tokens.
    """

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    features: tuple[TextFeatures, ...] = ()
    negative_features: tuple[TextFeatures, ...] = ()

    def __len__(self) -> int:
        return len(self.positive)

    @property
    def tokens(self) -> int:
        """Of the features."""
        return next(one.context.shape[1] for one in (*self.features, *self.negative_features))

    def notes(self, settings: Settings, guided: bool) -> list[str]:
        """What a user should know of features in place of texts."""
        given = [name for name in POOLED if settings[name] is not None]
        notes = not_stored(given)
        if "negative_prompt_embeds" in given and not guided:
            notes.append("negative_prompt_embeds has no effect: without guidance nothing steers away from it")
        if "prompt_embeds" in given and settings.clip_skip != 1:
            notes.append("clip_skip has no effect on prompt_embeds, which were encoded before")
        return notes


def check_prompts(argument: str, value: Any) -> list[str]:
    """One prompt or a list of them, as a list."""
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, list | tuple) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise FastsdError("it should be a text or a list of texts", argument=argument, value=value)
    return list(prompts)


def read_prompts(components: Components, settings: Settings, has_refiner: bool = False) -> Prompts:
    """A prompt and a negative prompt for each image.

    Raises:
        FastsdError: something else than texts or features; features that do not fit the model or each other.
    """
    features = _features(components, settings, "prompt_embeds")
    others = _features(components, settings, "negative_prompt_embeds")
    prompts = [""] * len(features) or check_prompts("prompt", settings.prompt)
    negatives = [""] * len(others) or check_prompts("negative_prompt", settings.negative_prompt)
    if (features or others) and has_refiner:
        name = "prompt_embeds" if features else "negative_prompt_embeds"
        raise FastsdError("the refiner has text encoders of its own: give it texts", argument=name)
    if len(negatives) not in (1, len(prompts)):
        name = "negative_prompt_embeds" if others else "negative_prompt"
        raise FastsdError(f"{len(negatives)} texts for {len(prompts)} prompts; give 1 or as many", argument=name)
    each = settings.num_images_per_prompt
    if len(prompts) * each > MAX_IMAGES:
        raise FastsdError(
            f"{len(prompts) * each} images are too many; at most {MAX_IMAGES} are generated",
            argument="num_images_per_prompt",
        )
    if features and not others and not any(negatives) and zeros_for_empty(components, LIKE[settings.like]):
        others = [TextFeatures(*(torch.zeros_like(x) for x in (features[0].context, features[0].pooled)))]
    if features and others and features[0].context.shape != others[0].context.shape:
        raise FastsdError(
            f"it has {others[0].context.shape[1]} tokens and {{prompt_embeds}} {features[0].context.shape[1]}; "
            "give as many",
            argument="negative_prompt_embeds",
        )
    count = len(prompts)
    return Prompts(
        _of_images(prompts, count, each),
        _of_images(negatives, count, each),
        _of_images(features, count, each),
        _of_images(others, count, each),
    )


def zeros_for_empty(components: Components, rules: Rules) -> bool:
    """Whether an empty negative prompt counts as zeros and is not encoded: of SDXL's family."""
    wanted = components.zeros_for_empty_prompt if rules.zeros_for_empty is None else rules.zeros_for_empty
    return wanted and components.xl


def _of_images(values: Sequence[T], count: int, each: int) -> tuple[T, ...]:
    """Of each image of `count` prompts: one value for all of them, or one for each; none stays none."""
    return tuple(values[i % len(values)] for i in range(count if values else 0) for _ in range(each))


def _features(components: Components, settings: Settings, name: str) -> list[TextFeatures]:
    """The features that the caller gave, of each prompt."""
    if settings[name] is None:
        return []
    context = _tensor(components, name, settings[name], ("N", "L", components.unet.config.cross_attention_dim))
    longest = MAX_CHUNKS * components.tokenizers[0].max_length
    if context.shape[1] > longest:
        raise FastsdError(f"{context.shape[1]} tokens; the longest text that is read has {longest}", argument=name)
    value = settings[POOLED[name]]
    if components.xl and value is None:
        raise FastsdError(f"this model reads the pooled text too: give {{{POOLED[name]}}}", argument=name)
    if not components.xl and value is not None:
        raise FastsdError("this model reads no pooled text: leave it out", argument=POOLED[name])
    pooled = context.new_zeros(len(context), 0)
    if value is not None:
        shape = (len(context), components.text_encoders[-1].config.projection_dim)
        pooled = _tensor(components, POOLED[name], value, shape)
    return [TextFeatures(*pair) for pair in zip(context.split(1), pooled.split(1), strict=True)]


def _tensor(components: Components, name: str, value: Any, shape: tuple[int | str, ...]) -> torch.Tensor:
    """The caller's tensor, copied to the UNet's device and dtype. A letter in `shape` stands for any size but 0."""
    sizes = list(value.shape) if isinstance(value, torch.Tensor) else []
    pairs = zip(sizes, shape, strict=False)
    fits = len(sizes) == len(shape) and all(size == n or (isinstance(n, str) and size > 0) for size, n in pairs)
    if not fits or not value.is_floating_point():
        found = f"{sizes} {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
        wanted = ", ".join(map(str, shape))
        raise FastsdError(f"a floating-point tensor of shape [{wanted}] is needed, not {found}", argument=name)
    weight = components.unet.conv_in.weight
    own = value.detach().to(weight.device, weight.dtype, copy=True)
    if not bool(torch.isfinite(own).all()):
        raise FastsdError(f"it holds NaN or infinite values in {weight.dtype}", argument=name)
    return own


def parse(
    components: Components, settings: Settings, prompts: Prompts, steps: int, guided: Sequence[bool], before: int = 0
) -> ParsedPrompts:
    """The texts of a pass of `steps` steps, after a pass of `before` steps; `guided`: of each image.

    Raises:
        FastsdError: a text is malformed, too long, or does not fit into as many tokens as features have.
    """
    syntax, rules = settings.prompt_syntax, LIKE[settings.like]
    if syntax == "a1111" and settings.emphasis == "none":
        syntax = "literal"
    calls = 2 if rules.counts_calls and settings.sampler in rules.twice else 1
    before = before * calls if rules.counts_calls else 0
    parsed = parse_prompts(
        components,
        prompts.positive,
        prompts.negative,
        steps * calls,
        syntax,
        guided,
        rules.repeats_texts,
        before=before,
    )
    if any(guided) and bool(prompts.features) != bool(prompts.negative_features):
        parsed = replace(parsed, lengths=_fit_lengths(components, prompts, parsed.lengths, guided))
    return parsed


def _fit_lengths(
    components: Components, prompts: Prompts, lengths: Sequence[int], guided: Sequence[bool]
) -> tuple[int, ...]:
    """The chunks that texts fill beside features, which have as many tokens as they have."""
    size, tokens = components.tokenizers[0].max_length, prompts.tokens
    name, other = ("prompt_embeds", "negative_prompt_embeds") if prompts.features else (*reversed(POOLED),)
    longest = max(length for length, steers in zip(lengths, guided, strict=True) if steers)
    if tokens % size or longest > tokens // size:
        raise FastsdError(
            f"it has {tokens} tokens and the text beside it {longest * size}; give {{{other}}} too", argument=name
        )
    return tuple(tokens // size if steers else length for length, steers in zip(lengths, guided, strict=True))
