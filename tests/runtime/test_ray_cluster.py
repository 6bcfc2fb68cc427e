"""How many workers a cluster has room for. Ray itself is run by tests/batch/test_kills.py."""

from __future__ import annotations

from typing import Any

import pytest

from fastsd.errors import FastsdError
from fastsd.runtime.ray_cluster import PoolSize, pool_size


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
