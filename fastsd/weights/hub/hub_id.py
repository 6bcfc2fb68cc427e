"""What names a model on the hub.

An id is `org/name`, with `@revision` (a branch, tag or commit) where another than the default branch is meant, and with
a path behind it for one file: `org/name@v2/file.safetensors`. What exists on this machine under such a name is a path.
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
_ID = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>{_REVISION}))?(?P<inside>(?:/[^/\\:]+)*)", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILES = (SUFFIX, ".ckpt", ".pt", ".bin", ".pth", ".onnx", ".png", ".git")  # a name that ends so is no model's
MAX_NAME = 96  # characters of a repository's name


@dataclass(frozen=True)
class HubId:
    """A repository on the hub; its revision, None being the default branch; and a file in it, or all that is needed."""

    repo: str
    revision: str | None = None
    inside: str = ""

    def __str__(self) -> str:
        return f"{self.repo}{f'@{self.revision}' if self.revision else ''}{f'/{self.inside}' if self.inside else ''}"

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never stands for anything else."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None


@dataclass(frozen=True)
class Place:
    """Where something lies on this machine; and what it is on the hub, its revision being a commit, if it is there."""

    path: Path
    hub: HubId | None = None

    @property
    def name(self) -> str | None:
        """A repository's, whose folder here is called by its commit; None for what goes by its path's."""
        return self.hub.repo.split("/")[1] if self.hub is not None and not self.hub.inside else None


def parse(text: str | Path, revision: str | None = None) -> HubId | None:
    """The hub id that a text is, or None for a path: of what exists, or what no id looks like.

    Args:
        text: `org/name`, `org/name@revision`, `org/name/file.safetensors`; a `Path` always is a path.
        revision: a branch, tag or commit.

    Raises:
        FastsdError: a revision that is malformed, given twice, or given with a path.
    """
    found = None if isinstance(text, Path) or os.path.exists(text) else _ID.fullmatch(text)
    inside = found["inside"].removeprefix("/") if found else ""
    if found and not _is_sound(found["repo"], found["revision"] or "", inside):
        found = None
    if revision is not None:
        if not re.fullmatch(_REVISION, revision, re.ASCII) or ".." in revision:
            raise FastsdError(f"revision: {revision[:80]!r} should be a branch, a tag or a commit")
        if found is None:
            raise FastsdError(f"revision: given with {text}, which is no model's id on the hub (org/name)")
        if found["revision"] not in (None, revision):
            raise FastsdError(f"revision: {revision} is another one than that of {text}")
    return HubId(found["repo"], revision or found["revision"], inside) if found else None


def _is_sound(repo: str, revision: str, inside: str) -> bool:
    """Whether these could be on the hub, whose names have rules beyond their letters, and stay in a cache's folders."""
    named = not repo.endswith(_FILES) and len(repo.split("/")[1]) <= MAX_NAME and "--" not in repo and ".." not in repo
    within = ".." not in revision and not {".", ".."} & set(inside.split("/"))
    return named and within and (inside == "" or inside.endswith(SUFFIX))
