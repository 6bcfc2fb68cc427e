"""Images a second of two workers of Ray beside one: `python -m bench.workers [--rounds 3] [--lines 480]`.

A batch job of the bundled model on a cluster of this machine alone, once by one worker and once by two, a thread each,
in turns. The pace is the slope of the line through all moments at which the manifest got lines: the workers are
started then and have more to do, so neither their start nor an end, where one waits for the other, is in it, and no
batch that a count from one moment to another would have or lack. Needs the extra `ray`, and a core for each worker.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np

from fastsd.batch.manifest import NAME

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LOOK = 0.05  # seconds between two looks at the manifest

Moment = tuple[float, int]  # seconds, and the lines that are done


def run_job(folder: Path, workers: int, batch: int) -> list[Moment]:
    """Run the job of `prompts.jsonl` by so many workers; the moments at which lines were added to its manifest.

    Raises:
        subprocess.CalledProcessError: it failed; standard error says why.
    """
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, "-m", "fastsd", "batch", "prompts.jsonl", "--out", out, "-b", str(batch)]
        command += ["--ray", "--workers", str(workers), "--threads", "1", "--no-progress"]
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
        process = subprocess.Popen(command, cwd=folder, env=os.environ | token, stdout=subprocess.DEVNULL)
        moments: list[Moment] = []
        while (code := process.poll()) is None:
            path = Path(out) / NAME
            done = path.read_bytes().count(b'"state": "done"') if path.exists() else 0
            if done > (moments[-1][1] if moments else 0):
                moments.append((time.monotonic(), done))
            time.sleep(LOOK)
    if code:
        raise subprocess.CalledProcessError(code, command)
    return moments


def pace(moments: list[Moment], edge: int) -> float:
    """Images a second: the slope of the line through the moments with the least squares.

    Args:
        edge: lines at the start and the end that are left out.
    """
    last = moments[-1][1]
    seconds, done = np.array([moment for moment in moments if edge <= moment[1] <= last - edge]).T
    return float(np.polyfit(seconds - seconds[0], done, 1)[0])


def table(paces: dict[int, list[float]]) -> str:
    """A row of Markdown for each round, and their means."""
    lines = ["| round | one worker, images/s | two workers, images/s | share of twice one |", "|---|---|---|---|"]
    rounds = list(zip(*paces.values(), strict=True))
    rows = [*((str(k), *each) for k, each in enumerate(rounds, 1)), ("mean", *map(statistics.mean, paces.values()))]
    return "\n".join(
        [*lines, *(f"| {name} | {one:.2f} | {two:.2f} | {two / (2 * one):.2f} |" for name, one, two in rows)]
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lines", type=int, default=480, help="of the job, an image each")
    parser.add_argument("--batch", type=int, default=8, help="images that run together")
    parser.add_argument("--side", type=int, default=64, help="of the images, in pixels")
    args = parser.parse_args(arguments)
    paces: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        asked = [
            {"prompt": f"a handwritten {WORDS[k % 10]}", "seed": k, "width": args.side, "height": args.side}
            for k in range(args.lines)
        ]
        (Path(folder) / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
        for number in range(args.rounds):
            for workers in (1, 2) if number % 2 == 0 else (2, 1):
                paces[workers].append(pace(run_job(Path(folder), workers, args.batch), 2 * workers * args.batch))
    print(table(paces))


if __name__ == "__main__":
    main()
