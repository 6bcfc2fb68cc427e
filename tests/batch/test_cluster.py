"""Batch jobs on Ray, as far as that needs no Ray: how many workers, and what is refused."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastsd.batch.cluster import PoolSize, pool_size
from fastsd.errors import FastsdError
from tests.support.cli import refused


@pytest.mark.parametrize(
    "machines, flags, size",
    [
        ([{"CPU": 16.0, "GPU": 8.0}] * 3, {}, PoolSize(24, 1, 1)),
        ([{"CPU": 16.0, "GPU": 8.0}, {"CPU": 64.0}], {}, PoolSize(8, 1, 1)),
        ([{"CPU": 16.0, "GPU": 8.0}], {"workers": 3, "threads": 2}, PoolSize(3, 2, 1)),
        ([{"CPU": 8.0, "GPU": 1.0}], {"device": "cpu"}, PoolSize(1, 8, 0)),
        ([{"CPU": 4.0}, {"CPU": 8.0}], {}, PoolSize(2, 4, 0)),
        ([{"CPU": 4.0}], {"workers": 2}, PoolSize(2, 2, 0)),
        ([{"CPU": 4.0}, {"CPU": 7.0}], {"threads": 2}, PoolSize(5, 2, 0)),
        ([{"CPU": 1.0}, {"CPU": 1.0}], {"workers": 1}, PoolSize(1, 1, 0)),
    ],
)
def test_workers_by_default(machines: list[dict[str, float]], flags: dict[str, Any], size: PoolSize) -> None:
    given: dict[str, Any] = {"device": None, "workers": None, "threads": None} | flags
    assert pool_size(machines, **given) == size


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"device": "cuda:1"}, "each worker of Ray has a GPU of its own"),
        ({"device": "cuda"}, "the cluster has no GPU"),
        ({"threads": 3}, "--threads is 3; the largest machine offers 2 cores"),
        ({"workers": 5}, "--workers is 5; the cluster has room for 4 of 1 cores"),
        ({"workers": 4, "threads": 2}, "the cluster has room for 2 of 2 cores"),
    ],
)
def test_more_than_there_is(flags: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"device": None, "workers": None, "threads": None} | flags
    with pytest.raises(FastsdError, match=said):
        pool_size([{"CPU": 2.0}, {"CPU": 2.0}], **given)


def test_what_is_not_there_changes_nothing(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("prompts.jsonl").write_text('{"prompt": "x"}\n')
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    job = ("batch", "prompts.jsonl", "--out", "out")
    refused(cli(*job, "--ray", f"127.0.0.1:{free}"), f"--ray 127.0.0.1:{free}: no cluster of Ray there: connection")
    for wrong in ("somewhere", "ray://127.0.0.1:10001", "127.0.0.1:x"):
        refused(cli(*job, "--ray", wrong), "it should be HOST:PORT")
    refused(cli(*job, "--ray", "--store", "memory://x"), "it is the memory of one process")
    for flag in ("--workers", "--threads"):
        refused(cli(*job, flag, "2"), f"{flag} is 2; given without --ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(cli(*job, "--ray"), "--ray: it needs ray; pip install 'fastsd[ray]'")
    assert [path.name for path in Path().iterdir()] == ["prompts.jsonl"]
