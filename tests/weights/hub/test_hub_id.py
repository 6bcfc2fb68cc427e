"""Ids of models on the hub: what is an id, what is a path, and which revisions are valid."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastsd.errors import FastsdError
from fastsd.weights.hub import locate
from fastsd.weights.hub.hub_id import HubId, ModelLocation, parse_hub_id
from tests.support.hub import NEW
from tests.support.hub_server import Hub


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId("org/name")),
        ("o.r-g_1/na.me-2_x", HubId("o.r-g_1/na.me-2_x")),
        ("org/name@v1.5", HubId("org/name", "v1.5")),
        ("org/name@refs/pr/1", HubId("org/name", "refs/pr/1")),
        ("org/name/a b.safetensors", HubId("org/name", None, "a b.safetensors")),
        ("org/name@fp16/sub/a.safetensors", HubId("org/name", "fp16", "sub/a.safetensors")),
        *((path, None) for path in ("name", "./org/name", "../org/name", "/org/name", "~/name", "org/name/", "")),
        *((path, None) for path in ("org/name.safetensors", "org/name.ckpt", "models/sd/v1.5", "org/name/a.ckpt")),
        *((path, None) for path in ("org/name.git", f"org/{'n' * 97}", "org/name/./a.safetensors")),
        ("org/name/c:a.safetensors", None),
        *((path, None) for path in ("org/na..me", "or--g/name", "-org/name", "org/name.", "org/ä", "org/name@../x")),
        *((path, None) for path in ("org/name/../a.safetensors", "org/name//a.safetensors", "org/name@", "org\\name")),
    ],
)
def test_ids_and_paths(text: str, expected: HubId | None) -> None:
    assert parse_hub_id(text) == expected
    assert expected is None or str(expected) == text


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.from_regex(r"[\w./@-]{0,9}/[\w.-]{0,9}(@[\w./-]{0,9})?(/[^\0]{0,9}\.safetensors)?", fullmatch=True))
def test_huggingface_hub_accepts_every_id(served: Hub, text: str) -> None:
    """What huggingface_hub would refuse by an exception of its own is a path here; and no id leads out of the cache."""
    from huggingface_hub.utils import validate_repo_id

    hub_id = parse_hub_id(text)
    if hub_id is not None:
        validate_repo_id(hub_id.repo)
        assert not locate.is_cached(hub_id)
        assert not locate.is_cached(HubId(hub_id.repo, NEW, hub_id.file), vae=True)
        assert str(hub_id) == text and ".." not in Path(text).parts


def test_an_existing_name_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_hub_id("org/name") is not None
    assert parse_hub_id(Path("org/name")) is None
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert parse_hub_id("org/name") is None
    assert locate.locate_model("org/name", None, False) == ModelLocation(Path("org/name"))


def test_invalid_revisions() -> None:
    assert parse_hub_id("org/name", "v1") == parse_hub_id("org/name@v1", "v1") == HubId("org/name", "v1")
    for text, revision in (("org/name@v1", "v2"), ("./here", "v1"), ("org/name", "../x"), ("org/name", "a b")):
        with pytest.raises(FastsdError, match="^revision: "):
            parse_hub_id(text, revision)
