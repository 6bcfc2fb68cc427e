"""A batch job on Ray: Ray Data reads the lines on this machine, has workers do them, and brings the outcomes back here.

Ray Data starts the workers, feeds them no faster than they are done (back-pressure), and gives the lines of a worker
that died to another. The manifest is written by the job's own process alone, so its promises are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import pickle
import socket
import traceback
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd import __version__
from fastsd.batch.engine import BatchEngine, BatchOutcome, failure
from fastsd.batch.job import LinesLeft
from fastsd.batch.lines import BadLine
from fastsd.batch.requests import in_batches
from fastsd.batch.store import open_store
from fastsd.errors import FastsdError
from fastsd.files import reason
from fastsd.parameters.rows import DEFAULT_BATCH

HERE = "local"  # an address: a cluster of this machine alone, which ends with the job
RETRIES = 3  # of lines whose worker died; then they count as failed
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
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
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


def pool_size(
    machines: list[dict[str, float]], device: str | None, workers: int | None, threads: int | None
) -> PoolSize:
    """The workers of a job: by default one for each GPU, and without GPUs one for each machine, with all of its cores.

    Args:
        machines: what each has, "CPU" and "GPU".
        device, workers, threads: flags.

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
        raise FastsdError(f"each takes a GPU, and the cluster has {total}", argument="--workers", value=workers)
    if workers > (room := sum(each // threads for each in cores)):
        raise FastsdError(f"the cluster has room for {room} of {threads} cores", argument="--workers", value=workers)
    return PoolSize(workers, threads, int(on_gpus))


class RayWorker:
    """A process of Ray that does lines; the model is loaded with the first.

    Args:
        args, begun_with: see `BatchEngine`.
        folder: of the job's command, where this machine has it: relative paths count from there.
        version: of fastsd on the machine of the job.
        threads: of PyTorch.
    """

    def __init__(
        self, args: argparse.Namespace, begun_with: dict[str, Any] | None, folder: str, version: str, threads: int
    ):
        import torch

        torch.set_num_threads(threads)
        if Path(folder).is_dir():
            os.chdir(folder)
        self.args, self.begun_with, self.version = args, begun_with, version
        self.engine: BatchEngine | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """An outcome for a batch; what ends the job is an outcome too, since Ray would try it again."""
        found: BatchOutcome | FastsdError | str
        try:
            if self.engine is None:
                self.engine = self._load()
            found = self.engine.do(pickle.loads(row["batch"]))
        except FastsdError as error:
            found = error
        except Exception:
            found = traceback.format_exc()
        return {"outcome": pickle.dumps(found)}

    def _load(self) -> BatchEngine:
        if self.version != __version__:
            raise FastsdError(
                f"{socket.gethostname()} has fastsd {__version__}, and the job {self.version}", argument="--ray"
            )
        store = None if self.args.store is None else open_store(self.args.store)
        return BatchEngine(self.args, self.begun_with, store)


def outcomes(args: argparse.Namespace, left: LinesLeft, begun_with: dict[str, Any] | None) -> Generator[BatchOutcome]:
    """The outcomes of lines that the workers of the connected cluster do.

    Raises:
        FastsdError: the model cannot be loaded, a store cannot be written to, a flag asks for more than there is.
        RuntimeError: a mistake in a worker.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    size = pool_size(machines, args.device, args.workers, args.threads)
    context = DataContext.get_current()
    context.target_max_block_size = 1  # byte: each batch, and each outcome, goes its way at once
    context.max_errored_blocks = -1  # lines whose workers died cost no others
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `max_task_retries` has no name of its own there yet
        rows = _read(left, args.batch_size or DEFAULT_BATCH).map(
            RayWorker,
            fn_constructor_args=(args, begun_with, os.getcwd(), __version__, size.threads),
            compute=ActorPoolStrategy(min_size=1, max_size=size.workers, initial_size=size.workers),
            num_cpus=size.threads,
            num_gpus=size.gpus,
            max_task_retries=RETRIES,
        )
    seen: set[int] = set()
    for row in rows.iter_rows():
        found = pickle.loads(row["outcome"])
        if isinstance(found, FastsdError):
            raise found
        if isinstance(found, str):
            raise RuntimeError(f"a mistake in a worker:\n{found}")
        seen.update(record["line"] for record in found.records)
        yield found
    for line in left:
        number = line.number if isinstance(line, BadLine) else line.line
        if number not in seen:
            why = FastsdError(f"its worker died, and {RETRIES} others that tried it")
            yield BatchOutcome(None, [failure(BadLine(number, why, line.fields))])


def _read(left: LinesLeft, size: int) -> Any:
    """The batches of a job's lines as rows of Ray Data, read on this machine as they are wanted."""
    import pyarrow
    import ray
    from ray.data import Datasource
    from ray.data.block import BlockMetadata
    from ray.data.datasource import ReadTask

    def read() -> Iterator[Any]:
        for batch in in_batches(left, size):
            yield pyarrow.table({"batch": [pickle.dumps(batch)]})

    class _Lines(Datasource):
        def get_name(self) -> str:
            return "Lines"

        def estimate_inmemory_data_size(self) -> None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[Any]:
            unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(read, unknown)]

    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return ray.data.read_datasource(_Lines(), override_num_blocks=1, num_cpus=0, label_selector=here)
