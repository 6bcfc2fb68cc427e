"""Images a second of the server beside the pipeline alone: `python -m bench.server [--images 64] [--steps 10]`.

The same requests, at 1, 4 and 16 clients at once, each of one image with its own prompt and seed; the pipeline has them
in batches of as many images as the server's. Both run in processes of their own with the same settings, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

CLIENTS, BATCH = (1, 4, 16), 4
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@contextmanager
def server() -> Iterator[str]:
    """A server of the bundled model; gives its address when the model is loaded."""
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
            yield found[0]
        finally:
            process.terminate()
            process.wait()


def ask(url: str, seed: int, steps: int) -> float:
    """One image; returns the seconds until it was there."""
    body = {"prompt": f"a handwritten {DIGITS[seed % 10]}", "seed": seed, "steps": steps, "sampler_name": "DPM++ 2M"}
    started = time.perf_counter()
    request = urllib.request.Request(
        f"{url}sdapi/v1/txt2img", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        assert json.load(answer)["images"]
    return time.perf_counter() - started


def serve_images(url: str, images: int, clients: int, steps: int) -> tuple[float, float]:
    """Images a second, and the median of the seconds of one."""
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        spent = list(pool.map(lambda seed: ask(url, seed, steps), range(images)))
    return images / (time.perf_counter() - started), statistics.median(spent)


PIPELINE = """if True:
    import sys, time, torch, fastsd
    images, batch, steps = map(int, sys.argv[1:4])
    pipe, words = fastsd.Pipeline.from_pretrained(), sys.argv[4].split()
    def run(start):
        seeds = range(start, start + batch)
        prompts = [f"a handwritten {words[seed % 10]}" for seed in seeds]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        pipe(prompts, generator=generators, num_inference_steps=steps, sampler="dpm++2m", batch_size=batch)
    run(0)
    started = time.perf_counter()
    for start in range(0, images, batch):
        run(start)
    print(images / (time.perf_counter() - started))
"""


def pipeline_images(images: int, batch: int, steps: int) -> float:
    """Images a second of the pipeline alone, in batches."""
    command = [sys.executable, "-c", PIPELINE, str(images), str(batch), str(steps), " ".join(DIGITS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    served: dict[int, list[tuple[float, float]]] = {clients: [] for clients in CLIENTS}
    alone: dict[int, list[float]] = {1: [], BATCH: []}
    for _ in range(args.rounds):
        with server() as url:
            serve_images(url, 2 * BATCH, BATCH, args.steps)
            for clients in CLIENTS:
                served[clients].append(serve_images(url, args.images, clients, args.steps))
        for batch, found in alone.items():
            found.append(pipeline_images(args.images, batch, args.steps))
    print("| clients | server, images/s | seconds of one | pipeline alone, images/s | share |\n|---|---|---|---|---|")
    for clients, runs in served.items():
        pace, spent = (statistics.median(one) for one in zip(*runs))
        own = statistics.median(alone[min(clients, BATCH)])
        print(f"| {clients} | {pace:.1f} | {spent:.3f} | {own:.1f} | {pace / own:.2f} |")


if __name__ == "__main__":
    main()
