"""From prompts to what the UNet is told: text features, pooled text, sizes."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from fastsd.model.clip import TextOutput
from fastsd.model.unet import AddedConditioning
from fastsd.weights import Components


@dataclass(frozen=True)
class TextFeatures:
    """What the text encoders say of one prompt: `context` `[1, L, D]` and `pooled` `[1, P]`."""

    context: torch.Tensor
    pooled: torch.Tensor


def encode_text(components: Components, prompt: str, clip_skip: int, zeros: bool = False) -> TextFeatures:
    """Run the text encoders over one prompt.

    Args:
        components: the checkpoint; two encoders' features are joined along the last dimension (SDXL).
        prompt: any text; what exceeds the encoders' length is cut (`truncation_notes` says what).
        clip_skip: how many of the last layers to leave out, counted as most programs do: 1 is none.
        zeros: return zeros of the right shape (what SDXL takes for an empty negative prompt).
    """
    outputs = []
    for encoder, tokenizer in zip(components.text_encoders, components.tokenizers, strict=True):
        ids = tokenizer(prompt).to(encoder.text_model.embeddings.token_embedding.weight.device)
        if is_xl(components):
            output = encoder(ids, hidden_layer=-1 - clip_skip)  # SDXL reads one layer earlier, and not normed
        else:
            output = encoder(ids, hidden_layer=-clip_skip)
            if clip_skip > 1:
                output = TextOutput(encoder.text_model.final_layer_norm(output.hidden), output.pooled)
        outputs.append(output)
    features = TextFeatures(torch.cat([output.hidden for output in outputs], dim=-1), outputs[-1].pooled)
    return TextFeatures(torch.zeros_like(features.context), torch.zeros_like(features.pooled)) if zeros else features


def is_xl(components: Components) -> bool:
    """Whether the UNet takes added conditioning, as SDXL's do."""
    return components.unet.add_embedding is not None


def size_numbers(components: Components, width: int, height: int, negative: bool) -> tuple[float, ...]:
    """SDXL's size conditioning (Podell et al. 2023, section 2.2): original size, crop offset, target size or score."""
    numbers = (float(height), float(width), 0.0, 0.0)
    if components.aesthetic_score:
        return (*numbers, 2.5 if negative else 6.0)
    return (*numbers, float(height), float(width))


def added_conditioning(
    components: Components, pooled: torch.Tensor, negative: bool, width: int, height: int
) -> AddedConditioning | None:
    """The added conditioning of one prompt with pooled text `[1, P]`; None where the UNet takes none."""
    if not is_xl(components):
        return None
    sizes = size_numbers(components, width, height, negative)
    return AddedConditioning(pooled, torch.tensor([sizes], device=pooled.device))


def notes_on(components: Components, prompt: str) -> list[str]:
    """What a user should know of a prompt: words that the model never saw, text that was cut."""
    notes = []
    if components.known_words:
        words = dict.fromkeys(re.findall(r"\w+", prompt.lower()))
        unknown = [word for word in words if word not in components.known_words]
        if unknown:
            known = ", ".join(sorted(components.known_words))
            notes.append(f"{components.name} does not know {', '.join(map(repr, unknown))}; its words are: {known}")
    cut = components.tokenizers[0].truncated(prompt)
    if cut:
        notes.append(f"the prompt is too long; left out: {cut!r}")
    return notes
