"""Textual inversion files (Gal et al. 2022): vectors that replace a word's embedding in the text encoders.

There are three forms: A1111's `.pt`, with vectors under `string_to_param` (a dict, or the ParameterDict of the first
trainers); one key in a `.safetensors` or `.bin` (diffusers); and `clip_l` with `clip_g` in a `.safetensors` (SDXL).
`.pt` and `.bin` are pickles: they are read only if the caller allows it, and then only tensors and plain values are
unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from fastsd.components import TextualInversion
from fastsd.errors import FastsdError
from fastsd.files import check_path, write_whole
from fastsd.model.clip import TextEncoder
from fastsd.weights.formats.pickle_file import is_pickle, open_pickle, tensors_in
from fastsd.weights.formats.pickle_globals import ParameterTable
from fastsd.weights.formats.safetensors_file import TensorEntry, looks_like_safetensors, read_header

SUFFIXES = (".safetensors", ".pt", ".bin")
MAX_BYTES = 64 * 2**20  # 75 vectors of SDXL in fp32 are 0.6 MB
SDXL_KEYS = ("clip_l", "clip_g")
_KEY_WITHOUT_NAME = "emb_params"  # A1111 writes this in place of the token that diffusers writes


def load_embedding(
    path: str | Path, encoders: Sequence[TextEncoder], token: str | None = None, allow_pickle: bool = False
) -> TextualInversion:
    """Read a textual inversion for the given text encoders.

    Args:
        path: a `.safetensors`, `.pt` or `.bin` file.
        encoders: of the checkpoint, in its order.
        token: the word for it in prompts; None: the file's name without suffix, and the token in a one-key file.
        allow_pickle: read `.pt` and `.bin` files.

    Raises:
        FastsdError: no such file, malformed, not an embedding, or for another family; one line with file and reason.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise FastsdError(f"not an embedding; expected a file that ends in {', '.join(SUFFIXES)}", path=path)
    if not path.is_file():
        check_path(path)
        raise FastsdError("no such file" if not path.exists() else "not a file", path=path)
    if path.stat().st_size > MAX_BYTES:
        raise FastsdError(f"{path.stat().st_size >> 20} MB; an embedding has at most {MAX_BYTES >> 20} MB", path=path)
    if not is_pickle(path) and (path.suffix.lower() == ".safetensors" or looks_like_safetensors(path)):
        tensors = {key: entry.read() for key, entry in read_header(path)[0].items()}
    else:
        tensors = _unpickle(path, allow_pickle)
    names = [path.stem] if token is None else [token]
    if token is None and len(tensors) == 1 and next(iter(tensors)) not in ("*", _KEY_WITHOUT_NAME, *SDXL_KEYS):
        names.append(next(iter(tensors)))
    if not all(name.strip() and len(name) <= 200 for name in names):
        raise FastsdError(f"the token {names[-1][:40]!r} should be a text of 1 to 200 characters", path=path)
    return TextualInversion(tuple(dict.fromkeys(names)), read_vectors(path, tensors, encoders))


def write_embedding(path: Path, token: str, vectors: Sequence[torch.Tensor], overwrite: bool = False) -> None:
    """Write a textual inversion: of one text encoder under its token, which diffusers and A1111 read; of SDXL's two
    as `clip_l` and `clip_g`.

    Args:
        vectors: `[n, hidden]` for each text encoder, written in fp32.

    Raises:
        FastsdError: values that are not finite, or an existing file.
    """
    if not all(bool(vector.isfinite().all()) for vector in vectors):
        raise FastsdError("the vectors hold NaN or infinite values; not written", path=path)
    keys = (token,) if len(vectors) == 1 else SDXL_KEYS
    tensors = {key: vector.detach().float().cpu().contiguous() for key, vector in zip(keys, vectors, strict=True)}
    try:
        write_whole(path, save(tensors, {"format": "pt"}), overwrite)
    except FileExistsError as error:
        raise FastsdError("exists; it is not replaced", path=path) from error


def vectors_of(content: Any) -> Any:
    """The table of vectors in what a pickle holds: A1111's, that of the first trainers, or the content itself."""
    inner = content.get("string_to_param", content) if isinstance(content, dict) else None
    return getattr(inner, "tensors", {}) if isinstance(inner, ParameterTable) else inner


def _unpickle(path: Path, allow_pickle: bool) -> dict[str, torch.Tensor]:
    """The tensors of a pickle, by name."""
    content, sizes = open_pickle(path, allow_pickle)
    inner = vectors_of(content)
    if not isinstance(inner, dict):
        raise FastsdError("not an embedding; it should hold tensors, or string_to_param with tensors", path=path)
    return {key: entry.read() for key, entry in tensors_in(path, inner, sizes).items()}


def read_bundled(
    path: Path, entries: Mapping[str, TensorEntry], encoders: Sequence[TextEncoder]
) -> tuple[torch.Tensor, ...]:
    """The checked vectors of an embedding that a LoRA brings along, fp32.

    Raises:
        FastsdError: as `read_vectors`, or larger than any embedding, which is not read.
    """
    for key, entry in entries.items():
        if entry.nbytes > MAX_BYTES:
            raise FastsdError(f"the key {key[:80]!r} is {list(entry.shape)}, larger than any embedding", path=path)
    return read_vectors(path, {key: entry.read() for key, entry in entries.items()}, encoders)


def read_vectors(
    path: Path, tensors: dict[str, torch.Tensor], encoders: Sequence[TextEncoder]
) -> tuple[torch.Tensor, ...]:
    """The checked vectors of each encoder, fp32.

    Raises:
        FastsdError: not vectors, or those of another family.
    """
    widths = [encoder.config.hidden_size for encoder in encoders]
    if set(SDXL_KEYS) & set(tensors):
        keys = SDXL_KEYS if len(widths) == 2 else SDXL_KEYS[1:]  # SDXL's refiner has only the second encoder
        missing = [key for key in keys if key not in tensors]
        if missing:
            raise FastsdError(f"the key {missing[0]} is missing beside {', '.join(sorted(tensors))}"[:300], path=path)
        vectors = [tensors[key] for key in keys]
        shapes = ", ".join(f"{key} {list(tensors[key].shape)}" for key in keys)
    elif len(tensors) == 1:
        vectors = list(tensors.values())
        shapes = str(list(vectors[0].shape))
    else:
        names = ", ".join(key[:40] for key in list(tensors)[:3])
        raise FastsdError(f"not an embedding: it holds {len(tensors)} tensors ({names}), not one", path=path)
    vectors = [vector[None] if vector.ndim == 1 else vector for vector in vectors]
    fits = len(vectors) == len(widths) and all(v.ndim == 2 and v.shape[1] == w for v, w in zip(vectors, widths))
    if not fits:
        reads = " and ".join(f"[n, {width}]" for width in widths)
        raise FastsdError(f"an embedding for another family: {shapes}, this model reads {reads}", path=path)
    if len({len(vector) for vector in vectors}) != 1 or not all(
        v.is_floating_point() and 1 <= len(v) <= 75 and bool(torch.isfinite(v.float()).all()) for v in vectors
    ):
        raise FastsdError(
            "it should hold 1 to 75 vectors of finite numbers, as many for one text encoder as for the other", path=path
        )
    return tuple(vector.detach().float().clone() for vector in vectors)
