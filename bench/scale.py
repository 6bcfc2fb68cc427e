"""A model of a batch job over many GPUs: `python -m bench.scale --rate 2 --gpu-hour 2.5`.

Throughput, storage, failures and the price of an image, for some numbers of GPUs. What fastsd and Ray add to the
generation is measured on this machine, as processor time. The GPU's rate, its price and how often it fails are inputs.
It is a model: no cluster of that size has run it.
"""

from __future__ import annotations

import argparse
import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastsd.batch.manifest import open_manifest
from fastsd.batch.store import FolderStore
from fastsd.image.files import encode

KIB = 1024
# 419 unexpected interruptions of 16,384 H100s in 54 days: Llama Team, The Llama 3 Herd of Models (2024), table 5.
HOURS_BETWEEN_FAILURES = 16384 * 54 * 24 / 419
GB_MONTH, THOUSAND_PUTS = 0.023, 0.005  # US$: Amazon's list price of S3 Standard, us-east-1, first 50 TB


@dataclass(frozen=True)
class Overheads:
    """Seconds of a processor.

    Attributes:
        encode: of an image, in the worker.
        write: of an image, where the command writes it.
        manifest: of a batch, in the command.
        schedule: of a batch, in the command: Ray Data.
        image: bytes of a file.
    """

    encode: float
    write: float
    manifest: float
    schedule: float
    image: int


@dataclass(frozen=True)
class Inputs:
    """What is not measured here.

    Attributes:
        rate: images a second of one GPU, encoding apart.
        batch: images that run together.
        gpu_hour: the price of a GPU's hour, with its share of the machine.
        between_failures: hours of a GPU between two failures.
        restart: seconds until a new worker has the model and goes on.
        gb_month, thousand_puts: prices of the store.
        months: for which images are kept.
        put: seconds that a worker waits for the store to have an image.
        store: workers write images; otherwise the command does.
    """

    rate: float
    batch: int
    gpu_hour: float
    between_failures: float = HOURS_BETWEEN_FAILURES
    restart: float = 120.0
    gb_month: float = GB_MONTH
    thousand_puts: float = THOUSAND_PUTS
    months: float = 1.0
    put: float = 0.0
    store: bool = True


@dataclass(frozen=True)
class ScaleEstimate:
    """Of a number of GPUs: images a second; which part bounds them; failures a day; GB a day; prices of an image."""

    gpus: int
    rate: float
    bound: str
    failures_a_day: float
    lost: float  # share of the GPUs' time
    gb_a_day: float
    compute: float
    storage: float


def estimate(gpus: int, given: Inputs, cost: Overheads) -> ScaleEstimate:
    """The model. A worker generates, encodes, and writes to a store. A failure costs half a batch and a restart. The
    command does its part of each batch, one after another."""
    of_batch = given.batch * (1 / given.rate + cost.encode + (given.put if given.store else 0.0))
    lost = min(1.0, (given.restart + of_batch / 2) / (given.between_failures * 3600))
    workers = gpus * given.batch / of_batch * (1 - lost)
    command = cost.schedule + cost.manifest + (0.0 if given.store else given.batch * cost.write)
    rate = min(workers, given.batch / command)
    puts = given.thousand_puts / 1000 if given.store else 0.0
    return ScaleEstimate(
        gpus,
        rate,
        "GPUs" if workers <= given.batch / command else "command",
        gpus * 24 / given.between_failures,
        lost,
        rate * 86400 * cost.image / 1e9,
        gpus * given.gpu_hour / 3600 / rate,
        puts + given.months * given.gb_month * cost.image / 1e9,
    )


