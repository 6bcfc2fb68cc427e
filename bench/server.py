"""Images a second of the server beside the pipeline alone: `python -m bench.server [--images 256] [--steps 10]`.

The same requests, at 1, 4 and 16 clients at once, each of one image with its own prompt and seed; the pipeline has them
in batches of as many images as the server's. The server's time is that until the client has its answer: a PNG, as
base64, in JSON, over HTTP. The pipeline alone leaves its images in memory. Both run in processes of their own with the
same settings, in turns.
A batch of each size comes before the first figure, since oneDNN compiles code for a shape at its first call. Each
client asks twice before the clock starts: its connection is open then, and the queue knows how many clients to expect.
Clients, server and worker share the processors; the table therefore also has the processor time that an image takes in
the worker and in the server, beside that of the pipeline alone (on Linux; elsewhere nan), and how many images the
server's batches had: a client that comes too late for its batch costs more than all else.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

CLIENTS, BATCH = (1, 4, 16), 4
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@contextmanager
def server() -> Iterator[tuple[str, int]]:
    """A server of the bundled model; gives its address and its process id when the model is loaded."""
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        command = [sys.executable, "-m", "fastsd", "serve", "--port", "0", "--max-batch", str(BATCH)]
        process = subprocess.Popen(command, stderr=log)
        try:
            while not (found := re.search(r"http://\S+", Path(log.name).read_text())):
                time.sleep(0.05)
            while True:
                try:
                    urllib.request.urlopen(f"{found[0]}ready")
                    break
                except urllib.error.HTTPError:
                    time.sleep(0.05)
            yield found[0], process.pid
        finally:
            process.terminate()
            process.wait()


class Clients:
    """A number of clients, each a thread with a connection that it keeps, as the libraries of clients do.

    They do little, since they share the processors with the server: what they get is looked at by `check`, afterwards.
    """

    def __init__(self, url: str, steps: int):
        self.url, self.steps = urlsplit(url), steps
        self.answers: list[bytes] = []
        self._own = threading.local()

    def ask(self, seed: int, images: int = 1) -> float:
        """An answer of so many images; returns the seconds until it was there."""
        body = {"prompt": f"a handwritten {DIGITS[seed % 10]}", "seed": seed, "steps": self.steps, "batch_size": images}
        encoded = json.dumps(body | {"sampler_name": "DPM++ 2M"}).encode()
        started = time.perf_counter()
        if not hasattr(self._own, "connection"):
            self._own.connection = HTTPConnection(self.url.hostname or "", self.url.port)
        self._own.connection.request("POST", "/sdapi/v1/txt2img", encoded, {"Content-Type": "application/json"})
        self.answers.append(self._own.connection.getresponse().read())
        return time.perf_counter() - started

    def check(self) -> None:
        """Each answer holds an image."""
        assert all(len(json.loads(answer)["images"]) == 1 for answer in self.answers)


def processor_seconds(pid: int) -> float:
    """What a process and its threads took of the processors so far; nan where the system does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return math.nan
    fields = stat.rsplit(")", 1)[1].split()  # the name before may hold anything; utime and stime are fields 14 and 15
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def worker_of(pid: int) -> int:
    """The process id of a server's worker: of its children the one that took most; 0 where the system does not say."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    return max(map(int, children), key=processor_seconds, default=0)


def counted(url: str) -> tuple[float, float]:
    """How many images a server has made, and in how many batches."""
    with urllib.request.urlopen(f"{url}metrics") as answer:
        text = answer.read().decode()
    names = ("fastsd_images_total", r'fastsd_stage_seconds_count\{stage="total"\}')
    images, batches = (float(re.search(f"^{name} (.+)$", text, re.M)[1]) for name in names)  # type: ignore[index]
    return images, batches


def warm_up(url: str, steps: int) -> None:
    """A batch of each size."""
    for images in range(1, BATCH + 1):
        Clients(url, steps).ask(0, images)


@dataclass(frozen=True)
class ServedPace:
    """What a number of clients got: images a second, the median of the seconds of one, the images of a batch, and the
    processor seconds that an image took in the worker and in the server."""

    images: float
    seconds: float
    batch: float
    worker: float
    server: float


def serve_images(url: str, pid: int, images: int, clients: int, steps: int) -> ServedPace:
    """So many images, by so many clients at once, each of which has asked twice before."""
    asking, processes = Clients(url, steps), (worker_of(pid), pid)
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(asking.ask, range(2 * clients)))
        before, made = [processor_seconds(one) for one in processes], counted(url)
        started = time.perf_counter()
        spent = list(pool.map(asking.ask, range(images)))
        pace = images / (time.perf_counter() - started)
    took = [(processor_seconds(one) - old) / images for one, old in zip(processes, before, strict=True)]
    asking.check()
    own, batches = (now - old for now, old in zip(counted(url), made, strict=True))
    return ServedPace(pace, statistics.median(spent), own / batches, *took)


PIPELINE = """if True:
    import sys, time, fastsd, torch  # fastsd first: it says how threads wait before torch starts them, as in the server
    from fastsd.generate.threads import suited_threads
    images, batch, steps = map(int, sys.argv[1:4])
    pipe, words = fastsd.Pipeline.from_pretrained(), sys.argv[4].split()
    def run(start):
        seeds = range(start, start + batch)
        prompts = [f"a handwritten {words[seed % 10]}" for seed in seeds]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        pipe(prompts, generator=generators, num_inference_steps=steps, sampler="dpm++2m", batch_size=batch)
    with suited_threads(pipe.components, pipe.device):
        run(0)
        started, used = time.perf_counter(), time.process_time()
        for start in range(0, images, batch):
            run(start)
    print(images / (time.perf_counter() - started), (time.process_time() - used) / images)
"""


def pipeline_images(images: int, batch: int, steps: int) -> tuple[float, float]:
    """Images a second of the pipeline alone, in batches, and the processor seconds of one."""
    command = [sys.executable, "-c", PIPELINE, str(images), str(batch), str(steps), " ".join(DIGITS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    pace, used = map(float, done.stdout.split())
    return pace, used


def table(served: dict[int, list[ServedPace]], alone: dict[int, list[tuple[float, float]]]) -> str:
    """Medians of the rounds as a table of Markdown, a row for each number of clients."""
    lines = [
        "| clients | server, images/s | seconds of one | images of a batch | pipeline alone, images/s | share"
        " | processor ms of an image: worker | server | pipeline alone |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for clients, runs in served.items():
        pace, spent, size, worker, own = (statistics.median(column) for column in zip(*map(astuple, runs), strict=True))
        best, used = (statistics.median(column) for column in zip(*alone[min(clients, BATCH)], strict=True))
        lines.append(
            f"| {clients} | {pace:.1f} | {spent:.3f} | {size:.1f} | {best:.1f} | {pace / best:.2f}"
            f" | {1000 * worker:.0f} | {1000 * own:.0f} | {1000 * used:.0f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(arguments)
    served: dict[int, list[ServedPace]] = {clients: [] for clients in CLIENTS}
    alone: dict[int, list[tuple[float, float]]] = {1: [], BATCH: []}
    for _ in range(args.rounds):
        with server() as (url, pid):
            warm_up(url, args.steps)
            for clients in CLIENTS:
                served[clients].append(serve_images(url, pid, args.images, clients, args.steps))
        for batch, found in alone.items():
            found.append(pipeline_images(args.images, batch, args.steps))
    print(table(served, alone))


if __name__ == "__main__":
    main()
