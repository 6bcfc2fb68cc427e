"""What every UNet sample of a batch is told in every row of the sampler's table: the text, the time, the sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastsd.components import Components
from fastsd.generate.denoiser import Told
from fastsd.generate.request import Request
from fastsd.graph import Graphs
from fastsd.model.controlnet import ControlNet
from fastsd.model.unet import ContractingPath
from fastsd.text.encode import added_conditioning, encode_text, is_xl

Words = tuple[str, bool]  # a text, and whether it is a negative one
KeyValues = tuple[torch.Tensor, ...]  # of every cross-attention, in order of use


@dataclass
class Script:
    """The conditioning of one batch.

    Attributes:
        words: of each row, for each sample.
        times: for each network `[rows, 1 or samples, channels]`, the UNet's first.
        projected: for each network, keys and values of each text, `[1, tokens, ...]` each.
    """

    words: Sequence[tuple[Words, ...]]
    times: list[torch.Tensor]
    projected: list[dict[Words, KeyValues]]
    _held: tuple[tuple[Words, ...], list[KeyValues]] = ((), [])

    def at(self, row: int) -> list[Told]:
        """What each network is told in a row; the very same keys and values while no text changes."""
        words = self.words[row]
        if words != self._held[0]:
            joined = []
            for projected in self.projected:
                layers = zip(*(projected[one] for one in words), strict=True)
                joined.append(tuple(torch.cat(layer) for layer in layers))
            self._held = words, joined
        return [Told(time, key_values) for time, key_values in zip(self.times, self._held[1], strict=True)]


def batches(request: Request) -> list[slice]:
    """The images that run together: up to `batch_size` neighbours whose texts fill as many chunks, in every pass."""
    chunks = list(zip(*(one.wording.chunks for one in request.passes), strict=True))
    found, start = [], 0
    for i in range(1, len(chunks) + 1):
        ends = i == len(chunks) or chunks[i] != chunks[start]
        if ends or i - start == request.batch_size:
            found.append(slice(start, i))
            start = i
    return found


def write_script(
    components: Components,
    request: Request,
    which: slice,
    device: torch.device,
    graphs: Graphs,
    rows: range,
    controls: Sequence[ControlNet] = (),
) -> Script:
    """Encode what a batch is told.

    Each distinct text is encoded and projected once and by itself, padded to the chunks of its image, so that an image
    does not depend on its neighbours in the batch. With guidance, the negative half comes first.

    Args:
        components: whose text encoders read and whose UNet is told.
        request, which: the images.
        device: of the tensors.
        graphs: where captured encoders are kept.
        rows: of the table, those that this checkpoint does; other rows' texts are not encoded.
        controls: ControlNets that are told the same.
    """
    table = request.table
    steps = [int(step - table.step[0]) for step in table.step]  # a schedule counts the steps that run
    said = [[(text, False) for text in texts] for texts in request.wording.texts[which]]
    if request.guided:
        said = [[(text, True) for text in texts] for texts in request.wording.negative_texts[which]] + said
    words = [tuple(texts[step] for texts in said) for step in steps]
    timesteps = torch.as_tensor(table.timesteps.copy(), dtype=torch.float32, device=device)

    networks: list[ContractingPath] = [components.unet, *controls]
    times: list[dict[Words, torch.Tensor]] = [{} for _ in networks]
    projected: list[dict[Words, KeyValues]] = [{} for _ in networks]
    # A run without rows (strength 0) is told nothing.
    for text, negative in dict.fromkeys(one for row in rows for one in words[row]):
        zeros = negative and not text and components.zeros_for_empty_prompt
        chunks = request.wording.chunks[which.start]
        features = encode_text(components, text, request.clip_skip, zeros, request.wording.syntax, chunks, graphs)
        added = added_conditioning(components, features.pooled, negative, request.width, request.height)
        for network, own_times, own_projected in zip(networks, times, projected, strict=True):
            own_projected[text, negative] = network.project_context(features.context)
            if added is not None or not own_times:
                embedded = network.embed_time(timesteps, added, request.guidance_scale)
                own_times[text, negative] = embedded  # [rows, channels]
    return Script(words, [_join(own, words, rows, is_xl(components)) for own in times], projected)


def _join(
    times: dict[Words, torch.Tensor], words: Sequence[tuple[Words, ...]], rows: range, each: bool
) -> torch.Tensor:
    """`[rows, samples, channels]`, each sample's own; or `[rows, 1, channels]` where all samples share one.

    What stands in other rows than `rows` is never read.
    """
    if not rows:
        return torch.empty(0)
    if not each:
        return next(iter(times.values()))[:, None]
    first = words[rows.start]
    return torch.stack(
        [torch.stack([times[one][row] for one in (words[row] if row in rows else first)]) for row in range(len(words))]
    )
