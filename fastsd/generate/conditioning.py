"""What the networks are given in every row of the sampler's table beside the latent: the text, the time, the sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from fastsd.components import Components
from fastsd.generate.denoiser import Conditioning
from fastsd.generate.prompts import zeros_for_empty
from fastsd.generate.request import Pass
from fastsd.generate.samples import PERTURBED, POSITIVE, samples_by_row
from fastsd.graph import Graphs
from fastsd.model.controlnet import ControlNet
from fastsd.model.unet import ContractingPath
from fastsd.text.encode import TextFeatures, added_conditioning, encode_text
from fastsd.text.parse import ParsedPrompt, ParsedText, tokenize

Text = tuple[ParsedText | TextFeatures, bool]  # to be encoded, or encoded by the caller; whether it is a negative one
Texts = tuple[Text, ...]  # of each UNet sample
KeyValues = tuple[torch.Tensor, ...]  # of every cross-attention, in order of use


class PromptKeyValues(NamedTuple):
    """What a UNet reads of an image prompt: of negative samples and of others, and its masks, one a cross-attention."""

    of: dict[bool, KeyValues]
    masks: KeyValues


@dataclass
class ConditioningSchedule:
    """The conditioning of one batch, row by row.

    Attributes:
        texts: of each row.
        times: for each network, the UNet's first, of each row `[1 or samples, channels]`.
        key_values: for each network, of each text, `[1, tokens, ...]` each.
        images: of the UNet's image prompts, those of a sample without (True: it is a negative one) and with them; and
            the mask of each, or nothing.
    """

    texts: Sequence[Texts]
    times: list[list[torch.Tensor]]
    key_values: list[dict[Text, KeyValues]]
    images: Sequence[PromptKeyValues] = ()
    _last: tuple[Texts, list[KeyValues]] = field(default=((), []), repr=False)

    def at(self, row: int) -> list[Conditioning]:
        """The conditioning of each network in a row. While no text changes, the keys and values are the same object."""
        texts = self.texts[row]
        if texts != self._last[0]:
            joined = []
            for key_values in self.key_values:
                layers = zip(*(key_values[text] for text in texts), strict=True)
                joined.append(tuple(torch.cat(layer) for layer in layers))
            for image in self.images:
                layers = zip(*(image.of[negative] for _, negative in texts), strict=True)
                joined[0] += tuple(torch.cat(layer) for layer in layers) + image.masks
            self._last = texts, joined
        return [Conditioning(time, key_values) for time, key_values in zip(self.times, self._last[1], strict=True)]


def schedule_conditioning(
    components: Components,
    stage: Pass,
    which: slice,
    rows: range,
    graphs: Graphs,
    device: torch.device,
    controlnets: Sequence[ControlNet] = (),
    retokenize: bool = False,
    images: Sequence[PromptKeyValues] = (),
) -> ConditioningSchedule:
    """Encode the texts of a batch and project them for its networks.

    Each distinct text is encoded once and alone, padded to the chunks of its image, so that an image does not depend
    on its neighbours in the batch. With guidance, the negative texts come first, twice where an image guides too.

    Args:
        components: the checkpoint whose text encoders and UNet run.
        which: the images of the batch.
        rows: of the table, those that this checkpoint does; texts of other rows are not encoded.
        graphs: where captured encoders are kept.
        device: of the tensors.
        controlnets: networks that get the same conditioning.
        retokenize: the texts were parsed for another checkpoint.
        images: what the UNet reads of image prompts.
    """
    texts = texts_by_row(stage, which)
    timesteps = torch.as_tensor(stage.table.timesteps.copy(), dtype=torch.float32, device=device)
    networks: list[ContractingPath] = [components.unet, *controlnets]
    times: list[dict[Text, torch.Tensor]] = [{} for _ in networks]
    key_values: list[dict[Text, KeyValues]] = [{} for _ in networks]
    # A table without rows (strength 0) has no texts to encode.
    for text, negative in dict.fromkeys(pair for row in rows for pair in texts[row]):
        if isinstance(text, TextFeatures):
            features = text
        else:
            parsed = tokenize(components, text.text, text.sections, text.syntax) if retokenize else text
            features = _encode(components, stage, parsed, negative, stage.prompts.lengths[which.start], graphs)
        added = added_conditioning(components, features.pooled, negative, stage.width, stage.height, stage.settings)
        for network, own_times, own_key_values in zip(networks, times, key_values, strict=True):
            own_key_values[text, negative] = network.project_context(features.context)
            if added is not None or not own_times:  # without added conditioning, all texts share one
                embedded = network.embed_time(timesteps, added, stage.settings.guidance_scale)
                own_times[text, negative] = embedded  # [rows, channels]
    joined = [_join(own, texts, rows, components.xl) for own in times]
    return ConditioningSchedule(texts, joined, key_values, images)


def _encode(
    components: Components, stage: Pass, text: ParsedText, negative: bool, length: int, graphs: Graphs
) -> TextFeatures:
    """A text's features in `length` chunks: filled up with empty ones, or repeated.

    Attention to keys and values that all stand there equally often is attention to one of each. So a repeated text
    counts as it does in a call of its own, which is how A1111 and ComfyUI treat texts of unequal lengths.
    """
    rules, settings = stage.rules, stage.settings
    zeros = zeros_for_empty(components, rules) and negative and not text.text
    repeats = rules.repeats_texts and length % text.length == 0
    own = text.length if repeats else length
    features = encode_text(
        components, text, settings.clip_skip, zeros, own, graphs, settings.emphasis, rules.clip_layers
    )
    return TextFeatures(features.context.repeat(1, length // own, 1), features.pooled)


def texts_by_row(stage: Pass, which: slice) -> list[Texts]:
    """The texts of a batch in each row of the table. Schedules in prompts count the steps that run; or the calls of the
    network, of which the first two are the first (A1111, `reconstruct_cond_batch` in modules/prompt_parser.py)."""
    prompts, given = stage.prompts, stage.texts
    positives = _samples(prompts.positive[which], given.features[which], False)
    negatives = _samples(prompts.negative[which], given.negative_features[which], True) if stage.guided else []
    counts = stage.table.step - stage.table.step[:1]
    if stage.rules.counts_calls:
        counts = np.maximum(np.arange(len(stage.table)) - 1, 0)
    found = []
    for row, count in zip(samples_by_row(stage), counts, strict=True):
        samples = [one for role in row.roles for one in (positives if role in (POSITIVE, PERTURBED) else negatives)]
        found.append(tuple(sample[min(count, len(sample) - 1)] for sample in samples))
    return found


def _samples(prompts: Sequence[ParsedPrompt], features: Sequence[TextFeatures], negative: bool) -> list[list[Text]]:
    """Of each image its texts, step by step; or the features that stand for all of them."""
    if features:
        return [[(one, negative)] for one in features]
    return [[(text, negative) for text in prompt.texts] for prompt in prompts]


def _join(times: dict[Text, torch.Tensor], texts: Sequence[Texts], rows: range, each: bool) -> list[torch.Tensor]:
    """Of each row `[samples, channels]`, each sample's own; or `[1, channels]` where all samples share one.

    Rows outside `rows` hold arbitrary values, which nothing reads.
    """
    if not rows:
        return []
    if not each:
        return list(next(iter(times.values()))[:, None])
    none = torch.empty(0, dtype=torch.float32, device="cpu")
    return [
        torch.stack([times[pair][row] for pair in pairs]) if row in rows else none for row, pairs in enumerate(texts)
    ]
