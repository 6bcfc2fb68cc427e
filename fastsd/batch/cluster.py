"""A batch job on Ray: Ray Data reads the lines on this machine, has workers do them, and brings the outcomes back here.

Ray Data starts the workers, feeds them no faster than they are done (back-pressure), and gives the lines of a worker
that died to another. The manifest is written by the job's own process alone, so its promises are the same.
"""

from __future__ import annotations

import argparse
import os
import pickle
import socket
import traceback
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from fastsd import __version__
from fastsd.batch.engine import BatchEngine, BatchOutcome, failure
from fastsd.batch.job import LinesLeft, number_of
from fastsd.batch.lines import BadLine
from fastsd.batch.requests import BatchRequest, in_batches
from fastsd.batch.store import open_store
from fastsd.errors import FastsdError
from fastsd.parameters.rows import DEFAULT_BATCH
from fastsd.runtime.ray_cluster import PoolSize, machines, pool_size

RETRIES = 3  # of lines whose worker died; then they count as failed


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
    size = pool_size(machines(), args.device, args.workers, args.threads)
    one_by_one()
    seen: set[int] = set()
    missed: list[BatchRequest | BadLine] = []
    while True:
        before = len(seen)
        for found in _one_pass(args, LinesLeft(left.path, left.seed, left.done | seen), begun_with, size):
            seen.update(record["line"] for record in found.records)
            yield found
        missed = [line for line in left if number_of(line) not in seen]
        if not missed or len(seen) == before:  # what a lost machine had done and not sent is done again
            break
    for line in missed:
        why = FastsdError(f"its worker died, and {RETRIES} others that tried it")
        yield BatchOutcome(None, [failure(BadLine(number_of(line), why, line.fields))])


def _one_pass(
    args: argparse.Namespace, left: LinesLeft, begun_with: dict[str, Any] | None, size: PoolSize
) -> Iterator[BatchOutcome]:
    """The outcomes of lines, without those whose workers or machines died."""
    from ray.data import ActorPoolStrategy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `max_task_retries` has no name of its own there yet
        rows = read_batches(left, args.batch_size or DEFAULT_BATCH).map(
            RayWorker,
            fn_constructor_args=(args, begun_with, os.getcwd(), __version__, size.threads),
            compute=ActorPoolStrategy(min_size=1, max_size=size.workers, initial_size=size.workers),
            num_cpus=size.threads,
            num_gpus=size.gpus,
            max_task_retries=RETRIES,
        )
    for row in rows.iter_rows():
        found = pickle.loads(row["outcome"])
        if isinstance(found, FastsdError):
            raise found
        if isinstance(found, str):
            raise RuntimeError(f"a mistake in a worker:\n{found}")
        yield found


def one_by_one() -> None:
    """Have Ray Data send each batch, and each outcome, at once; lines whose workers died cost no others."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.target_max_block_size = 1  # byte
    context.max_errored_blocks = -1


def read_batches(left: LinesLeft, size: int) -> Any:
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
