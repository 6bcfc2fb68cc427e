"""Checkpoints: the only code that knows file formats and checkpoint key names."""

from fastsd.weights.checkpoint import count_parameters, load_checkpoint
from fastsd.weights.layouts.folder import load_folder
from fastsd.weights.layouts.save import save_folder
from fastsd.weights.layouts.single_file import load_single_file
from fastsd.weights.layouts.vae_file import load_preview, load_vae

__all__ = [
    "count_parameters",
    "load_checkpoint",
    "load_folder",
    "load_preview",
    "load_single_file",
    "load_vae",
    "save_folder",
]
