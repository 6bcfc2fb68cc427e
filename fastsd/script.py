"""What every UNet sample of a batch is told in every row of the sampler's table: the text, the time, the sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastsd.conditioning import added_conditioning, encode_text, is_xl
from fastsd.graph import Graphs
from fastsd.request import Request
from fastsd.weights import Components

Words = tuple[str, bool]  # a text, and whether it is a negative one
KeyValues = tuple[torch.Tensor, ...]  # of every cross-attention, in order of use


@dataclass
class Script:
    """The conditioning of one batch.

    Attributes:
        time: `[rows, 1 or samples, channels]`.
        words: of each row, for each sample.
        projected: keys and values of each text, `[1, tokens, ...]` each.
    """

    time: torch.Tensor
    words: Sequence[tuple[Words, ...]]
    projected: dict[Words, KeyValues]
    _held: tuple[tuple[Words, ...], KeyValues] = ((), ())

    def at(self, row: int) -> KeyValues:
        """The keys and values of a row, `[samples, tokens, ...]` each; the very same tuple while no text changes."""
        words = self.words[row]
        if words != self._held[0]:
            layers = zip(*(self.projected[one] for one in words), strict=True)
            self._held = words, tuple(torch.cat(layer) for layer in layers)
        return self._held[1]


def batches(request: Request) -> list[slice]:
    """The images that run together: up to `batch_size` neighbours whose texts fill as many chunks."""
    found, start = [], 0
    for i in range(1, len(request.prompts) + 1):
        ends = i == len(request.prompts) or request.chunks[i] != request.chunks[start]
        if ends or i - start == request.batch_size:
            found.append(slice(start, i))
            start = i
    return found


def write_script(
    components: Components, request: Request, which: slice, device: torch.device, graphs: Graphs
) -> Script:
    """Encode what a batch is told.

    Each distinct text is encoded and projected once and by itself, padded to the chunks of its image, so that an image
    does not depend on its neighbours in the batch. With guidance, the negative half comes first.
    """
    unet = components.unet
    table = request.table
    steps = [int(step - table.step[0]) for step in table.step]  # a schedule counts the steps that run
    said = [[(text, False) for text in texts] for texts in request.texts[which]]
    if request.guidance_scale != 1.0:
        said = [[(text, True) for text in texts] for texts in request.negative_texts[which]] + said
    words = [tuple(texts[step] for texts in said) for step in steps]
    timesteps = torch.as_tensor(table.timesteps.copy(), dtype=torch.float32, device=device)

    times: dict[Words, torch.Tensor] = {}
    projected: dict[Words, KeyValues] = {}
    # A run without rows (strength 0) is told nothing.
    for text, negative in dict.fromkeys(one for row in words for one in row):
        zeros = negative and not text and components.zeros_for_empty_prompt
        chunks = request.chunks[which.start]
        features = encode_text(components, text, request.clip_skip, zeros, request.prompt_syntax, chunks, graphs)
        projected[text, negative] = unet.project_context(features.context)
        added = added_conditioning(components, features.pooled, negative, request.width, request.height)
        if added is not None or not times:
            times[text, negative] = unet.embed_time(timesteps, added)  # [rows, channels]
    if not words:
        return Script(timesteps, words, projected)
    if is_xl(components):
        time = torch.stack([torch.stack([times[one][row] for one in now]) for row, now in enumerate(words)])
    else:
        time = next(iter(times.values()))[:, None]
    return Script(time, words, projected)
