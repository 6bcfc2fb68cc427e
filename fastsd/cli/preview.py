"""--preview: what the image is becoming, in a file beside the output."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from fastsd.cli.output import Output
from fastsd.errors import FastsdError
from fastsd.files import reason, write_whole
from fastsd.image.files import encode

if TYPE_CHECKING:
    from fastsd.pipeline import Step


class Preview:
    """A file that is replaced whole every few steps, and removed at the end, also after an error.

    `lighthouse.png` gets `lighthouse.preview.png`; a folder gets `preview.png` in it. Where the name is taken, a number
    follows it.

    Args:
        output: where the images go.
        every: write every so many steps; None: never.
    """

    def __init__(self, output: Output, every: int | None):
        self.every = every
        self.folder, self.stem = output.folder, "preview"
        if output.files:
            self.stem = f"{output.files[0].stem}.preview"
        self.path: Path | None = None

    def __enter__(self) -> Preview:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.path is not None:
            try:
                self.path.unlink(missing_ok=True)
            except OSError:
                pass  # the images matter more

    def show(self, step: Step) -> Path | None:
        """Write a preview, if it is this step's turn. The last step has none: the image itself follows.

        Returns:
            The file's name, the first time.

        Raises:
            FastsdError: it cannot be written.
        """
        if self.every is None or step.result is not None or step.index % self.every:
            return None
        data = encode(step.preview(), ".png", {})
        try:
            if self.path is not None:
                write_whole(self.path, data, overwrite=True)
                return None
            self.path = self._write_new(data)
        except OSError as error:
            raise FastsdError(
                f"cannot write beside {self.folder}: {reason(error)}", argument="preview_every"
            ) from error
        return self.path

    def _write_new(self, data: bytes) -> Path:
        """Write under the first name that is free."""
        number = 0
        while True:
            path = self.folder / f"{self.stem}{f'-{number}' * bool(number)}.png"
            try:
                write_whole(path, data)
                return path
            except FileExistsError:
                number += 1
