"""What a file of tensors is that is no checkpoint: an adapter, an embedding, a network alone, or of another program."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from fastsd.errors import FastsdError
from fastsd.weights.adapters.embeddings import SDXL_KEYS
from fastsd.weights.adapters.file import read_adapter
from fastsd.weights.formats.safetensors_file import TensorEntry
from fastsd.weights.layouts.upscaler_names import describe_upscaler

Signs = tuple[tuple[tuple[str, ...], str], ...]  # patterns, each of which must be found in some key; the kind

# Files whose keys could be taken for an adapter's.
_BEFORE_ADAPTERS: Signs = (
    ((r"^control_model\.|^controlnet_cond_embedding\.|^input_hint_block\.",), "a ControlNet; use it with --control"),
    ((r"^lora_controlnet$|^control_model\..*lora",), "a ControlLoRA, which fastsd does not read"),
    ((r"^(adapter\.)?body\.\d+\.(block|in_conv|resnets)",), "a T2I-Adapter; use it with --control"),
    ((r"^ip_adapter\.|^image_proj\.",), "an IP-Adapter, which fastsd does not read"),
    ((r"motion_modules\.|temporal_transformer\.",), "AnimateDiff's motion modules, which fastsd does not read"),
    ((r"double_blocks\.|joint_blocks\.|single_transformer_blocks\.",), "a model of Flux or Stable Diffusion 3"),
)
_OTHERS: Signs = (
    ((r"^(decoder|encoder)\.layers\.\d+\.(conv|weight)",), "TAESD, the tiny autoencoder; use it with --vae"),
    ((r"^3\.conv\.0\.weight$",), "one half of TAESD, the tiny autoencoder; use it with --vae"),
    (
        (r"^(first_stage_model\.)?decoder\.(conv_in|mid)\.", r"^(first_stage_model\.)?encoder\.(conv_in|down)\."),
        "an autoencoder (VAE); use it with --vae",
    ),
    ((r"^(first_stage_model\.)?decoder\.conv_in\.",), "the decoder of an autoencoder (VAE)"),
    ((r"^vision_model\.|visual\.transformer\.",), "CLIP's image encoder, which fastsd does not use"),
    (
        (r"^(text_model\.)?encoder\.layers\.\d+\.self_attn\.|^transformer\.resblocks\.|^transformer\.text_model\.",),
        "a text encoder (CLIP) alone; a model needs its UNet too",
    ),
    ((r"^encoder\.block\.\d+\.layer\.",), "a T5 text encoder, which Stable Diffusion 1, 2 and XL do not have"),
    (
        (r"^(model\.diffusion_model\.)?input_blocks\.\d+\.|^down_blocks\.\d+\.(resnets|attentions)\.",),
        "a UNet alone; a model needs its text encoder and autoencoder too",
    ),
)
_WIDTHS = {768: "SD 1", 1024: "SD 2", 1280: "the SDXL refiner", 2048: "SDXL"}
_KINDS = (  # of adapters, by a role
    ("w1_a", "LoHa"),
    ("kron", "LoKr"),
    ("glora_a1", "GLoRA"),
    ("oft_blocks", "OFT"),
    ("oft_vectors", "OFT"),
    ("scaling", "IA3"),
    ("factors", "IA3"),
    ("magnitude", "DoRA"),
    ("up", "LoRA"),
    ("down", "LoRA"),
    ("difference", "differences of weights"),
    ("bias_difference", "differences of biases"),
    ("replacement", "whole weights"),
)


def recognise(path: Path, entries: Mapping[str, TensorEntry], allow_pickle: bool = False) -> list[tuple[str, str]]:
    """Facts on a file that is no checkpoint; empty if it is nothing that is known here.

    Args:
        path, allow_pickle: the file.
        entries: its tensors.
    """
    if (kind := _embedding(entries)) is not None:
        return [("kind", kind)]
    if (kind := _shown(_BEFORE_ADAPTERS, entries) or describe_upscaler(entries)) is not None:
        return [("kind", kind)]
    try:
        return _adapter(path, allow_pickle)
    except FastsdError as error:
        named = [("kind", str(error.message))] if "which fastsd does not read" in error.message else []
    kind = _shown(_OTHERS, entries)
    return named if kind is None else [("kind", kind)]


def _shown(signs: Signs, keys: Iterable[str]) -> str | None:
    """The first kind whose patterns the keys show."""
    return next(
        (kind for patterns, kind in signs if all(any(re.search(p, key) for key in keys) for p in patterns)), None
    )


def embedding_kind(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What an embedding is, by the shapes of its vectors."""
    if set(shapes) & set(SDXL_KEYS):
        base = "SDXL" if len(shapes) == 2 else "the SDXL refiner" if "clip_g" in shapes else "one encoder of SDXL"
    else:
        width = next(iter(shapes.values()))[-1]
        base = _WIDTHS.get(width, f"text encoders of width {width}")
    shape = next(iter(shapes.values()))
    count = 1 if len(shape) == 1 else shape[0]
    return f"a textual inversion for {base}, {count} vector{'s' * (count != 1)}; use it with --embedding"


def _embedding(entries: Mapping[str, TensorEntry]) -> str | None:
    shapes = {key: entry.shape for key, entry in entries.items()}
    named = set(shapes) <= set(SDXL_KEYS)
    alone = len(shapes) == 1 and not any("." in key and key[0] != "<" for key in shapes)
    if not shapes or not (named or alone) or not all(1 <= len(shape) <= 2 for shape in shapes.values()):
        return None
    return embedding_kind(shapes)


def _adapter(path: Path, allow_pickle: bool) -> list[tuple[str, str]]:
    file = read_adapter(path, allow_pickle)
    kinds: Counter[str] = Counter()
    ranks: Counter[int] = Counter()
    widths = set()
    networks: Counter[str] = Counter()
    for layer in file.layers:
        roles = layer.entries
        kinds[next((kind for start, kind in _KINDS if any(role.startswith(start) for role in roles)), "?")] += 1
        down = roles.get("down") or roles.get("w1_b")
        if down is not None and len(down.shape) >= 2:
            ranks[down.shape[0]] += 1
        if down is not None and re.search(r"attn2[._]to_k$", layer.name) and len(down.shape) >= 2:
            widths.add(down.shape[1])
        networks[_network(layer.name)] += 1
    for network, pairs in file.ordered:
        kinds["LoRA without names (cloneofsimo's lora)"] += len(pairs)
        networks[network or "a network that the file does not name"] += len(pairs)
    facts = [("kind", f"an adapter: {', '.join(kinds) or 'embeddings alone'}; use it with --lora")]
    facts += [("layers", ", ".join(f"{count} of {network}" for network, count in networks.items()) or "none")]
    if ranks:
        facts.append(("ranks", ", ".join(str(rank) for rank, _ in ranks.most_common(6))))
    if len(widths) == 1:
        width = widths.pop()
        facts.append(("base", _WIDTHS.get(width, f"a model with {width} features of text")))
    if file.embeddings:
        facts.append(("embeddings", ", ".join(file.embeddings)))
    return facts + [("note", note) for note in file.notes]


def _network(name: str) -> str:
    if re.match(r"lora_te2|text_encoder_2|text_encoders\.clip_g|clip_g", name):
        return "the second text encoder"
    if re.match(r"lora_te|text_encoder|text_encoders|clip_|(base_model\.model\.)?(text_model|encoder)\.", name):
        return "the text encoder"
    return "the UNet"
