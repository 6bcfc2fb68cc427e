"""What one call of the UNet does otherwise than a plain one: FreeU, perturbed attention, DeepCache."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch

from fastsd.kernels import dispatch


@dataclass(frozen=True)
class Perturbation:
    """Self-attentions that are replaced by the identity (Ahn et al. 2024, section 3.2).

    Attributes:
        samples: how many of the batch's, the first.
        attentions: the numbers of the self-attentions, in order of use.
    """

    samples: int
    attentions: frozenset[int]


@dataclass(frozen=True, eq=False)
class DeepCache:
    """The map that enters an expanding block, kept from one call for later ones (Ma et al. 2024, section 3.2).

    Attributes:
        branch: the number of the skip connection that this block reads; the ones before it are computed in every call.
        features: `[B, h, w, C]`, see `UNet.deep_shape`; written by a call that computes everything.
        reuses: this call reads them instead.
    """

    branch: int
    features: torch.Tensor
    reuses: bool = False


@dataclass(frozen=True, eq=False)
class CallOptions:
    """Attributes:
    freeu: `[4]` fp32, b1, b2, s1, s2 (Si et al. 2024), or None.
    perturbed: or None.
    deep: or None.
    """

    freeu: torch.Tensor | None = None
    perturbed: Perturbation | None = None
    deep: DeepCache | None = None

    @property
    def key(self) -> Hashable:
        """Equal for options that one captured graph serves."""
        deep = None if self.deep is None else (self.deep.branch, self.deep.reuses)
        return self.freeu is not None, self.perturbed, deep

    def buffers(self) -> CallOptions:
        """The same with tensors of its own."""
        freeu, deep = self.freeu, self.deep
        return CallOptions(
            None if freeu is None else freeu.clone(),
            self.perturbed,
            None if deep is None else replace(deep, features=deep.features.clone()),
        )

    def enter(self, x: torch.Tensor, skip: torch.Tensor, level: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What an expanding block reads: `x` and `skip` `[B, h, w, C]`, as FreeU weights them.

        level: of the expanding path, 0 the lowest. number: of the skip connection.
        """
        if self.deep is not None and self.deep.branch == number and not self.deep.reuses:
            self.deep.features.copy_(x)
        if self.freeu is None or level > 1:
            return x, skip
        backbone, low = self.freeu[level].to(x.dtype), self.freeu[2 + level]
        half = x.shape[-1] // 2
        x = torch.cat([x[..., :half] * backbone, x[..., half:]], dim=-1)
        wide = dispatch.widen(skip)
        return x, (wide + (low - 1) * low_frequencies(wide)).to(skip.dtype)


PLAIN = CallOptions()


def low_frequencies(x: torch.Tensor) -> torch.Tensor:
    """The part of a map `[B, h, w, C]` with frequency 0 or -1 along each side, its real part.

    These are the frequencies that FreeU's filter scales (Si et al. 2024, equations 6 to 8, with the threshold of 1 that
    its authors and diffusers use). They are four at most, so two thin products stand for the Fourier transform.
    """
    _, height, width, _ = x.shape
    rows, columns = (2 * math.pi / n * torch.arange(n, device=x.device, dtype=x.dtype) for n in (height, width))
    angles = [k * rows[:, None] + m * columns for k in (0, 1)[:height] for m in (0, 1)[:width]]
    flat = torch.stack(angles).flatten(1)  # [frequencies, h * w]
    waves = torch.cat([flat.cos(), flat.sin()])
    tokens = x.flatten(1, 2)
    return (waves.T @ (waves @ tokens) / (height * width)).view(x.shape)
