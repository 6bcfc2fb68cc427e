"""The keys of a diffusers folder that each parameter of a model is made from.

The models' parameters carry the folder's names, with two exceptions. A `Linear` with `parts` stacks several of the
folder's matrices; and what a folder stores as a matrix or as a 1 x 1 convolution is always a `Linear` here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fastsd.model.layers import Linear

# The names that older folders use in the VAE's attention.
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Keys of text encoders that transformers saves without `text_model.`. TAESD's encoder.layers.0.conv must not match.
_FLAT_TEXT = re.compile(r"(embeddings|final_layer_norm|encoder\.layers\.\d+\.(self_attn|mlp|layer_norm\d))\.")
# Linear here, stored as a 1 x 1 convolution: the first group always, the second unless the UNet's config says linear.
ALWAYS_CONVOLUTION = ("conv_shortcut", "quant_conv", "post_quant_conv")
MAYBE_CONVOLUTION = ("proj_in", "proj_out")


@dataclass(frozen=True)
class Source:
    """A range of a parameter's rows, and the key that stores them."""

    key: str
    rows: slice
    shape: tuple[int, ...]  # of those rows, as the model holds them


def sources(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, list[Source]]]:
    """Every parameter of `module` with the sources it is made from, in the order of its rows."""
    for name, parameter in module.named_parameters():
        path, _, kind = name.rpartition(".")
        owner = module.get_submodule(path)
        if not isinstance(owner, Linear) or not owner.parts:
            yield name, parameter, [Source(name, slice(None), tuple(parameter.shape))]
            continue
        parent = path.rpartition(".")[0]
        stacked, row = [], 0
        for part, size in zip(owner.parts, owner.part_sizes, strict=True):
            key = ".".join(filter(None, (parent, part, kind)))
            stacked.append(Source(key, slice(row, row + size), (size, *parameter.shape[1:])))
            row += size
        yield name, parameter, stacked


def folder_keys(module: nn.Module) -> list[str]:
    """Every key that a folder stores of a model."""
    return [source.key for _, _, parts in sources(module) for source in parts]


def canonical_key(key: str) -> str:
    """The name that `sources` uses for a stored key, which may have older names of the VAE or flat ones of the text."""
    head, _, kind = key.rpartition(".")
    if ".attentions." in head and head.rpartition(".")[2] in OLD_VAE_ATTENTION:
        head, _, old = head.rpartition(".")
        return f"{head}.{OLD_VAE_ATTENTION[old]}.{kind}"
    if _FLAT_TEXT.match(key):
        return f"text_model.{key}"
    return key


def is_ignored(key: str) -> bool:
    """Whether a stored key holds no weights: the position ids of old text encoders."""
    return key.endswith("position_ids")


def same_matrix(stored: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether the shapes are equal, or a 1 x 1 convolution is stored for a matrix."""
    return stored == expected or (len(expected) == 2 and stored == (*expected, 1, 1))


def stored_form(key: str, tensor: torch.Tensor, use_linear_projection: bool) -> torch.Tensor:
    """`tensor` in the shape that a folder stores under `key`."""
    layer = key.split(".")[-2]
    convolution = layer in ALWAYS_CONVOLUTION or (layer in MAYBE_CONVOLUTION and not use_linear_projection)
    return tensor[:, :, None, None] if convolution and tensor.ndim == 2 else tensor
