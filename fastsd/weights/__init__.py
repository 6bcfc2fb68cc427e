"""Checkpoints: the only code that knows file formats and checkpoint key names."""

from fastsd.weights.folder import Components, load_folder
from fastsd.weights.save import save_folder

__all__ = ["Components", "load_folder", "save_folder"]
