"""What clients choose from: checkpoints, LoRAs, embeddings, ControlNets and upscalers in the folders of the flags.

A request names what is listed here; a name is looked up in the list and never becomes a path.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fastsd.bundled import BUNDLED, DIGITS
from fastsd.errors import FastsdError
from fastsd.files.hashes import known_sha256, legacy_hash, remember_sha256
from fastsd.image.infotext import UPSCALERS
from fastsd.parameters import nearest
from fastsd.server.jobs import ModelChoice, UpscalerChoice
from fastsd.server.settings import ServerSettings

SUFFIX = ".safetensors"
VISION = "image_encoder"  # the folder of the vision tower beside IP-Adapters
OF_EXTENSION = re.compile(r"(?P<name>.+) \[(?P<hash>[0-9a-f]{8})\]")  # a ControlNet as A1111's extension lists it


@dataclass(frozen=True)
class Listed:
    """A file or folder that may be chosen.

    Attributes:
        name: its path in its folder without the ending: "sd15", "anime/sd15"; see `_distinct`.
        path: None: the bundled model.
        sha256: of a file, where it is known by now.
    """

    name: str
    path: Path | None
    sha256: str | None = None

    @property
    def file_name(self) -> str:
        """With its ending."""
        whole = self.path is None or self.path.is_dir() or self.name.endswith(self.path.suffix)
        return self.name if whole else f"{self.name}{self.path.suffix}"  # type: ignore[union-attr]

    @property
    def title(self) -> str:
        """As A1111 shows a model."""
        return f"{self.file_name} [{self.sha256[:10]}]" if self.sha256 else self.file_name

    @property
    def spellings(self) -> set[str]:
        """Every way to name it."""
        found = {self.name, self.file_name, self.title, self.name.rpartition("/")[2], self.file_name.rpartition("/")[2]}
        return found | ({self.sha256, self.sha256[:10]} if self.sha256 else set())


class Catalogue:
    """The lists of one server.

    Attributes:
        models, controlnets, loras, embeddings, upscalers: as of the last `refresh`.
    """

    def __init__(self, settings: ServerSettings):
        self.settings = settings
        self._hashes: dict[tuple[Path, int, int], str] = {}  # by path, size and time
        self.refresh()

    def refresh(self) -> None:
        """Look into the folders again."""
        own = self.settings
        first, inside = self._first(), self._files(own.models_dir, folders="model_index.json")
        others = [one for one in inside if one.path != first[0].path]
        self.models = _distinct([*first, *others], own.models_dir)
        nets = self._files(own.controlnet_dir, folders="config.json")
        self.controlnets = [one for one in nets if one.name.rpartition("/")[2] != VISION]
        self.loras = self._files(own.lora_dir)
        self.embeddings = self._files(own.embedding_dir)
        self.upscalers = self._files(own.upscaler_dir)

    def _first(self) -> list[Listed]:
        """The model that the server starts with."""
        given = self.settings.model
        if given is None or given == DIGITS:
            return [Listed(DIGITS, None)]
        if given in BUNDLED:
            return [Listed(given, BUNDLED[given])]
        path = Path(given)
        if self.settings.models_dir and path.exists():
            with contextlib.suppress(ValueError):
                inside = path.resolve().relative_to(Path(self.settings.models_dir).resolve())
                name = inside.as_posix() if path.is_dir() else inside.with_suffix("").as_posix()
                return [Listed(name, path, self._sha256(path))]
        name = path.stem if path.is_file() else path.name or given
        return [Listed(name, path, self._sha256(path) if path.is_file() else None)]

    def _files(self, folder: str | None, folders: str | None = None) -> list[Listed]:
        """The files of a folder, at any depth, and the folders that hold a file of this name."""
        if folder is None:
            return []
        found, root, inside = [], Path(folder), set[Path]()
        files = sorted(_walk(root))
        for path in files:
            if path.name == folders and path.parent != root:
                inside.add(path.parent)
                found.append(Listed(path.parent.relative_to(root).as_posix(), path.parent))
        for path in files:
            if path.suffix == SUFFIX and path.is_file() and not inside & set(path.parents):
                found.append(Listed(path.relative_to(root).with_suffix("").as_posix(), path, self._sha256(path)))
        return _distinct(found, folder)

    def _sha256(self, path: Path) -> str | None:
        try:
            return self._hashes.get(_state(path)) or (known_sha256(path) if path.is_file() else None)
        except OSError:  # it has gone meanwhile
            return None

    def find_model(self, name: str, argument: str = "model") -> Listed:
        """The model that a client names.

        Raises:
            FastsdError: there is none, or several have the name.
        """
        return _find(self.models, name, argument, "model")

    def find_refiner(self, name: str, argument: str) -> Listed:
        """The model for the last steps that a client names; raises as `find_model`."""
        found = self.find_model(name, argument)
        if found.path is None:
            raise FastsdError("it is no refiner", argument=argument, value=name)
        return found

    def find_controlnet(self, name: str) -> Listed:
        """The ControlNet, T2I-Adapter or IP-Adapter that a client names; raises as `find_model`.

        A name may end in the hash that A1111's extension lists, `t2iadapter_canny_sd14v1 [80bfd79b]`, which the file
        then has to have.
        """
        plain = OF_EXTENSION.fullmatch(name)
        if plain is None or any(name in one.spellings for one in self.controlnets):
            return _find(self.controlnets, name, "model", "ControlNet")
        found = _find(self.controlnets, plain["name"], "model", "ControlNet")
        own = legacy_hash(found.path) if found.path is not None and found.path.is_file() else plain["hash"]
        if own != plain["hash"]:
            message = f"the file of this name is another one: {found.name} [{own}]"
            raise FastsdError(message, argument="model", value=name)
        return found

    def find_upscaler(self, name: str, argument: str) -> UpscalerChoice:
        """The file of the upscaler that a client names; raises as `find_model`."""
        try:
            found = _find(self.upscalers, name, argument, "upscaler")
        except FastsdError as error:
            error.message += f"; without a file there are {', '.join(UPSCALERS.values())}"
            raise
        return UpscalerChoice(found.name, str(found.path))

    def choice(self, model: Listed, refiner: Listed | None = None) -> ModelChoice:
        """What the worker is told to load."""
        second = None if refiner is None else str(refiner.path)
        return ModelChoice(model.name, None if model.path is None else str(model.path), second)

    async def hash_files(self) -> None:
        """Read the models whose hashes are not known, one by one, in the background; each takes seconds."""
        for listed in (*self.models, *self.loras):
            if listed.path is not None and listed.path.is_file() and listed.sha256 is None:
                with contextlib.suppress(OSError):
                    state = _state(listed.path)
                    self._hashes[state] = await asyncio.to_thread(_hash, listed.path)
        self.refresh()


def _walk(root: Path) -> Iterator[Path]:
    """Every file in a folder, at any depth, in folders that are links too, each of them once on its way."""
    for here, folders, names in os.walk(root, followlinks=True):
        above = {os.path.realpath(here), *(os.path.realpath(parent) for parent in Path(here).parents)}
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(here, name)) not in above]
        yield from (Path(here, name) for name in names)


def _distinct(listed: list[Listed], folder: str | None) -> list[Listed]:
    """The list with a name of its own for each: of a folder and a file, or of two places, that are called alike the
    second one has its ending, or its folder's name before it."""
    found, taken = list[Listed](), set[str]()
    for one in listed:
        above = Path(folder or "").absolute().name
        for name in (one.name, one.file_name, f"{above}/{one.name}", f"{above}/{one.file_name}"):
            renamed = replace(one, name=name)
            if not taken & {renamed.name, renamed.file_name}:
                break
        found.append(renamed)
        taken |= {renamed.name, renamed.file_name}
    return found


def _state(path: Path) -> tuple[Path, int, int]:
    """What another file of the same name has otherwise."""
    own = path.stat()
    return path, own.st_size, own.st_mtime_ns


def _find(listed: list[Listed], name: str, argument: str, kind: str) -> Listed:
    found = [one for one in listed if name in one.spellings] or [
        one for one in listed if name.lower() in {spelling.lower() for spelling in one.spellings}
    ]
    exact = [one for one in found if name in (one.name, one.file_name, one.title)]
    if len(found) == 1 or len(exact) == 1:
        return (exact or found)[0]
    if found:
        raise FastsdError(
            f"several are called so: {', '.join(one.name for one in found[:5])}", argument=argument, value=name
        )
    names = [one.name for one in listed]
    hint = nearest(name, names) or (f"; there are {', '.join(names[:8])}" if names else "; there is none here")
    raise FastsdError(f"no such {kind} is listed{hint}", argument=argument, value=name)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in _blocks(file):
            digest.update(block)
    remember_sha256(path, digest.hexdigest())
    return digest.hexdigest()


def _blocks(file: object) -> Iterator[bytes]:
    while block := file.read(2**20):  # type: ignore[attr-defined]
        yield block
