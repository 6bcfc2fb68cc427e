"""Files of tensors in either format: `.safetensors`, or a pickle where the user allows it; their bytes tell."""

from __future__ import annotations

from pathlib import Path

from fastsd.weights.formats.pickle_file import is_pickle, read_pickle
from fastsd.weights.formats.safetensors_file import TensorEntry, read_header
from fastsd.weights.formats.scaled import with_scales


def read_tensors(
    path: Path, allow_pickle: bool = False, lists: bool = False
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors and metadata of a file; a pickle has no metadata. `lists` as in `read_pickle`.

    Raises:
        FastsdError: malformed, a pickle that is not allowed, or weights in a quantisation that fastsd lacks.
    """
    entries, metadata = (read_pickle(path, allow_pickle, lists), {}) if is_pickle(path) else read_header(path)
    return with_scales(path, entries), metadata
