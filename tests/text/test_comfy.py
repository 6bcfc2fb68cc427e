"""ComfyUI's prompts: weights, whole words in chunks, and what weights do."""

from __future__ import annotations

import pytest
import torch

from fastsd.components import TextualInversion
from fastsd.errors import FastsdError
from fastsd.text.chunks import Piece
from fastsd.text.comfy import split, weigh
from fastsd.text.encode import encode_text
from fastsd.text.parse import parse_text
from tests.support import tiny

# comfy/sd1_clip.py: `parse_parentheses`, `token_weights`, `escape_important`.
WEIGHTS = {
    "a cat": [("a cat", 1.0)],
    "a (cat)": [("a ", 1.0), ("cat", 1.1)],
    "a (cat:1.3) x": [("a ", 1.0), ("cat", 1.3), (" x", 1.0)],
    "((cat:2):1.5)": [("cat", 2.0)],  # the inner number replaces the outer
    "((cat):1.5)": [("cat", 1.5 * 1.1)],
    "(a (b) c:0.5)": [("a ", 0.5), ("b", 0.5 * 1.1), (" c", 0.5)],
    "[cat] a | b": [("[cat] a | b", 1.0)],
    r"\(cat\) (\(x\):2)": [("(cat) ", 1.0), ("(x)", 2.0)],
    "a ) (b)": [("a ) (b)", 1.0)],  # a bracket too many
    "(cat": [("(cat", 1.0)],
    "(:1.2)": [(":1.2", 1.1)],
    "(cat:x)": [("cat:x", 1.1)],
}


@pytest.mark.parametrize("text", WEIGHTS)
def test_weights_are_comfyuis(text: str) -> None:
    assert [(span.text, pytest.approx(span.weight)) for span in weigh(text)[0]] == WEIGHTS[text]


def test_what_cannot_be_meant_is_refused() -> None:
    for text in ("(a:101)", "(a:nan)", "(" * 102 + "a" + ")" * 102):
        with pytest.raises(FastsdError, match="^prompt:"):
            weigh(text)


def test_words_stay_whole_at_the_end_of_a_chunk() -> None:
    """`tokenize_with_weights`: a word that does not fit begins the next chunk; one of 8 tokens or more is cut."""
    tokenizer = tiny.sd1().tokenizers[0]
    letters, large = "qzxqz", "qzxqzqzxqzqzxqz"
    count, many = len(tokenizer.ids(letters)), len(tokenizer.ids(large))
    assert 1 < count < 8 <= many < 75, "the words of this test need 2 to 7 tokens and 8 to 74"
    ones = [Piece("a")] * (76 - count)  # one token too many for the word
    chunks = split([[*ones, Piece(letters, 1.5), Piece("b")]], tokenizer, {})
    assert [len(chunk.ids) for chunk in chunks] == [76 - count, count + 1]
    assert chunks[1].ids[:count] == tokenizer.ids(letters) and chunks[1].weights == [1.5] * count + [1.0]
    chunks = split([[*ones, Piece(large)]], tokenizer, {})
    assert [len(chunk.ids) for chunk in chunks] == [75, many - count + 1]


def test_an_embedding_is_called_by_its_prefix() -> None:
    components = tiny.sd1()
    vectors = torch.randn(2, components.text_encoders[0].config.hidden_size, generator=torch.Generator().manual_seed(0))
    components.embeddings = {"toy": TextualInversion(("toy",), (vectors,))}
    parsed = parse_text(components, "a embedding:toy, toy (embedding:none:1.2)", "comfy")
    chunk = parsed.chunks[0][0]
    assert [start for start, _ in chunk.vectors] == [1] and torch.equal(chunk.vectors[0][1], vectors)
    assert [piece.text for piece in parsed.pieces[0]] == ["a", "", ",", "toy", "embedding:none"]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_weights_go_through_the_empty_text(family: str) -> None:
    """`ClipTokenWeightEncoder.encode_token_weights`: (z - z_empty) * weight + z_empty, each token and encoder alone."""
    components = getattr(tiny, family)()
    plain, empty = (encode_text(components, parse_text(components, text), 1).context for text in ("a red cat", ""))
    text = parse_text(components, "a (red:1.7) cat", "comfy")
    found = encode_text(components, text, 1, emphasis="comfy")
    expected = plain.clone()
    expected[0, 2] = (plain[0, 2] - empty[0, 2]) * 1.7 + empty[0, 2]
    assert torch.equal(found.context, expected)
