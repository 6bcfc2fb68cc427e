"""Clusters of Ray: connecting to one or starting it, and how many workers it has room for."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastsd.errors import FastsdError
from fastsd.files import reason

HERE = "local"  # an address: a cluster of this machine alone, which ends with the job
OBJECTS = 256 * 2**20  # bytes of the object store of a local cluster: some batches of images
SECONDS = 5.0  # to wait for the cluster's port
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """A cluster, while the context lasts.

    Args:
        address: HOST:PORT of a cluster of which this machine is a part; "local": a new one, of this machine alone.

    Raises:
        FastsdError: Ray is not installed, or there is no such cluster.
    """
    if address != HERE:
        _check_port(address)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data  # also what it needs: pandas, pyarrow
    except ImportError as error:
        raise FastsdError(f"it needs {error.name}; pip install 'fastsd[ray]'", argument="--ray") from None
    own: dict[str, Any] = {"object_store_memory": OBJECTS, "include_dashboard": False} if address == HERE else {}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:  # Ray raises the class itself where a cluster does not start in time
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise FastsdError(
            f"no cluster of Ray there that this machine is part of: {said}", argument="--ray", path=address
        ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _check_port(address: str) -> None:
    """Refuse an address where nobody listens, which Ray would try for a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise FastsdError("it should be HOST:PORT, such as 10.0.0.1:6379", argument="--ray", value=address)
    try:
        socket.create_connection((host.strip("[]"), int(port)), SECONDS).close()
    except (OSError, OverflowError) as error:
        said = reason(error) if isinstance(error, OSError) else str(error)
        raise FastsdError(f"no cluster of Ray there: {said}", argument="--ray", path=address) from error


@dataclass(frozen=True)
class PoolSize:
    """How many workers, and what each of them takes: CPU cores, each a thread, and GPUs."""

    workers: int
    threads: int
    gpus: int


def machines() -> list[dict[str, float]]:
    """What each machine of the connected cluster has: "CPU", "GPU"."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def pool_size(
    machines: list[dict[str, float]],
    device: str | None,
    workers: int | None,
    threads: int | None,
    flag: str = "--workers",
) -> PoolSize:
    """The workers: by default one for each GPU, and without GPUs one for each machine, with all of its cores.

    Args:
        machines: what each has, "CPU" and "GPU".
        device, workers, threads: flags.
        flag: that gave the workers.

    Raises:
        FastsdError: no machine has as much, or a device that is of one machine alone.
    """
    if device is not None and ":" in device:
        raise FastsdError(
            "each worker of Ray has a GPU of its own; it should be auto, cpu or cuda", argument="device", value=device
        )
    total = sum(int(each.get("GPU", 0)) for each in machines)
    on_gpus = total > 0 and device != "cpu"
    if device == "cuda" and not total:
        raise FastsdError("the cluster has no GPU", argument="device", value=device)
    cores = [int(each.get("CPU", 0)) for each in machines if not on_gpus or each.get("GPU", 0) >= 1]
    if workers is None:
        workers = total if on_gpus else max(1, sum(each // threads for each in cores) if threads else len(cores))
    if threads is None:
        threads = 1 if on_gpus else max(1, min(cores, default=1) * len(cores) // max(workers, len(cores)))
    if threads > max(cores, default=0):
        raise FastsdError(
            f"the largest machine offers {max(cores, default=0)} cores", argument="--threads", value=threads
        )
    if on_gpus and workers > total:
        raise FastsdError(f"each takes a GPU, and the cluster has {total}", argument=flag, value=workers)
    if workers > (room := sum(each // threads for each in cores)):
        raise FastsdError(f"the cluster has room for {room} of {threads} cores", argument=flag, value=workers)
    return PoolSize(workers, threads, int(on_gpus))
