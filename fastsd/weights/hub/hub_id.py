"""Ids of models on the Hugging Face hub.

An id is `org/name`; `org/name@revision` for a branch, tag or commit; `org/name@v2/file.safetensors` for one file. Text
that names something on this machine is a path, not an id.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fastsd.errors import FastsdError

SUFFIX = ".safetensors"
_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_REVISION = r"refs/[\w.-]+/[\w.-]+|[\w.-]+"
_ID = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>{_REVISION}))?(?P<file>(?:/[^/\\:]+)*)", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILES = (SUFFIX, ".ckpt", ".pt", ".bin", ".pth", ".onnx", ".png", ".git")  # a repository's name never ends so
MAX_NAME = 96  # characters of a repository's name


@dataclass(frozen=True)
class HubId:
    """A repository on the hub.

    Attributes:
        repo: `org/name`.
        revision: a branch, tag or commit; None: the default branch.
        file: one file in the repository; "": everything a model needs.
    """

    repo: str
    revision: str | None = None
    file: str = ""

    def __str__(self) -> str:
        return f"{self.repo}{f'@{self.revision}' if self.revision else ''}{f'/{self.file}' if self.file else ''}"

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None


@dataclass(frozen=True)
class ModelLocation:
    """A file or folder on this machine.

    Attributes:
        path: where it is.
        hub: the id it was fetched by, with a commit as revision; None if it did not come from the hub.
    """

    path: Path
    hub: HubId | None = None

    @property
    def name(self) -> str | None:
        """The repository's name, because the folder in the cache is named by its commit; None: use the path's name."""
        return self.hub.repo.split("/")[1] if self.hub is not None and not self.hub.file else None


def parse_hub_id(text: str | Path, revision: str | None = None) -> HubId | None:
    """The hub id in `text`; None for a path, which either exists or does not look like an id.

    Args:
        text: `org/name`, `org/name@revision`, `org/name/file.safetensors`. A `Path` is never an id.
        revision: a branch, tag or commit.

    Raises:
        FastsdError: the revision is malformed, given twice, or given with a path.
    """
    match = None if isinstance(text, Path) or os.path.exists(text) else _ID.fullmatch(text)
    file = match["file"].removeprefix("/") if match else ""
    if match and not _follows_hub_rules(match["repo"], match["revision"] or "", file):
        match = None
    if revision is not None:
        if not re.fullmatch(_REVISION, revision, re.ASCII) or ".." in revision:
            raise FastsdError(f"{revision[:80]!r} should be a branch, a tag or a commit", argument="revision")
        if match is None:
            raise FastsdError(
                f"given with {text}, which is not the id of a model on the hub (org/name)", argument="revision"
            )
        if match["revision"] not in (None, revision):
            raise FastsdError(f"{revision} contradicts the revision in {text}", argument="revision")
    return HubId(match["repo"], revision or match["revision"], file) if match else None


def _follows_hub_rules(repo: str, revision: str, file: str) -> bool:
    """Whether the hub allows these names, and none of them leads out of the cache folder."""
    repo_ok = (
        not repo.endswith(_FILES) and len(repo.split("/")[1]) <= MAX_NAME and "--" not in repo and ".." not in repo
    )
    stays_inside = ".." not in revision and not {".", ".."} & set(file.split("/"))
    return repo_ok and stays_inside and (file == "" or file.endswith(SUFFIX))
