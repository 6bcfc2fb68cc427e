"""Images a second of the server beside the pipeline alone: `python -m bench.server [--turns 30] [--steps 25]`.

The same requests, at 1, 4 and 16 clients at once, each of one image with its own prompt and seed; the pipeline has them
in batches of as many images as the server's. The server's time is that until the client has its answer: a PNG, as
base64, in JSON, over HTTP. The pipeline alone leaves its images in memory. Both run in processes of their own with the
same settings, the model's own.
The two take turns of a second or a few, and the other waits meanwhile: a machine that is shared with others may be a
third slower for a minute, which then both have. Figures are of all turns together; the range of the share holds the
middle half of the turns.
A batch of each size comes before the first figure, since oneDNN compiles code for a shape at its first call. Each
client asks twice before a turn's clock starts: its connection is open then, and the queue knows how many to expect.
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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

CLIENTS, BATCH = (1, 4, 16), 4
IMAGES = {1: 4, 4: 16, 16: 48}  # of a turn
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
        encoded = json.dumps(body).encode()
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


def batches_of(url: str) -> float:
    """How many batches a server has made."""
    with urllib.request.urlopen(f"{url}metrics") as answer:
        found = re.search(r'^fastsd_stage_seconds_count\{stage="total"\} (.+)$', answer.read().decode(), re.M)
    assert found is not None
    return float(found[1])


def warm_up(url: str, steps: int) -> None:
    """A batch of each size."""
    for images in range(1, BATCH + 1):
        Clients(url, steps).ask(0, images)


@dataclass(frozen=True)
class Turn:
    """What a turn took.

    Attributes:
        seconds: by the clock.
        used: processor seconds of the process that generates.
        median: seconds until a client had its image; of the pipeline alone: of a batch.
        batches: how many there were.
        server: processor seconds of the server's own process.
    """

    seconds: float
    used: float
    median: float
    batches: float
    server: float = 0.0


def serve_images(url: str, pid: int, images: int, clients: int, steps: int) -> Turn:
    """So many images, by so many clients at once, each of which has asked twice before."""
    asking, processes = Clients(url, steps), (worker_of(pid), pid)
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(asking.ask, range(2 * clients)))
        before, made = [processor_seconds(one) for one in processes], batches_of(url)
        started = time.perf_counter()
        spent = list(pool.map(asking.ask, range(images)))
        seconds = time.perf_counter() - started
    worker, own = (processor_seconds(one) - old for one, old in zip(processes, before, strict=True))
    asking.check()
    return Turn(seconds, worker, statistics.median(spent), batches_of(url) - made, own)


PIPELINE = """if True:
    import sys, time, fastsd, torch  # fastsd first: it says how threads wait before torch starts them, as in the server
    from fastsd.generate.threads import suited_threads
    steps = int(sys.argv[1])
    pipe, words = fastsd.Pipeline.from_pretrained(), sys.argv[2].split()
    def run(start, batch):
        seeds = range(start, start + batch)
        prompts = [f"a handwritten {words[seed % 10]}" for seed in seeds]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        started = time.perf_counter()
        pipe(prompts, generator=generators, num_inference_steps=steps, batch_size=batch)
        return time.perf_counter() - started
    with suited_threads(pipe.components, pipe.device):
        for line in sys.stdin:
            images, batch = map(int, line.split())
            started, used = time.perf_counter(), time.process_time()
            spent = sorted(run(start, batch) for start in range(0, images, batch))
            seconds, used = time.perf_counter() - started, time.process_time() - used
            print(seconds, used, spent[len(spent) // 2], len(spent), flush=True)
"""


@contextmanager
def pipeline(steps: int) -> Iterator[Callable[[int, int], Turn]]:
    """The pipeline alone, in a process of its own; gives what makes so many images there, in batches of so many."""
    command = [sys.executable, "-c", PIPELINE, str(steps), " ".join(DIGITS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def run(images: int, batch: int) -> Turn:
            assert process.stdin is not None and process.stdout is not None
            print(images, batch, file=process.stdin, flush=True)
            return Turn(*map(float, process.stdout.readline().split()))

        yield run


@dataclass(frozen=True)
class TurnPair:
    """A turn of the server and one of the pipeline alone, of as many images."""

    images: int
    served: Turn
    alone: Turn

    @property
    def share(self) -> float:
        return self.alone.seconds / self.served.seconds


def row(clients: int, pairs: list[TurnPair]) -> str:
    """The turns of a number of clients as a row of Markdown."""
    images = sum(pair.images for pair in pairs)
    served, alone = [pair.served for pair in pairs], [pair.alone for pair in pairs]
    seconds = [sum(turn.seconds for turn in turns) for turns in (served, alone)]
    low, high = quartiles([pair.share for pair in pairs])
    used = [
        sum(getattr(turn, name) for turn in turns)
        for turns, name in ((served, "used"), (served, "server"), (alone, "used"))
    ]
    cells = [
        str(clients),
        f"{images / seconds[0]:.1f}",
        f"{statistics.median(turn.median for turn in served):.3f}",
        f"{images / sum(turn.batches for turn in served):.1f}",
        f"{images / seconds[1]:.1f}",
        f"{seconds[1] / seconds[0]:.3f} ({low:.2f} to {high:.2f})",
        *(f"{1000 * each / images:.0f}" for each in used),
    ]
    return f"| {' | '.join(cells)} |"


def quartiles(values: list[float]) -> tuple[float, float]:
    """The first and the third."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def table(pairs: dict[int, list[TurnPair]]) -> str:
    """A row of Markdown for each number of clients."""
    head = (
        "| clients | server, images/s | seconds of one | images of a batch | pipeline alone, images/s | share"
        " | processor ms of an image: worker | server | pipeline alone |"
    )
    return "\n".join([head, "|---" * 9 + "|", *(row(clients, found) for clients, found in pairs.items())])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=30, help="of each number of clients")
    parser.add_argument("--steps", type=int, default=25, help="of an image; the default is the model's own")
    args = parser.parse_args(arguments)
    pairs: dict[int, list[TurnPair]] = {clients: [] for clients in CLIENTS}
    with server() as (url, pid), pipeline(args.steps) as alone:
        warm_up(url, args.steps)
        for batch in (1, BATCH):
            alone(batch, batch)
        for turn in range(args.turns):
            for clients, images in IMAGES.items():
                batch = min(clients, BATCH)
                before = alone(images, batch) if turn % 2 else None  # each comes first in half of the turns
                served = serve_images(url, pid, images, clients, args.steps)
                pairs[clients].append(TurnPair(images, served, before or alone(images, batch)))
    print(table(pairs))


if __name__ == "__main__":
    main()
