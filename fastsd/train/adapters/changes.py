"""Trainable changes of one weight: low-rank products and Kronecker products, computed on activations.

`fastsd.weights.adapters.arithmetic` says what the tensors mean in a file; here the same tensors are parameters. The
change of a weight is never formed in a step: its product with the input is, which costs rank * (in + out) a token
instead of in * out, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from fastsd.kernels.conv2d import Padding, conv2d
from fastsd.kernels.linear import linear

# The tensors of a layer in a file, by role (`fastsd.weights.adapters.roles`).
Tensors = dict[str, torch.Tensor]


class WeightChange(nn.Module):
    """A change of a weight `[out, in]`, or `[out, in, k, k]` of a convolution with `stride` and `padding`.

    Attributes:
        shape: of the weight.
        rank, alpha: as given; `scale` multiplies the change, alpha / rank (Hu et al. 2021, section 4.1).
    """

    def __init__(self, shape: tuple[int, ...], rank: int, alpha: float, stride: int = 1, padding: Padding = (0,) * 4):
        super().__init__()
        self.shape, self.rank, self.alpha = shape, rank, alpha
        self.stride, self.padding = stride, padding

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def matrix(self) -> torch.Tensor:
        """The change, in the shape of the weight, scaled."""
        raise NotImplementedError

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """What the change adds to the layer's product of `x` `[..., in]`."""
        raise NotImplementedError

    def tensors(self) -> Tensors:
        """By role, without alpha: what a file stores."""
        raise NotImplementedError

    def _product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        weight = weight.to(x.dtype)
        return linear(x, weight) if weight.ndim == 2 else conv2d(x, weight, None, self.stride, self.padding)


class LowRankChange(WeightChange):
    """LoRA: scale * up down. `down` `[rank, in]` or `[rank, in, k, k]`; `up` `[out, rank]`, zero at first."""

    def __init__(
        self,
        shape: tuple[int, ...],
        rank: int,
        alpha: float,
        generator: torch.Generator,
        stride: int = 1,
        padding: Padding = (0,) * 4,
    ):
        super().__init__(shape, rank, alpha, stride, padding)
        self.down = nn.Parameter(_uniform((rank, *shape[1:]), generator))
        self.up = nn.Parameter(torch.zeros(shape[0], rank, dtype=torch.float32, device="cpu"))

    def matrix(self) -> torch.Tensor:
        return self.scale * (self.up @ self.down.flatten(1)).view(self.shape)

    def output(self, x: torch.Tensor) -> torch.Tensor:
        return linear(self._product(x, self.down) * self.scale, self.up.to(x.dtype))

    def tensors(self) -> Tensors:
        return {"down": self.down.detach(), "up": self.up.detach()}


class KroneckerChange(WeightChange):
    """LoKr: scale * (w1 kron w2) (Yeh et al. 2024, "LyCORIS", section 3.3).

    w1 is `[o1, i1]`; w2 is `[o2, i2]` or `[o2, i2, k, k]`, with out = o1 o2 and in = i1 i2. Where the rank is less than
    half of its larger side, w2 is a product w2_a w2_b of that rank. Otherwise both factors are full, and the scale is
    1, since alpha / rank means nothing then (LyCORIS).

    Args:
        factor: the sides of w1 come as close to it as the sizes allow; -1: to their square roots.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        rank: int,
        alpha: float,
        generator: torch.Generator,
        stride: int = 1,
        padding: Padding = (0,) * 4,
        factor: int = -1,
    ):
        super().__init__(shape, rank, alpha, stride, padding)
        (o1, o2), (i1, i2) = factors(shape[0], factor), factors(shape[1], factor)
        kernel = shape[2:]
        self.w1 = nn.Parameter(_uniform((o1, i1), generator))
        self.second_shape = (o2, i2, *kernel)
        self.full = rank >= max(o2, i2) / 2
        if self.full:
            self.w2 = nn.Parameter(torch.zeros(o2, i2, *kernel, dtype=torch.float32, device="cpu"))
        else:
            self.w2_a = nn.Parameter(_uniform((o2, rank), generator))
            self.w2_b = nn.Parameter(torch.zeros(rank, i2 * math.prod(kernel), dtype=torch.float32, device="cpu"))

    @property
    def scale(self) -> float:
        return 1.0 if self.full else self.alpha / self.rank

    def _second(self) -> torch.Tensor:
        return self.w2 if self.full else (self.w2_a @ self.w2_b).view(self.second_shape)

    def matrix(self) -> torch.Tensor:
        first = self.w1.view(*self.w1.shape, *(1,) * (len(self.shape) - 2))
        return self.scale * torch.kron(first, self._second().contiguous())

    def output(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (self.w1 * self.scale).to(x.dtype), self._second()
        x = x.unflatten(-1, (first.shape[1], -1))  # [..., i1, i2]
        if second.ndim == 2:
            y = self._product(x, second)  # [..., i1, o2]
        else:  # each of the i1 groups of channels is a map of its own
            batch, height, width, groups, channels = x.shape
            maps = x.permute(0, 3, 1, 2, 4).reshape(batch * groups, height, width, channels)
            y = self._product(maps, second).unflatten(0, (batch, groups)).permute(0, 2, 3, 1, 4)
        return linear(y.transpose(-1, -2), first).transpose(-1, -2).flatten(-2)  # [..., o1 o2]

    def tensors(self) -> Tensors:
        stored = {"kron_w1": self.w1, "kron_w2": self.w2} if self.full else {
            "kron_w1": self.w1, "kron_w2_a": self.w2_a, "kron_w2_b": self.w2_b,
        }  # fmt: skip
        return {role: tensor.detach() for role, tensor in stored.items()}


# What makes a change, by its name in a config.
KINDS: dict[str, Callable[..., WeightChange]] = {"lora": LowRankChange, "lokr": KroneckerChange}


def factors(size: int, factor: int = -1) -> tuple[int, int]:
    """Two factors of `size`, the smaller first: `factor` and its cofactor, or the divisor nearest below it.

    LyCORIS's rule (`factorization`), so that its files and ours have the same shapes. -1 stands for no limit: the two
    are then as close to each other as the divisors of `size` allow.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = size if factor < 0 else factor
    first = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0 and d <= max(limit, 1))
    return first, size // first


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Kaiming's uniform initialisation with a = sqrt(5), as PyTorch's layers and other trainers of LoRAs have it."""
    bound = math.prod(shape[1:]) ** -0.5
    return torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
