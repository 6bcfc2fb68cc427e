"""What the UNet does otherwise in each row: FreeU, perturbed attention, DeepCache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastsd.generate.guidance import perturbed_attentions
from fastsd.generate.request import Pass
from fastsd.generate.samples import PERTURBED, RowSamples
from fastsd.generate.tables import numbers_of
from fastsd.model.call_options import CallOptions, DeepCache, Perturbation
from fastsd.model.unet import UNet


def options_by_row(stage: Pass, unet: UNet, samples: Sequence[RowSamples], x: torch.Tensor) -> list[CallOptions]:
    """The options of each row. They are the first checkpoint's; the refiner runs plainly.

    Args:
        samples: of each row.
        x: the latents of the batch, `[n, h, w, C]`.
    """
    settings, rows = stage.settings, samples[: stage.refiner_row]
    freeu = None if settings.freeu is None else x.new_tensor(numbers_of(settings.freeu), dtype=torch.float32)
    attentions = perturbed_attentions(unet, settings.pag_layers) if settings.pag_scale else frozenset()
    whole, features = whole_rows(rows, settings.deepcache or 1), None
    if len(whole) < len(rows):
        most = max(len(one.roles) for one in rows) * len(x)
        shape = unet.deep_shape(settings.deepcache_branch, most, *x.shape[1:3])
        features = torch.zeros(shape, dtype=unet.conv_in.weight.dtype, device=x.device)
    found = []
    for row, one in enumerate(rows):
        perturbed = Perturbation(len(x), attentions) if PERTURBED in one.roles else None
        deep = None
        if features is not None:
            own = features[: len(one.roles) * len(x)]
            deep = DeepCache(settings.deepcache_branch, own, reuses=row not in whole)
        found.append(CallOptions(freeu, perturbed, deep))
    return found + [CallOptions()] * (len(samples) - len(rows))


def whole_rows(samples: Sequence[RowSamples], interval: int) -> frozenset[int]:
    """The rows in which the whole UNet runs: every one of `interval`, and wherever other samples run than before."""
    found, last = set[int](), 0
    for row, one in enumerate(samples):
        if row - last == interval or row == 0 or one.roles != samples[row - 1].roles:
            found.add(row)
            last = row
    return frozenset(found)
