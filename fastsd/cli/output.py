"""Where images go: a file or a folder, checked to be writable before the work; nothing is replaced unasked."""

from __future__ import annotations

import os
import re
import secrets
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from fastsd.errors import FastsdError
from fastsd.files import reason, write_whole
from fastsd.image.files import WRITABLE, encode

# The ending of a file's name, so of a format that is not written. A folder may be called v1.5, 2024.11 or a.b.
_FORMAT = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,4}")
OTHER_IMAGES = (".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".jxl", ".ppm", ".svg")


class Output:
    """Where the images of one run go. Made, and checked to be writable, before any work.

    `where` with an image suffix is a file; several images become name-0.png, name-1.png, ... A name with another short
    ending, such as a.xyz, is refused unless a folder has it. Anything else is a folder, whose files are called
    00012-<seed>-<words of the prompt>.png, numbered on from those that are there.

    Args:
        where: a file or a folder.
        count: how many images will be saved.
        names: of the files in a folder, in place of numbered ones.
        overwrite: replace existing files; only with a file name.

    Raises:
        FastsdError: it cannot be written, or a file exists already.
    """

    def __init__(self, where: str | Path, count: int, overwrite: bool = False, names: Sequence[str] = ()):
        path = Path(where)
        self.overwrite, self._advice = overwrite, "give another" if names else "{overwrite} replaces it"
        self.files: list[Path] | None = None
        self._made: list[Path] = []
        self._saved = 0
        try:
            if self._is_file_name(str(where)):
                names = [path.name] if count == 1 else [f"{path.stem}-{i}{path.suffix}" for i in range(count)]
                self.folder, self.files = path.parent, [path.parent / name for name in names]
            else:
                self.folder = path
                self.files = [path / name for name in names] or None
                self._advice = "{skip_existing} leaves it out" if names else self._advice
            self._refuse_existing()
            self._make_folder()
            self._number = 0 if self.files else _next_number(self.folder)
        except OSError as error:
            self.remove_empty_folders()
            raise FastsdError(f"cannot write there: {reason(error)}", argument="output", path=where) from error

    def save(self, image: Image.Image, seed: int, prompt: str, texts: Mapping[str, str]) -> Path:
        """Write the next image.

        Raises:
            FastsdError: the disk is full, or the name was taken meanwhile.
        """
        path = self.files[self._saved] if self.files else self.folder / _file_name(self._number, seed, prompt)
        data = encode(image, path.suffix, texts)
        try:
            while True:
                try:
                    write_whole(path, data, self.overwrite and self.files is not None)
                    break
                except FileExistsError:
                    if self.files:
                        raise
                    self._number += 1
                    path = self.folder / _file_name(self._number, seed, prompt)
        except OSError as error:
            raise FastsdError(f"cannot write the image: {reason(error)}", argument="output", path=path) from error
        self._saved += 1
        self._number += 1
        return path

    def skip(self) -> None:
        """Leave out the next image, which has a name of its own."""
        self._saved += 1

    @property
    def next_suffix(self) -> str:
        """The ending of the next image's name."""
        return self.files[self._saved].suffix.lower() if self.files else ".png"

    def remove_empty_folders(self) -> None:
        """Remove the folders that this run made and left empty."""
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:
                break

    @staticmethod
    def _is_file_name(where: str) -> bool:
        """Whether the user means a file.

        Raises:
            FastsdError: an image format that is not written, or a file that is no image.
        """
        path = Path(where)
        if where.endswith(("/", os.sep)) or path.is_dir():
            return False
        if path.suffix.lower() in OTHER_IMAGES:
            raise FastsdError(f"{path.suffix} is not written; use {', '.join(WRITABLE)}", argument="output", path=where)
        if path.suffix.lower() in WRITABLE:
            return True
        if os.path.lexists(path):
            raise FastsdError(
                "neither a folder nor the name of an image, such as name.png", argument="output", path=where
            )
        if _FORMAT.fullmatch(path.suffix):
            raise FastsdError(
                f"{path.suffix} is no format that is written; use {', '.join(WRITABLE)}, or end the name of a folder "
                "with /",
                argument="output",
                path=where,
            )
        return False

    def _refuse_existing(self) -> None:
        """Find names that are taken or impossible before the work."""
        for file in self.files or ():
            try:
                os.lstat(file)
            except FileNotFoundError:
                continue
            if file.is_dir():
                raise FastsdError("a folder of this name exists already", argument="output", path=file)
            if not self.overwrite:
                raise FastsdError(f"the file exists already; {self._advice}", argument="output", path=file)

    def _make_folder(self) -> None:
        """Make the folder and those above it, and write a file into it: permissions alone do not tell."""
        missing = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._made.append(folder)
        trial = self.folder / f".fastsd-{secrets.token_hex(6)}.tmp"
        os.close(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        trial.unlink()


def _next_number(folder: Path) -> int:
    """One more than the highest number that a file name in `folder` starts with."""
    numbers = [int(found[1]) for entry in os.scandir(folder) if (found := re.match(r"(\d{5,9})-", entry.name))]
    return max(numbers, default=-1) + 1


def _file_name(number: int, seed: int, prompt: str) -> str:
    """00012-7-a-handwritten-eight.png: words of the prompt, up to 40 characters, in any script."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", prompt).lower())
    slug = "-".join(words)[:40].strip("-")
    while len(slug.encode()) > 120:  # names are limited in bytes
        slug = slug[:-1]
    return f"{number:05d}-{seed}{'-' * bool(slug)}{slug}.png"
