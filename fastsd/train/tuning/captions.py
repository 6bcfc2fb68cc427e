"""Captions as what the UNet reads, with gradients where a text encoder or an embedding is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastsd.components import Components
from fastsd.model.clip import Insertion, TextEncoder, TextOutput
from fastsd.model.tokenizer import Tokenizer
from fastsd.text.chunks import Chunk, Piece, find_names, split
from fastsd.text.encode import LAYERS, TextFeatures


class CaptionEncoder:
    """Encodes captions for one checkpoint; plain texts, in which names of embeddings alone have a meaning.

    Args:
        components: the checkpoint; its textual inversions are found in the captions.
        clip_skip: as in `fastsd.text.encode.encode_text`, "added".
        chunks: of tokens that a caption may have, 75 tokens each; what is longer is cut.
        remembers: keep the features of every caption, for encoders that do not change.
    """

    def __init__(self, components: Components, clip_skip: int = 1, chunks: int = 1, remembers: bool = True):
        self.components, self.clip_skip, self.chunks, self.remembers = components, clip_skip, chunks, remembers
        self.cut: set[str] = set()
        self._known: dict[str, TextFeatures] = {}

    def __call__(self, captions: Sequence[str]) -> TextFeatures:
        """`context` `[B, 77 * chunks, D]`, `pooled` `[B, P]`."""
        if not self.remembers:
            return self._encode(captions)
        device = next(self.components.text_encoders[0].parameters()).device
        # The encoder's own dtype, since the fused ops of inference on a CPU take weights of one dtype with the input.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for caption in dict.fromkeys(captions):  # one by one, so that the result does not depend on the others
                if caption not in self._known:
                    self._known[caption] = self._encode([caption])
        found = [self._known[caption] for caption in captions]
        return TextFeatures(torch.cat([one.context for one in found]), torch.cat([one.pooled for one in found]))

    def _encode(self, captions: Sequence[str]) -> TextFeatures:
        outputs = [self._encode_by(which, captions) for which in range(len(self.components.text_encoders))]
        context, pooled = torch.cat([output.hidden for output in outputs], dim=-1), outputs[-1].pooled
        if self.components.zeros_for_empty_prompt:
            kept = torch.tensor([bool(caption) for caption in captions], dtype=torch.bool, device=context.device)
            context, pooled = context * kept[:, None, None], pooled * kept[:, None]
        return TextFeatures(context, pooled)

    def _encode_by(self, which: int, captions: Sequence[str]) -> TextOutput:
        components = self.components
        network: TextEncoder = components.text_encoders[which]
        tokenizer: Tokenizer = components.tokenizers[which]
        vectors = {name: one.vectors[which] for name, one in components.embeddings.items()}
        ids = torch.full(
            (len(captions) * self.chunks, tokenizer.max_length), tokenizer.pad_id, dtype=torch.int64, device="cpu"
        )
        insertions = []
        for number, caption in enumerate(captions):
            pieces = [Piece(text, 1.0, name) for text, name in find_names(caption, vectors)]
            parts = split([pieces], tokenizer, vectors)
            if len(parts) > self.chunks:
                self.cut.add(caption)
            for place in range(self.chunks):
                chunk = parts[place] if place < len(parts) else Chunk()
                row = number * self.chunks + place
                content = [tokenizer.bos_id, *chunk.ids, tokenizer.eos_id]
                ids[row, : len(content)] = torch.tensor(content, dtype=torch.int64, device="cpu")
                insertions += [Insertion(row, 1 + start, inserted) for start, inserted in chunk.vectors]
        kind = "xl" if components.xl else network.config.hidden_act
        layer = LAYERS["added"](kind, self.clip_skip)
        device = network.text_model.embeddings.token_embedding.weight.device
        output = network(ids.to(device), layer, insertions)
        hidden = output.hidden
        if layer < -1 and not components.xl:
            hidden = network.text_model.final_layer_norm(hidden)
        joined = hidden.unflatten(0, (len(captions), self.chunks)).flatten(1, 2)
        return TextOutput(joined, output.pooled[:: self.chunks])
