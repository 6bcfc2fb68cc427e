"""The tuned table of a GPU: atomic writes, exact reads, and one warning for a stale or damaged file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastsd.kernels.launch import architecture, flash_attn, groupnorm_silu, rowwise, tuned
from fastsd.kernels.launch.tuned import Lookup

FINGERPRINT = {"gpu": "NVIDIA H200 (fake)", "architecture": 90, "triton": "3.7.1", "fastsd": "0.1.0", "kernels": "abc"}
NORM = Lookup("groupnorm_silu", 90, (4096, 320, 32, 2))
LAUNCHES = {
    NORM: groupnorm_silu.GroupNormLaunch(4, 32, 8, 256, 64, True),
    Lookup("layernorm", 90, (320,)): rowwise.RowwiseLaunch(4, 512, 4),
    Lookup("flash_attn", 90, (4096, 77, 8, 40, 2)): flash_attn.FewKeys(64, 2, 4, 2, (32, 16), (64, 16)),
    Lookup("flash_attn", 90, (4096, 4096, 8, 40, 2)): flash_attn.Tile(128, 64, 8, 3, True, 128, (64, 0)),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FASTSD_CACHE", str(tmp_path / "cache"))
    tuned._active_table.cache_clear()
    yield tmp_path / "cache"
    tuned._active_table.cache_clear()


def test_a_saved_table_loads_exactly(cache: Path) -> None:
    file = tuned.save(LAUNCHES, FINGERPRINT)
    assert file == cache / "launches-nvidia-h200-fake-sm90.json"
    assert tuned.load(FINGERPRINT) == LAUNCHES
    assert list(cache.iterdir()) == [file]  # no temporary file remains


def test_a_missing_table_is_empty() -> None:
    assert tuned.load(FINGERPRINT) == {}


@pytest.mark.parametrize("name", ["triton", "fastsd", "kernels"])
def test_a_stale_table_is_ignored_with_one_warning(name: str) -> None:
    tuned.save(LAUNCHES, FINGERPRINT)
    with pytest.warns(UserWarning, match=f"is stale: {name} was {FINGERPRINT[name]}, is newer") as caught:
        assert tuned.load({**FINGERPRINT, name: "newer"}) == {}
    assert len(caught) == 1


def edited(text: str) -> str:
    table = json.loads(text)
    table["launches"][0]["launch"]["groups"] = 8
    return json.dumps(table)


def without_checksum(text: str) -> str:
    table = json.loads(text)
    del table["check"]
    return json.dumps(table)


DAMAGE: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "open brace": lambda text: "{",
    "list": lambda text: "[]",
    "null": lambda text: "null",
    "half": lambda text: text[: len(text) // 2],
    "edited": edited,
    "no checksum": without_checksum,
    "zeros": lambda text: "\x00" * 100,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_table_is_ignored_with_one_warning(kind: str) -> None:
    file = tuned.save(LAUNCHES, FINGERPRINT)
    file.write_text(DAMAGE[kind](file.read_text()))
    with pytest.warns(UserWarning, match="is damaged") as caught:
        assert tuned.load(FINGERPRINT) == {}
    assert len(caught) == 1


def test_a_table_that_is_not_text_is_ignored(cache: Path) -> None:
    tuned.save(LAUNCHES, FINGERPRINT).write_bytes(b"\xff\xfe\xff")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert tuned.load(FINGERPRINT) == {}


def test_a_failed_write_leaves_the_old_table(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    file = tuned.save(LAUNCHES, FINGERPRINT)

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        tuned.save({}, FINGERPRINT)
    assert tuned.load(FINGERPRINT) == LAUNCHES and list(cache.iterdir()) == [file]


def test_a_tuned_launch_replaces_the_committed_one_on_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    committed = groupnorm_silu.choose(90, *NORM.key)
    assert committed == groupnorm_silu.choose.__wrapped__(90, *NORM.key) != LAUNCHES[NORM]  # no GPU, no table

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: FINGERPRINT["gpu"])
    monkeypatch.setattr(architecture, "class_of", lambda device: 90)
    tuned.save(LAUNCHES, tuned.fingerprint("NVIDIA H200 (fake)", 90))
    assert groupnorm_silu.choose(90, *NORM.key) == LAUNCHES[NORM]
    assert groupnorm_silu.choose(80, *NORM.key) == groupnorm_silu.choose.__wrapped__(80, *NORM.key)
    assert groupnorm_silu.choose(90, 64, 320, 32, 2) == groupnorm_silu.choose.__wrapped__(90, 64, 320, 32, 2)
    assert "4 tuned launches in" in tuned.describe(torch.device("cuda"))
    assert groupnorm_silu.choose.__wrapped__(90, *NORM.key) == committed


def test_a_trial_launch_comes_first_and_lookups_are_recorded() -> None:
    launch = LAUNCHES[NORM]
    with tuned.recorded_lookups() as lookups, tuned.overridden(NORM, launch):
        assert groupnorm_silu.choose(90, *NORM.key) == launch
    assert lookups == {NORM: groupnorm_silu.choose.__wrapped__(90, *NORM.key)}
    assert groupnorm_silu.choose(90, *NORM.key) != launch
