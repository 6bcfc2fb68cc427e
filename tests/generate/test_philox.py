"""CUDA's normal numbers without CUDA."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastsd.generate.philox import Philox, philox4x32

# Random123's own tests (Salmon et al. 2011), the file kat_vectors: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
# `torch.manual_seed(0); torch.randn(..., device="cuda")`, as PyTorch prints it in a published lesson on Triton.
PRINTED = [
    [-0.9247, -0.4253, -2.6438, 0.1452, -0.1209, -0.5797, -0.6229, -0.3284],
    [-1.0745, -0.3631, -1.6711, 2.2655, 0.3117, -0.1842, 1.2866, 1.1820],
    [-0.1271, 1.2169, 1.4353, 1.0605, -0.4941, -1.4244, -0.7244, -1.2973],
    [0.0697, -0.0074, 1.8969, 0.6878, -0.0779, -0.8373, 1.3506, -0.2879],
]
# A1111's `rng_philox.Generator(0).randn((3, 4))`, as its docstring gives it.
A1111 = [
    [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
    [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
    [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
]


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], dtype=np.uint32)[:, None]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_the_words_are_those_of_random123(counter: str, key: str, result: str) -> None:
    np.testing.assert_array_equal(philox4x32(words(counter), words(key)), words(result))


def test_the_numbers_are_those_that_a1111_publishes() -> None:
    """A1111's constant, 2 pi / 2^32, is rounded to fp32 and its docstring is not: 2^-24 of an angle of at most 2 pi, of
    a radius of at most sqrt(2 log 2^33) = 6.8."""
    atol = 2 * np.pi * 2**-24 * (2 * np.log(2.0**33)) ** 0.5
    np.testing.assert_allclose(Philox(0).randn((3, 4)).numpy(), A1111, rtol=0, atol=atol)


def test_the_numbers_are_those_that_cuda_prints() -> None:
    """Four decimals: half of the last is the tolerance."""
    np.testing.assert_allclose(Philox(0).randn((4, 8)).numpy(), PRINTED, rtol=0, atol=0.5e-4)


def test_a_seed_of_64_bits_fills_both_words_of_the_key() -> None:
    low, high, both = (Philox(seed).randn((64,)) for seed in (5, 5 << 32, 5 + (5 << 32)))
    assert not torch.equal(low, both) and not torch.equal(high, both)
    key = np.array([[5], [5]], dtype=np.uint32)
    radius_word = philox4x32(np.zeros((4, 1), dtype=np.uint32), key)[0, 0]
    assert 0 <= radius_word < 2**32 and both[0] != low[0]


def test_calls_go_on_and_never_repeat() -> None:
    generator = Philox(3)
    first, second = generator.randn((4, 8, 8)), generator.randn((4, 8, 8))
    assert torch.equal(first, Philox(3).randn((4, 8, 8))) and not torch.equal(first, second)
    assert torch.equal(Philox(3).randn((2, 2)).flatten(), first.flatten()[:4])  # numbers have places, not order


def test_they_are_normal() -> None:
    """Mean and variance of n = 2^16 numbers, within 5 standard deviations: 1 / sqrt(n) and sqrt(2 / n)."""
    x = Philox(1).randn((1 << 16,)).double()
    assert abs(float(x.mean())) < 5 / 256 and abs(float(x.var()) - 1) < 5 * (2 / 65536) ** 0.5
