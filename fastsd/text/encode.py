"""What the text encoders make of a parsed text, and SDXL's added conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastsd.components import Components
from fastsd.graph import Graphs
from fastsd.model.clip import Insertion, TextOutput
from fastsd.model.unet import AddedConditioning
from fastsd.text.chunks import Chunk
from fastsd.text.parse import ParsedText


@dataclass(frozen=True)
class TextFeatures:
    """The encoded text: `context` `[1, L, D]` and `pooled` `[1, P]`."""

    context: torch.Tensor
    pooled: torch.Tensor


def encode_text(
    components: Components,
    text: ParsedText,
    clip_skip: int,
    zeros: bool = False,
    length: int = 1,
    graphs: Graphs | None = None,
) -> TextFeatures:
    """Run the text encoders over one text, chunk by chunk.

    The features of each chunk are multiplied by its tokens' weights, and then by the factor that restores their mean
    (A1111's arithmetic), for each encoder separately. The pooled text is the first chunk's, without weights.

    Args:
        components: the checkpoint; the features of two encoders are joined along the last dimension (SDXL).
        text: parsed with this checkpoint's tokenizers.
        clip_skip: counted as most programs do: 1 leaves out no layer.
        zeros: return zeros of the right shape (SDXL's encoding of an empty negative prompt).
        length: encode at least so many chunks; those that the text does not fill are empty.
        graphs: where captured encoders are kept; None runs them eagerly.
    """
    length = max(length, text.length)
    graphs = Graphs() if graphs is None else graphs
    outputs = [
        _encode(components, which, [*chunks, *[Chunk()] * (length - len(chunks))], clip_skip, graphs)
        for which, chunks in enumerate(text.chunks)
    ]
    features = TextFeatures(torch.cat([output.hidden for output in outputs], dim=-1), outputs[-1].pooled)
    return TextFeatures(torch.zeros_like(features.context), torch.zeros_like(features.pooled)) if zeros else features


def _encode(components: Components, which: int, chunks: Sequence[Chunk], clip_skip: int, graphs: Graphs) -> TextOutput:
    """One encoder over all chunks: features joined along the tokens `[1, chunks * L, D]`, pooled of the first."""
    outputs: list[TextOutput] = []
    for i, chunk in enumerate(chunks):
        both_empty = i > 0 and not chunk.ids and not chunks[i - 1].ids
        outputs.append(outputs[-1] if both_empty else _encode_chunk(components, which, chunk, clip_skip, graphs))
    return TextOutput(torch.cat([output.hidden for output in outputs], dim=1), outputs[0].pooled)


def _encode_chunk(components: Components, which: int, chunk: Chunk, clip_skip: int, graphs: Graphs) -> TextOutput:
    encoder, tokenizer = components.text_encoders[which], components.tokenizers[which]
    ids = torch.full((1, tokenizer.max_length), tokenizer.pad_id, dtype=torch.int64)
    content = [tokenizer.bos_id, *chunk.ids, tokenizer.eos_id]
    ids[0, : len(content)] = torch.tensor(content)
    ids = ids.to(encoder.text_model.embeddings.token_embedding.weight.device)
    layer = -1 - clip_skip if components.xl else -clip_skip  # SDXL reads the layer before, without the final norm
    if chunk.vectors:
        output = encoder(ids, layer, [Insertion(0, 1 + start, vectors) for start, vectors in chunk.vectors])
    else:
        output = graphs(("text", which, layer), lambda x: encoder(x, layer), ids, weights=encoder)
    if clip_skip > 1 and not components.xl:
        output = TextOutput(encoder.text_model.final_layer_norm(output.hidden), output.pooled)
    if all(weight == 1.0 for weight in chunk.weights):
        return output
    weights = torch.ones(1, tokenizer.max_length, 1)
    weights[0, 1 : 1 + len(chunk.weights), 0] = torch.tensor(chunk.weights)
    return TextOutput(emphasize(output.hidden, weights), output.pooled)


def emphasize(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """A1111's emphasis: `z = w h`, then `z mean(h) / mean(z)`; the means are over all tokens and channels.

    Args:
        hidden: `[1, L, D]`.
        weights: `[1, L, 1]`.

    Returns:
        `[1, L, D]` in the dtype of `hidden`; computed in fp32.
    """
    before = hidden.float()
    after = before * weights.to(before)
    ratio = before.mean() / after.mean()
    # Negative weights can make the mean 0, which no factor restores.
    return (after * torch.where(ratio.isfinite(), ratio, 1.0)).to(hidden.dtype)


def added_conditioning(
    components: Components, pooled: torch.Tensor, negative: bool, width: int, height: int
) -> AddedConditioning | None:
    """SDXL's added conditioning of one prompt with pooled text `[1, P]`; None where the UNet takes none."""
    if not components.xl:
        return None
    sizes = size_conditioning(components, width, height, negative)
    return AddedConditioning(pooled, torch.tensor([sizes], device=pooled.device))


def size_conditioning(components: Components, width: int, height: int, negative: bool) -> tuple[float, ...]:
    """Original size, crop offset, and target size or aesthetic score (Podell et al. 2023, section 2.2)."""
    sizes = (float(height), float(width), 0.0, 0.0)
    if components.aesthetic_score:
        return (*sizes, 2.5 if negative else 6.0)
    return (*sizes, float(height), float(width))
