"""Files of tensors in either format: `.safetensors`, or a pickle where the user allows it; their bytes tell."""

from __future__ import annotations

from pathlib import Path

from fastsd.weights.formats.pickle_file import is_pickle, read_pickle
from fastsd.weights.formats.safetensors_file import TensorEntry, read_header


def read_tensors(path: Path, allow_pickle: bool = False) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors and metadata of a file; a pickle has no metadata.

    Raises:
        FastsdError: malformed, or a pickle that is not allowed.
    """
    return (read_pickle(path, allow_pickle), {}) if is_pickle(path) else read_header(path)
