"""Runs of a batch job that are killed with SIGKILL, each in a forked child, so that torch is imported once.

`python -m tests.support.killed writes K,K,... WORDS...`: the k-th time that a file is brought to the disk.
`python -m tests.support.killed moments N SECONDS WORDS...`: N times, each after a random time up to SECONDS.
The job runs in between and at the end. `OUT` among the words is a folder; a job that ends before its kill begins anew
in the next, OUT-1 and so on. Prints how each run ended: -9, or its exit code.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable

from fastsd import pipeline  # noqa: F401  (imported before the first fork)
from fastsd.cli import main


def start(words: list[str], prepare: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        prepare()
        os._exit(main(words))
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at_write(k: int) -> None:
    written, sync = 0, os.fsync

    def counted(file: int) -> None:
        nonlocal written
        written += 1
        if written == k:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(file)

    os.fsync = counted  # type: ignore[assignment]


def at_writes(which: list[int], words: list[str]) -> list[int]:
    codes = [ended(start(words, lambda k=k: kill_at_write(k))) for k in which]  # type: ignore[misc]
    return [*codes, ended(start(words, lambda: None))]


def at_moments(count: int, seconds: float, words: list[str]) -> list[int]:
    chance, codes, folder, anew = random.Random(0), list[int](), words[words.index("--out") + 1], 0
    while codes.count(-signal.SIGKILL) < count:
        pid = start(words, lambda: None)
        time.sleep(chance.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        codes.append(ended(pid))
        if codes[-1] != -signal.SIGKILL:
            anew += 1
            words = [f"{folder}-{anew}" if word.startswith(folder) else word for word in words]
    return [*codes, ended(start(words, lambda: None))]


if __name__ == "__main__":
    way, *rest = sys.argv[1:]
    if way == "writes":
        found = at_writes([int(k) for k in rest[0].split(",")], rest[1:])
    else:
        found = at_moments(int(rest[0]), float(rest[1]), rest[2:])
    print("ended", *found)
