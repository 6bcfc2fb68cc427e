"""The files of an adapter: one file, or a folder as PEFT, diffusers or a training script of theirs leaves it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastsd.errors import FastsdError
from fastsd.files import check_path

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # PEFT's
DIFFUSERS_WEIGHTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
NETWORKS = ("unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class AdapterPart:
    """A file of tensors.

    Attributes:
        weights: the file.
        config: PEFT's config beside it, or None.
        network: whose layers it changes, where the folder's name says so; else "".
    """

    weights: Path
    config: Path | None = None
    network: str = ""


def adapter_parts(path: Path) -> list[AdapterPart]:
    """The parts of an adapter.

    Raises:
        FastsdError: no such file, or a folder that holds no adapter.
    """
    check_path(path)
    if not path.is_dir():
        if not path.is_file():
            raise FastsdError("no such adapter; give a .safetensors file", path=path)
        return [AdapterPart(path)]
    if (path / CONFIG).is_file():
        return [AdapterPart(_weights(path, WEIGHTS), path / CONFIG)]
    if any((path / name).is_file() for name in DIFFUSERS_WEIGHTS):
        return [AdapterPart(_weights(path, DIFFUSERS_WEIGHTS))]
    parts = [
        AdapterPart(_weights(path / network, WEIGHTS), path / network / CONFIG, network)
        for network in NETWORKS
        if (path / network / CONFIG).is_file()
    ]
    if not parts:
        raise FastsdError(
            f"no {CONFIG} and no {DIFFUSERS_WEIGHTS[0]} in this folder; give a .safetensors file or PEFT's folder",
            path=path,
        )
    return parts


def adapter_bytes(path: Path) -> bytes:
    """The bytes that identify an adapter: those of its weights.

    Raises:
        FastsdError: as `adapter_parts`.
    """
    return b"".join(part.weights.read_bytes() for part in adapter_parts(path))


def _weights(folder: Path, names: tuple[str, ...]) -> Path:
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise FastsdError(f"it holds neither {' nor '.join(names)}", path=folder)
    return found[0]
