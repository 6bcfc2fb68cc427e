"""Which keys of a diffusers folder each parameter of a model is made from.

The models' parameters carry the folder's names, but for two things. A `Linear` with `parts` stacks several of the
folder's matrices; and what is a `Linear` there or a 1 x 1 convolution is a `Linear` here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fastsd.model.layers import Linear

# Older folders name the VAE's attention in a way of their own.
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Text encoders that transformers flattened. TAESD has encoder.layers.0.conv, of which this is to keep clear.
_FLAT_TEXT = re.compile(r"(embeddings|final_layer_norm|encoder\.layers\.\d+\.(self_attn|mlp|layer_norm\d))\.")
# Linear here, stored as a 1 x 1 convolution; proj_in and proj_out only where the UNet's config says so.
ALWAYS_CONVOLUTION = ("conv_shortcut", "quant_conv", "post_quant_conv")
MAYBE_CONVOLUTION = ("proj_in", "proj_out")


@dataclass(frozen=True)
class Source:
    """A run of rows of a parameter, and the key that it is stored under."""

    key: str
    rows: slice
    shape: tuple[int, ...]  # of those rows, as the model holds them


def sources(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, list[Source]]]:
    """Every parameter of `module` with the keys it is made from, in order of its rows."""
    for name, parameter in module.named_parameters():
        path, _, kind = name.rpartition(".")
        owner = module.get_submodule(path)
        if not isinstance(owner, Linear) or not owner.parts:
            yield name, parameter, [Source(name, slice(None), tuple(parameter.shape))]
            continue
        parent = path.rpartition(".")[0]
        found, row = [], 0
        for part, size in zip(owner.parts, owner.part_sizes, strict=True):
            key = ".".join(filter(None, (parent, part, kind)))
            found.append(Source(key, slice(row, row + size), (size, *parameter.shape[1:])))
            row += size
        yield name, parameter, found


def canonical(key: str) -> str:
    """The name by which `sources` knows a stored key (old VAE names, transformers' flattened text encoders)."""
    head, _, kind = key.rpartition(".")
    if ".attentions." in head and head.rpartition(".")[2] in OLD_VAE_ATTENTION:
        head, _, old = head.rpartition(".")
        return f"{head}.{OLD_VAE_ATTENTION[old]}.{kind}"
    if _FLAT_TEXT.match(key):
        return f"text_model.{key}"
    return key


def is_ignored(key: str) -> bool:
    """Stored keys that carry no weights: position numbers of old text encoders."""
    return key.endswith("position_ids")


def same_matrix(stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Equal shapes, or a 1 x 1 convolution where a matrix is wanted."""
    return stored == wanted or (len(wanted) == 2 and stored == (*wanted, 1, 1))


def stored_form(key: str, tensor: torch.Tensor, use_linear_projection: bool) -> torch.Tensor:
    """`tensor` in the shape that a folder stores under `key`."""
    layer = key.split(".")[-2]
    convolution = layer in ALWAYS_CONVOLUTION or (layer in MAYBE_CONVOLUTION and not use_linear_projection)
    return tensor[:, :, None, None] if convolution and tensor.ndim == 2 else tensor
