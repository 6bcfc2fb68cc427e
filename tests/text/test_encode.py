"""Text features: chunks, weights and textual inversion, on tiny random encoders."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from fastsd.components import Components, TextualInversion
from fastsd.text import encode
from fastsd.text.emphasis import original
from fastsd.text.encode import TextFeatures
from fastsd.text.parse import parse_text
from tests.support import tiny


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def components(request: pytest.FixtureRequest) -> Components:
    made = getattr(tiny, request.param)()
    for encoder in made.text_encoders:
        encoder.requires_grad_(False)
    return made


def encode_text(
    components: Components, text: str, clip_skip: int, zeros: bool = False, syntax: str = "plain", length: int = 1
) -> TextFeatures:
    return encode.encode_text(components, parse_text(components, text, syntax), clip_skip, zeros, length)


def by_hand(components: Components, text: str, clip_skip: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """One chunk without weights, as the encoders were called before there were chunks."""
    hidden = []
    for encoder, tokenizer in zip(components.text_encoders, components.tokenizers, strict=True):
        if len(components.text_encoders) == 2:
            output = encoder(tokenizer(text), -1 - clip_skip)
            hidden.append(output.hidden)
        else:
            output = encoder(tokenizer(text), -clip_skip)
            norm = encoder.text_model.final_layer_norm
            hidden.append(output.hidden if clip_skip == 1 else norm(output.hidden))
    return torch.cat(hidden, dim=-1), output.pooled


@pytest.mark.parametrize("syntax", ["plain", "a1111"])
@pytest.mark.parametrize("clip_skip", [1, 2])
@pytest.mark.parametrize("text", ["", "a cat", "a cat, sitting on a mat " * 8, "a! ünd 3 <|endoftext|> x"])
def test_text_without_signs_is_encoded_as_it_is(components: Components, text: str, clip_skip: int, syntax: str) -> None:
    found = encode_text(components, text, clip_skip, syntax=syntax)
    context, pooled = by_hand(components, text, clip_skip)
    assert torch.equal(found.context, context) and torch.equal(found.pooled, pooled)


@pytest.mark.parametrize("text", ["(a cat:1.0)", "(a:1)(cat:1)", "((a cat:2):0.5)", r"a c\at"])
def test_a_weight_of_one_changes_nothing(components: Components, text: str) -> None:
    plain = encode_text(components, "a cat" if "(cat" not in text else "acat", 1, syntax="a1111")
    assert torch.equal(encode_text(components, text, 1, syntax="a1111").context, plain.context)


def test_plain_text_has_no_signs_and_one_chunk(components: Components) -> None:
    for text in ("(a cat:1.5) [x] BREAK y", "a, " * 100):
        context, _ = by_hand(components, text)
        assert torch.equal(encode_text(components, text, 1).context, context)


def test_weights_multiply_and_the_mean_is_restored(components: Components) -> None:
    """w h mean(h) / mean(w h) by numpy in float64; "a red cat" are tokens 1 to 3, start and padding weigh 1."""
    found = encode_text(components, "a (red:1.7) (cat:0.25)", 1, syntax="a1111")
    context, pooled = by_hand(components, "a red cat")
    weights = np.ones((1, 77, 1))
    weights[0, 2], weights[0, 3] = 1.7, 0.25
    expected = []
    for part in context.split(32, dim=-1):  # each encoder's own mean
        h = part.double().numpy()
        z = weights * h
        expected.append(z * (h.mean() / z.mean()))
    wanted = np.concatenate(expected, axis=-1)
    # The mean of 2464 fp32 numbers that nearly cancel: rounding of the sum, against its size.
    error = 2**-24 * np.abs(context.numpy()).mean() / abs(context.numpy().mean()) * 64
    np.testing.assert_allclose(found.context.double().numpy(), wanted, rtol=max(error, 1e-6))
    assert torch.equal(found.pooled, pooled)


def test_the_mean_is_that_of_all_tokens_and_channels() -> None:
    hidden = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])  # mean 4
    weights = torch.tensor([[[1.0], [3.0]]])  # 1 3 15 21: mean 10
    expected = torch.tensor([[[0.4, 1.2], [6.0, 8.4]]])
    torch.testing.assert_close(original(hidden, weights, hidden), expected, rtol=1e-6, atol=0)
    assert original(hidden, torch.tensor([[[1.0], [-1 / 3]]]), hidden).isfinite().all()  # 1 3 -5/3 -7/3: mean 0


def test_long_text_is_encoded_chunk_by_chunk(components: Components) -> None:
    text = "red " * 75 + "green " * 75 + "(blue:1.3)"
    found = encode_text(components, text, 1, syntax="a1111")
    first, pooled = by_hand(components, "red " * 75)
    second, _ = by_hand(components, "green " * 75)
    third = encode_text(components, "(blue:1.3)", 1, syntax="a1111").context
    assert torch.equal(found.context, torch.cat([first, second, third], dim=1))
    assert torch.equal(found.pooled, pooled)


def test_break_and_padding_are_chunks(components: Components) -> None:
    (a, _), (b, _), (none, _) = (by_hand(components, text) for text in ("a cat", "a dog", ""))
    found = encode_text(components, "a cat BREAK a dog", 1, syntax="a1111")
    assert torch.equal(found.context, torch.cat([a, b], dim=1))
    padded = encode_text(components, "a cat", 1, syntax="a1111", length=3)
    assert torch.equal(padded.context, torch.cat([a, none, none], dim=1))
    zeros = encode_text(components, "", 1, zeros=True, syntax="a1111", length=2)
    assert zeros.context.shape == (1, 154, a.shape[-1]) and not zeros.context.any() and not zeros.pooled.any()


def test_vectors_stand_in_for_a_word(components: Components) -> None:
    """As if the word's row in the encoders' tables held them."""
    taught = copy.deepcopy(components)
    torch.manual_seed(2)
    vectors = tuple(torch.randn(1, 32) for _ in components.text_encoders)
    for encoder, tokenizer, vector in zip(taught.text_encoders, taught.tokenizers, vectors, strict=True):
        (word,) = tokenizer.ids("zebra")
        encoder.text_model.embeddings.token_embedding.weight[word] = vector[0]
    embedded = copy.copy(components)
    embedded.embeddings = {"<toy>": TextualInversion(("<toy>",), vectors)}
    found = encode_text(embedded, "a <TOY>, (<toy>:1.2) x", 1, syntax="a1111")
    wanted = encode_text(taught, "a zebra, (zebra:1.2) x", 1, syntax="a1111")
    assert torch.equal(found.context, wanted.context) and torch.equal(found.pooled, wanted.pooled)
    assert not torch.equal(found.context, encode_text(components, "a <toy>, (<toy>:1.2) x", 1, syntax="a1111").context)
