"""The user's table: written whole, read back as it was, and left aside with one warning where it does not belong."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastsd.kernels.launch import architecture, flash_attn, groupnorm_silu, tuned
from fastsd.kernels.launch import rowwise as rows
from fastsd.kernels.launch.tuned import Question

BELONGS = {"gpu": "NVIDIA H200 (fake)", "architecture": 90, "triton": "3.7.1", "fastsd": "0.1.0", "kernels": "abc"}
NORM = Question("groupnorm_silu", 90, (4096, 320, 32, 2))
LAUNCHES = {
    NORM: groupnorm_silu.Launch(4, 32, 8, 256, 64, True),
    Question("layernorm", 90, (320,)): rows.Launch(4, 512, 4),
    Question("flash_attn", 90, (4096, 77, 8, 40, 2)): flash_attn.FewKeys(64, 2, 4, 2, (32, 16), (64, 16)),
    Question("flash_attn", 90, (4096, 4096, 8, 40, 2)): flash_attn.Tile(128, 64, 8, 3, True, 128, (64, 0)),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FASTSD_CACHE", str(tmp_path / "cache"))
    tuned._in_use.cache_clear()
    yield tmp_path / "cache"
    tuned._in_use.cache_clear()


def test_a_table_comes_back_as_it_was(cache: Path) -> None:
    file = tuned.save(LAUNCHES, BELONGS)
    assert file == cache / "launches-nvidia-h200-fake-sm90.json"
    assert tuned.load(BELONGS) == LAUNCHES
    assert list(cache.iterdir()) == [file]  # nothing temporary stays


def test_no_table_is_no_matter() -> None:
    assert tuned.load(BELONGS) == {}


@pytest.mark.parametrize("name", ["triton", "fastsd", "kernels"])
def test_a_stale_table_is_left_aside(name: str) -> None:
    tuned.save(LAUNCHES, BELONGS)
    with pytest.warns(UserWarning, match=f"is stale: {name} was {BELONGS[name]}, is newer") as told:
        assert tuned.load({**BELONGS, name: "newer"}) == {}
    assert len(told) == 1


def damage(text: str) -> list[str]:
    found = json.loads(text)
    found["launches"][0]["launch"]["groups"] = 8
    edited = json.dumps(found)
    del found["check"]
    return ["", "{", "[]", "null", text[: len(text) // 2], edited, json.dumps(found), "\x00" * 100]


@pytest.mark.parametrize("which", range(8))
def test_a_damaged_table_is_left_aside(which: int) -> None:
    file = tuned.save(LAUNCHES, BELONGS)
    file.write_text(damage(file.read_text())[which])
    with pytest.warns(UserWarning, match="is damaged") as told:
        assert tuned.load(BELONGS) == {}
    assert len(told) == 1


def test_a_table_that_is_no_text(cache: Path) -> None:
    tuned.save(LAUNCHES, BELONGS).write_bytes(b"\xff\xfe\xff")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert tuned.load(BELONGS) == {}


def test_a_failed_write_leaves_the_old_table(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    file = tuned.save(LAUNCHES, BELONGS)

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        tuned.save({}, BELONGS)
    assert tuned.load(BELONGS) == LAUNCHES and list(cache.iterdir()) == [file]


def test_tuned_launches_go_first_where_the_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    committed = groupnorm_silu.choose(90, *NORM.key)
    assert committed == groupnorm_silu.choose.__wrapped__(90, *NORM.key) != LAUNCHES[NORM]  # no GPU, no table

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: BELONGS["gpu"])
    monkeypatch.setattr(architecture, "of", lambda device: 90)
    tuned.save(LAUNCHES, tuned.origin("NVIDIA H200 (fake)", 90))
    assert groupnorm_silu.choose(90, *NORM.key) == LAUNCHES[NORM]
    assert groupnorm_silu.choose(80, *NORM.key) == groupnorm_silu.choose.__wrapped__(80, *NORM.key)
    assert groupnorm_silu.choose(90, 64, 320, 32, 2) == groupnorm_silu.choose.__wrapped__(90, 64, 320, 32, 2)
    assert "4 tuned ones of" in tuned.described(torch.device("cuda"))
    assert groupnorm_silu.choose.__wrapped__(90, *NORM.key) == committed


def test_what_is_tried_goes_first_and_questions_are_told() -> None:
    launch = LAUNCHES[NORM]
    with tuned.asked() as questions, tuned.tried(NORM, launch):
        assert groupnorm_silu.choose(90, *NORM.key) == launch
    assert questions == {NORM: groupnorm_silu.choose.__wrapped__(90, *NORM.key)}
    assert groupnorm_silu.choose(90, *NORM.key) != launch
