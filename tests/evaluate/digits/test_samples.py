"""Prompts and images of the evaluation."""

from __future__ import annotations

import numpy as np
import torch

from fastsd.evaluate.digits.samples import STYLE_PROMPTS, grey, plain_prompt
from fastsd.train.captions import DIGIT_WORDS, KNOWN_WORDS
from fastsd.train.strokes import STYLE_WORDS


def test_grey_is_the_mean_of_the_channels() -> None:
    """A tint, which training never showed, then has little weight."""
    image = np.zeros((1, 2, 2, 3), dtype=np.float32)
    image[..., 0], image[..., 1] = 0.3, 0.9
    torch.testing.assert_close(grey(image), torch.full((1, 2, 2), 0.4))


def test_prompts_use_the_words_of_the_captions() -> None:
    prompts = [plain_prompt(digit, index) for digit in range(10) for index in range(3)]
    assert len(set(prompts)) == 30 and {word for prompt in prompts for word in prompt.split()} <= set(KNOWN_WORDS)
    assert STYLE_PROMPTS.keys() == STYLE_WORDS.keys()
    for name, forms in STYLE_PROMPTS.items():
        assert all(word in form for word, form in zip(STYLE_WORDS[name], forms))
    assert plain_prompt(8, 1) == DIGIT_WORDS[8] == "eight"
