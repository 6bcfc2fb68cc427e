"""What the text encoders make of a parsed text, and SDXL's added conditioning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastsd.components import Components
from fastsd.graph import Graphs
from fastsd.model.clip import Insertion, TextEncoder, TextOutput
from fastsd.model.tokenizer import Tokenizer
from fastsd.model.unet import AddedConditioning
from fastsd.parameters import PARAMETERS
from fastsd.text.chunks import Chunk
from fastsd.text.emphasis import RULES, Rule, comfy
from fastsd.text.parse import ParsedText


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """The encoded text: `context` `[1, L, D]` and `pooled` `[1, P]`. Two are equal only if they are the same object."""

    context: torch.Tensor
    pooled: torch.Tensor


def encode_text(
    components: Components,
    text: ParsedText,
    clip_skip: int,
    zeros: bool = False,
    length: int = 1,
    graphs: Graphs | None = None,
    emphasis: str = "original",
    clip_layers: str = "added",
) -> TextFeatures:
    """Run the text encoders over one text, chunk by chunk.

    The weights of a chunk's tokens act on its features, for each encoder separately (`fastsd.text.emphasis`). The
    pooled text is the first chunk's, without weights.

    Args:
        components: the checkpoint; the features of two encoders are joined along the last dimension (SDXL).
        text: parsed with this checkpoint's tokenizers.
        clip_skip: counted as most programs do: 1 leaves out no layer.
        zeros: return zeros of the right shape (SDXL's encoding of an empty negative prompt).
        length: encode at least so many chunks; those that the text does not fill are empty.
        graphs: where captured encoders are kept; None runs them eagerly.
        emphasis: what weights do, a key of `fastsd.text.emphasis.RULES`.
        clip_layers: how `clip_skip` counts, a key of `LAYERS`.
    """
    length = max(length, text.length)
    graphs = Graphs() if graphs is None else graphs

    def encoder(which: int) -> _Encoder:
        kind = "xl" if components.xl else components.text_encoders[which].config.hidden_act
        layer = LAYERS[clip_layers](kind, clip_skip)
        return _Encoder(components, which, layer, graphs)

    outputs = [
        _encode(encoder(which), [*chunks, *[Chunk()] * (length - len(chunks))], RULES[emphasis])
        for which, chunks in enumerate(text.chunks)
    ]
    features = TextFeatures(torch.cat([output.hidden for output in outputs], dim=-1), outputs[-1].pooled)
    return TextFeatures(torch.zeros_like(features.context), torch.zeros_like(features.pooled)) if zeros else features


# Which layer is read, from the end: of the kind of encoder ("xl": SDXL's, which reads the last but one without the
# final norm; "quick_gelu": OpenAI's CLIP in SD 1; "gelu": OpenCLIP in SD 2, without its last layer) and clip skip.
# added: 1 leaves out no layer of those that the model reads. fixed, A1111's: only SD 1 reads another layer
# (modules/sd_hijack_clip.py and sd_hijack_open_clip.py). from_end, ComfyUI's "CLIP Set Last Layer": 2 is the last but
# one of every family, which SD 2 and SDXL read anyway.
LAYERS: dict[str, Callable[[str, int], int]] = {
    "added": lambda kind, skip: -1 - skip if kind == "xl" else -skip,
    "fixed": lambda kind, skip: -2 if kind == "xl" else -1 if kind == "gelu" else -skip,
    "from_end": lambda kind, skip: -max(skip, 2) if kind == "xl" else -max(skip - 1, 1) if kind == "gelu" else -skip,
}


@dataclass(frozen=True)
class _Encoder:
    """A text encoder that is read at a layer, -1 the last."""

    components: Components
    which: int
    layer: int
    graphs: Graphs

    @property
    def network(self) -> TextEncoder:
        return self.components.text_encoders[self.which]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.components.tokenizers[self.which]

    def __call__(self, chunk: Chunk) -> TextOutput:
        """The encoding of a chunk, without its weights."""
        network, tokenizer, layer = self.network, self.tokenizer, self.layer
        ids = torch.full((1, tokenizer.max_length), tokenizer.pad_id, dtype=torch.int64, device="cpu")
        content = [tokenizer.bos_id, *chunk.ids, tokenizer.eos_id]
        ids[0, : len(content)] = torch.tensor(content, dtype=torch.int64, device="cpu")
        ids = ids.to(network.text_model.embeddings.token_embedding.weight.device)
        if chunk.vectors:
            output = network(ids, layer, [Insertion(0, 1 + start, vectors) for start, vectors in chunk.vectors])
        else:
            output = self.graphs(("text", self.which, layer), lambda x: network(x, layer), ids, weights=network)
        if layer < -1 and not self.components.xl:
            output = TextOutput(network.text_model.final_layer_norm(output.hidden), output.pooled)
        return output


def _encode(encoder: _Encoder, chunks: Sequence[Chunk], rule: Rule | None) -> TextOutput:
    """One encoder over all chunks: features joined along the tokens `[1, chunks * L, D]`, pooled of the first."""
    outputs: list[TextOutput] = []
    for i, chunk in enumerate(chunks):
        both_empty = i > 0 and not chunk.ids and not chunks[i - 1].ids
        outputs.append(outputs[-1] if both_empty else _weighted(encoder, chunk, rule))
    return TextOutput(torch.cat([output.hidden for output in outputs], dim=1), outputs[0].pooled)


def _weighted(encoder: _Encoder, chunk: Chunk, rule: Rule | None) -> TextOutput:
    """The encoding of a chunk with its weights; computed in fp32."""
    output = encoder(chunk)
    if rule is None or all(weight == 1.0 for weight in chunk.weights):
        return output
    hidden = output.hidden.float()
    weights = torch.ones(1, encoder.tokenizer.max_length, 1, dtype=torch.float32, device="cpu")
    weights[0, 1 : 1 + len(chunk.weights), 0] = torch.tensor(chunk.weights, dtype=torch.float32, device="cpu")
    empty = encoder(Chunk()).hidden.float() if rule is comfy else hidden
    return TextOutput(rule(hidden, weights.to(hidden), empty).to(output.hidden.dtype), output.pooled)


def added_conditioning(
    components: Components,
    pooled: torch.Tensor,
    negative: bool,
    width: int,
    height: int,
    settings: Mapping[str, Any] | None = None,
) -> AddedConditioning | None:
    """SDXL's added conditioning of one prompt with pooled text `[1, P]`; None where the UNet takes none."""
    if not components.xl:
        return None
    sizes = size_conditioning(components, width, height, negative, settings or {})
    return AddedConditioning(pooled, torch.tensor([sizes], dtype=torch.float32, device=pooled.device))


def size_conditioning(
    components: Components, width: int, height: int, negative: bool, settings: Mapping[str, Any]
) -> tuple[float, ...]:
    """Original size, crop offset, and target size or aesthetic score (Podell et al. 2023, section 2.2).

    `settings` may replace the image's own, by diffusers' names. The negative prompt has its own value of each where one
    is given, else the prompt's, as in diffusers' image-to-image pipelines of SDXL (`_get_add_time_ids`); its
    text-to-image pipeline reads the negative sizes only where both are given.
    """

    def chosen(name: str, own: Any) -> Any:
        found = settings.get(f"negative_{name}") if negative else None
        found = settings.get(name) if found is None else found
        return own if found is None else found

    size = height, width
    sizes = (*chosen("original_size", size), *chosen("crops_coords_top_left", (0, 0)))
    if components.aesthetic_score:
        name = "negative_aesthetic_score" if negative else "aesthetic_score"
        return (*map(float, sizes), float(settings.get(name, PARAMETERS[name].default)))
    return tuple(map(float, (*sizes, *chosen("target_size", size))))
