"""Textual inversion (Gal et al. 2022): files that hold vectors for the text encoders in place of a word's.

Three forms: A1111's `.pt`, vectors under `string_to_param`; one key in a `.safetensors` or `.bin` (diffusers); and
`clip_l` with `clip_g` in a `.safetensors` (SDXL). `.pt` and `.bin` are pickles: they are read only where the caller
allows it, and even then nothing but tensors and plain values is unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fastsd.components import Embedding
from fastsd.errors import FastsdError
from fastsd.model.clip import TextEncoder
from fastsd.weights.formats.pickle_file import open_pickle, tensors_in
from fastsd.weights.formats.safetensors_file import read_header

SUFFIXES = (".safetensors", ".pt", ".bin")
MAX_BYTES = 64 * 2**20  # 75 vectors of SDXL in fp32 are 0.6 MB
SDXL_KEYS = ("clip_l", "clip_g")
_KEY_WITHOUT_NAME = "emb_params"  # what A1111 writes where diffusers writes the token


def load_embedding(
    path: str | Path, encoders: Sequence[TextEncoder], token: str | None = None, allow_pickle: bool = False
) -> Embedding:
    """Read a textual inversion for the given text encoders.

    Args:
        path: a `.safetensors`, `.pt` or `.bin` file.
        encoders: of the checkpoint, in its order.
        token: what stands for it in a prompt; None: the file's name without its ending, and the token that a one-key
            file names.
        allow_pickle: read `.pt` and `.bin` files.

    Raises:
        FastsdError: no such file, malformed, no embedding, or one for another family; one line with file and reason.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise FastsdError(f"{path}: not an embedding; expected a file that ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FastsdError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
    if path.stat().st_size > MAX_BYTES:
        raise FastsdError(f"{path}: {path.stat().st_size >> 20} MB; an embedding has at most {MAX_BYTES >> 20} MB")
    if path.suffix.lower() == ".safetensors":
        found = {key: entry.read() for key, entry in read_header(path)[0].items()}
    else:
        found = _unpickle(path, allow_pickle)
    names = [path.stem] if token is None else [token]
    if token is None and len(found) == 1 and next(iter(found)) not in ("*", _KEY_WITHOUT_NAME, *SDXL_KEYS):
        names.append(next(iter(found)))
    if not all(name.strip() and len(name) <= 200 for name in names):
        raise FastsdError(f"{path}: the token {names[-1][:40]!r} should be a text of 1 to 200 characters")
    return Embedding(tuple(dict.fromkeys(names)), _vectors(path, found, encoders))


def _unpickle(path: Path, allow_pickle: bool) -> dict[str, torch.Tensor]:
    """The tensors of a pickle, by name."""
    content, sizes = open_pickle(path, allow_pickle)
    inner = content.get("string_to_param", content) if isinstance(content, dict) else None
    if not isinstance(inner, dict):
        raise FastsdError(f"{path}: not an embedding; expected tensors, or string_to_param that holds them")
    return {key: entry.read() for key, entry in tensors_in(path, inner, sizes).items()}


def _vectors(path: Path, found: dict[str, torch.Tensor], encoders: Sequence[TextEncoder]) -> tuple[torch.Tensor, ...]:
    """The vectors of each encoder, checked."""
    widths = [encoder.config.hidden_size for encoder in encoders]
    if set(SDXL_KEYS) & set(found):
        wanted = SDXL_KEYS if len(widths) == 2 else SDXL_KEYS[1:]  # SDXL's refiner reads bigG alone
        missing = [key for key in wanted if key not in found]
        if missing:
            raise FastsdError(f"{path}: the key {missing[0]} is missing beside {', '.join(sorted(found))}"[:300])
        tensors = [found[key] for key in wanted]
        shapes = ", ".join(f"{key} {list(found[key].shape)}" for key in wanted)
    elif len(found) == 1:
        tensors = list(found.values())
        shapes = str(list(tensors[0].shape))
    else:
        keys = ", ".join(key[:40] for key in list(found)[:3])
        raise FastsdError(f"{path}: not an embedding: {len(found)} tensors ({keys}) where one is expected")
    tensors = [tensor[None] if tensor.ndim == 1 else tensor for tensor in tensors]
    fits = len(tensors) == len(widths) and all(t.ndim == 2 and t.shape[1] == w for t, w in zip(tensors, widths))
    if not fits:
        reads = " and ".join(f"[n, {width}]" for width in widths)
        raise FastsdError(f"{path}: an embedding for another family: {shapes}, where this model reads {reads}")
    if len({len(tensor) for tensor in tensors}) != 1 or not all(
        t.is_floating_point() and 1 <= len(t) <= 75 and bool(torch.isfinite(t.float()).all()) for t in tensors
    ):
        raise FastsdError(f"{path}: its vectors should be 1 to 75, as many for each encoder, of finite numbers")
    return tuple(tensor.detach().float().clone() for tensor in tensors)