def measure(side: int, batch: int, rounds: int = 20) -> Overheads:
    """The overheads on this machine, for images of noise, the largest that a PNG of that size gets."""
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    data = encode(image, ".png", {})
    head = {"fastsd_batch": 1, "sha256": "", "settings": {}, "seed": 0}
    with tempfile.TemporaryDirectory() as folder, open_manifest(Path(folder, "job"), head) as manifest:
        store = FolderStore(manifest.folder)
        manifest.begin({})
        record = {"state": "done", "request": {"prompt": "x" * 200}, "seed": 0, "notes": [], "seconds": 1.0}
        record["files"] = [{"path": "00000/00000001.png", "sha256": "0" * 64, "seed": 0}]
        lines = iter(range(1, 10**9))
        return Overheads(
            encode=_seconds(lambda: encode(image, ".png", {}), rounds),
            write=_seconds(lambda: store.write(f"00000/{next(lines):08d}.png", data), rounds),
            manifest=_seconds(lambda: manifest.add([record | {"line": next(lines)} for _ in range(batch)]), rounds),
            schedule=of_ray() if find_spec("ray") else float("nan"),
            image=len(data),
        )


def _seconds(act: Callable[[], Any], rounds: int) -> float:
    """The least processor time of some rounds."""
    act()
    found = []
    for _ in range(rounds):
        start = time.process_time()
        act()
        found.append(time.process_time() - start)
    return min(found)


class IdleWorker:
    """In the place of one that generates."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"outcome": pickle.dumps(len(row["batch"]))}


def of_ray(batches: int = 400) -> float:
    """Processor seconds of the command's process for each batch that goes to a worker and comes back."""
    from fastsd.batch.cluster import one_by_one, read_batches
    from fastsd.batch.job import LinesLeft
    from fastsd.runtime.ray_cluster import HERE, connected

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prompts.jsonl")
        path.write_text('{"prompt": "a lighthouse"}\n' * batches)
        with connected(HERE):
            from ray.data import ActorPoolStrategy

            one_by_one()
            rows = read_batches(LinesLeft(path, 0, frozenset()), 1)
            found = iter(rows.map(IdleWorker, compute=ActorPoolStrategy(size=2), num_cpus=0.5).iter_rows())
            next(found)  # the workers are there
            start = time.process_time()
            count = sum(1 for _ in found)
            return (time.process_time() - start) / count


def table(rows: list[ScaleEstimate]) -> str:
    """In Markdown."""
    lines = ["| GPUs | images/s | bound by | failures a day | time lost | GB a day | price of 1,000 images |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        price = 1000 * (row.compute + row.storage)
        lines.append(
            f"| {row.gpus:,} | {row.rate:,.1f} | {row.bound} | {row.failures_a_day:.2g} | {100 * row.lost:.1g} % "
            f"| {row.gb_a_day:,.0f} | {price:.3g} (storage {1000 * row.storage:.2g}) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, then print the model's table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=float, required=True, help="images a second of one GPU: measure it on yours")
    parser.add_argument("--gpu-hour", type=float, required=True, help="the price of a GPU's hour")
    parser.add_argument("--gpus", default="1,8,64,512,1000")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=512, help="pixels of an image's side (default: %(default)s)")
    parser.add_argument("--restart", type=float, default=120.0, help="seconds until a new worker goes on")
    parser.add_argument("--between-failures", type=float, default=HOURS_BETWEEN_FAILURES, help="hours of a GPU")
    parser.add_argument("--put", type=float, default=0.0, help="seconds that the store takes for an image")
    parser.add_argument("--months", type=float, default=1.0, help="for which images are kept")
    parser.add_argument("--schedule", type=float, help="seconds of Ray for each batch (default: measured)")
    parser.add_argument("--folder", action="store_true", help="the command writes the images, without a store")
    args = parser.parse_args()
    cost = measure(args.side, args.batch)
    if args.schedule is not None:
        cost = Overheads(cost.encode, cost.write, cost.manifest, args.schedule, cost.image)
    if np.isnan(cost.schedule):
        parser.error("Ray is not installed; give --schedule")
    given = Inputs(
        args.rate,
        args.batch,
        args.gpu_hour,
        args.between_failures,
        args.restart,
        months=args.months,
        put=args.put,
        store=not args.folder,
    )
    print(
        f"measured, ms of a processor: encode {1e3 * cost.encode:.1f} and write {1e3 * cost.write:.2f} an image of "
        f"{cost.image / KIB:.0f} KiB; manifest {1e3 * cost.manifest:.2f} and Ray {1e3 * cost.schedule:.1f} a batch"
    )
    print(table([estimate(int(gpus), given, cost) for gpus in args.gpus.split(",")]))


if __name__ == "__main__":
    main()
