"""LoRAs of cloneofsimo's `lora` (2022), whose files name no layers: their tensors stand in the order of the modules.

`extract_lora_ups_down` of that program walks the modules of diffusers: in the UNet the attention modules and the first
half of the feed-forward (GEGLU), down blocks first, then up blocks, then the middle; in the text encoder k, v, q and
out of each layer. diffusers of that time had the feed-forward between the two attentions; later versions have it last,
and the first LoRAs were without it. The sizes tell which of the three it was.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from fastsd.errors import FastsdError
from fastsd.weights.adapters.file import AdapterLayer, Pair

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_BLOCK = re.compile(r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?attentions\.(\d+)\.transformer_blocks\.(\d+)\.")
_STAGES = ("down_blocks", "up_blocks", "mid_block")
_ORDERS = (("attn1", "ff", "attn2"), ("attn1", "attn2", "ff"), ("attn1", "attn2"))
_TEXT = re.compile(r"(text_model\.encoder\.layers\.)(\d+)\.self_attn\.k_proj")


def orders(network: str, layers: Collection[str]) -> list[list[str]]:
    """The layers of a network in each order that files of this kind have.

    Args:
        network: "unet" or a text encoder.
        layers: all layers of the network.
    """
    if network != "unet":
        found = sorted((match for match in map(_TEXT.fullmatch, layers) if match), key=lambda match: int(match[2]))
        parts = ("k_proj", "v_proj", "q_proj", "out_proj")
        return [[f"{match[1]}{match[2]}.self_attn.{part}" for match in found for part in parts]]
    blocks = {match[0]: match for match in map(_BLOCK.match, layers) if match}
    ordered = sorted(blocks.values(), key=lambda m: (_STAGES.index(m[1]), int(m[2] or 0), int(m[3]), int(m[4])))
    return [
        [f"{block[0]}{layer}" for block in ordered for part in order for layer in _layers(part)] for order in _ORDERS
    ]


def _layers(part: str) -> list[str]:
    return ["ff.net.0.proj"] if part == "ff" else [f"{part}.{name}" for name in _ATTENTION]


def named_layers(
    network: str, pairs: Sequence[Pair], shapes: Mapping[str, Mapping[str, tuple[int, ...]]], path: object
) -> list[AdapterLayer]:
    """The layers of a file, by the name of each.

    Args:
        network: "unet", "text_encoder", or "" where the file does not say.
        pairs: in the file's order.
        shapes: of every layer's weight, by network.
        path: the file, for messages.

    Raises:
        FastsdError: no order fits.
    """
    networks = [network] if network in shapes else list(shapes)
    for name in networks:
        for order in orders(name, shapes[name]):
            if len(order) == len(pairs) and all(_fits(pair, shapes[name][key]) for key, pair in zip(order, pairs)):
                return [AdapterLayer(f"{name}.{key}", pair) for key, pair in zip(order, pairs)]
    counts = ", ".join(f"{name} {len(order)}" for name in networks for order in orders(name, shapes[name]))
    raise FastsdError(
        f"{len(pairs)} layers without names, by their order (cloneofsimo's lora), which do not fit this model's "
        f"({counts}); is it for another model?",
        path=path,
    )


def _fits(pair: Pair, shape: tuple[int, ...]) -> bool:
    up, down = pair["up"].shape, pair["down"].shape
    return len(up) == len(down) == 2 and (up[0], down[1]) == shape[:2] and up[1] == down[0]
