"""Checkpoints: the only code that knows file formats and checkpoint key names."""

from fastsd.weights.checkpoint import count_numbers, load_checkpoint
from fastsd.weights.folder import Components, load_folder
from fastsd.weights.save import save_folder
from fastsd.weights.single_file import load_single_file
from fastsd.weights.vae_file import load_preview, load_vae

__all__ = [
    "Components",
    "count_numbers",
    "load_checkpoint",
    "load_folder",
    "load_preview",
    "load_single_file",
    "load_vae",
    "save_folder",
]
