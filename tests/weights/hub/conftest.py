"""A local hub that serves the bundled model, and files as repositories store them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastsd.errors import FastsdError
from fastsd.weights.hub import locate
from tests.support.hub import DIGITS, UNNEEDED
from tests.support.hub_server import Hub, local_hub


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the bundled model as org/digits and an empty cache; the working directory is an empty folder."""
    pytest.importorskip("huggingface_hub")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with local_hub(monkeypatch, tmp_path) as hub:
        hub.add("org/digits", DIGITS | UNNEEDED)
        yield hub


@pytest.fixture
def refused() -> Callable[..., None]:
    """`refused(id, *parts)`: locating the model fails with one line that begins with the id and holds the parts."""

    def check(text: str, *parts: str) -> None:
        with pytest.raises(FastsdError) as caught:
            locate.locate_model(text, None, False)
        message = str(caught.value)
        assert message.startswith(f"{text}: ") and "\n" not in message, message
        for part in parts:
            assert part in message

    return check
