"""Captions in training are encoded as prompts are."""

from __future__ import annotations

import pytest
import torch

from fastsd.components import Components, TextualInversion
from fastsd.text.encode import encode_text
from fastsd.text.parse import tokenize
from fastsd.text.syntax import Span
from fastsd.train.tuning.captions import CaptionEncoder
from tests.support import tiny

CAPTIONS = ["a cat", "", "a photo of a very old house, by the sea", "a <toy> on a table"]


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def components(request: pytest.FixtureRequest) -> Components:
    made = {"sd1": tiny.sd1, "sdxl": tiny.sdxl}[request.param]()
    generator = torch.Generator().manual_seed(0)
    vectors = tuple(0.1 * torch.randn(2, 32, generator=generator) for _ in made.text_encoders)
    made.embeddings["<toy>"] = TextualInversion(("<toy>",), vectors)
    return made


@pytest.mark.parametrize("clip_skip", [1, 2])
@pytest.mark.parametrize("remembers", [True, False])
@torch.no_grad()
def test_as_prompts(components: Components, remembers: bool, clip_skip: int) -> None:
    """Products of 64 terms at most, in a batch or alone."""
    if components.xl and clip_skip > 1:
        pytest.skip("two layers leave nothing to skip beyond SDXL's own")
    found = CaptionEncoder(components, clip_skip, remembers=remembers)(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        parsed = tokenize(components, caption, ((Span(caption),),), "a1111")
        zeros = components.zeros_for_empty_prompt and not caption
        expected = encode_text(components, parsed, clip_skip, zeros)
        for ours, theirs in ((found.context[row], expected.context[0]), (found.pooled[row], expected.pooled[0])):
            assert float((ours - theirs).abs().max()) <= 1000 * 2.0**-24 * max(1.0, float(theirs.abs().max()))


def test_long_captions(components: Components) -> None:
    """Two chunks take 154 tokens; one cuts the caption, and says so."""
    long = "a house " * 60
    assert CaptionEncoder(components, chunks=2)([long, "a cat"]).context.shape[1] == 154
    encoder = CaptionEncoder(components)
    assert encoder([long]).context.shape[1] == 77
    assert encoder.cut == {long}


def test_gradients_reach_the_vectors(components: Components) -> None:
    vectors = [torch.zeros(2, 32, requires_grad=True) for _ in components.text_encoders]
    components.embeddings["<new>"] = TextualInversion(("<new>",), tuple(vectors))
    found = CaptionEncoder(components, remembers=False)(["a <new> cat", "a cat"])
    found.context[0].square().sum().backward(retain_graph=True)
    assert all(vector.grad is not None and bool(vector.grad.any()) for vector in vectors)
    for vector in vectors:
        vector.grad = None
    found.context[1].square().sum().backward()
    assert all(vector.grad is None or not vector.grad.any() for vector in vectors)
    del components.embeddings["<new>"]
