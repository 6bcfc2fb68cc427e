"""The normal numbers of CUDA's `torch.randn`, computed on any machine.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3 and table
2) is a function of a counter and a key, so that each number is computed alone. cuRAND gives thread i the counter
(call, 0, i, 0) and the key (seed's low word, seed's high word), and takes the first two words of the result to a
normal number by Box and Muller 1958. A1111 does the same in modules/rng_philox.py, which it calls "NV".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Words = NDArray[np.uint32]

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
INCREMENTS = (np.uint32(0x9E3779B9), np.uint32(0xBB67AE85))  # of the key: the golden ratio, sqrt(3) - 1
ROUNDS = 10
# cuRAND's constants are rounded to fp32: 2^-32, and 2^-32 times 2 pi.
UNIT = float(np.float32(2.3283064e-10))
ANGLE = float(np.float32(2.3283064e-10 * 6.2831855))


def philox4x32(counter: Words, key: Words) -> Words:
    """Ten rounds of Philox.

    Args:
        counter: `[4, N]` uint32.
        key: `[2, N]` uint32, broadcast along N.

    Returns:
        `[4, N]` uint32.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        low, high = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # uint64: the whole products
        c0, c1, c2, c3 = _high(high) ^ c1 ^ k0, _low(high), _high(low) ^ c3 ^ k1, _low(low)
        with np.errstate(over="ignore"):  # the key counts modulo 2^32
            k0, k1 = k0 + INCREMENTS[0], k1 + INCREMENTS[1]
    return np.stack([c0, c1, c2, c3])


def _low(product: NDArray[np.uint64]) -> Words:
    return (product & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def _high(product: NDArray[np.uint64]) -> Words:
    return (product >> np.uint64(32)).astype(np.uint32)


class Philox:
    """A generator whose n-th call of `randn` gives what the n-th `torch.randn` on CUDA gives after `manual_seed(seed)`.

    CUDA computes in fp32, with an error of a few units in the last place; here float64 is rounded once, as in A1111.
    On CUDA a tensor with more numbers than the device runs threads (tens of thousands and more) is numbered by the
    device; this is numbered as on a device large enough, as A1111's is.
    """

    def __init__(self, seed: int):
        self.seed, self.calls = seed, 0

    def randn(self, shape: Sequence[int]) -> torch.Tensor:
        """Standard normal numbers of `shape`, fp32 on the CPU."""
        count = math.prod(shape)
        counter = np.zeros((4, count), dtype=np.uint32)
        counter[0] = self.calls
        counter[2] = np.arange(count, dtype=np.uint32)
        key = np.array([[self.seed & 0xFFFFFFFF], [self.seed >> 32 & 0xFFFFFFFF]], dtype=np.uint32)
        self.calls += 1
        words = philox4x32(counter, key)
        radius = np.sqrt(-2.0 * np.log(words[0] * UNIT + UNIT / 2))
        normal = radius * np.sin(words[1] * ANGLE + ANGLE / 2)
        return torch.from_numpy(normal.astype(np.float32).reshape(tuple(shape)))
