"""A run that does not move says where it stands."""

from __future__ import annotations

import threading
import time

from fastsd.train.stall import StallWatch


def test_it_is_said_once_and_again_after_twice_the_time() -> None:
    said: list[str] = []
    heard = threading.Event()

    def report(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            heard.set()

    with StallWatch(0.2 / 60, report) as watch:
        watch.moved("step 7 of vae")
        began = time.monotonic()
        assert heard.wait(60)
        assert time.monotonic() - began > 0.4
    assert all(line.startswith("step 7 of vae has not been finished for 0.0") for line in said)


def test_it_names_the_place_and_the_reason() -> None:
    """A reader that hangs on another thread, inside of a function of the package."""
    said: list[str] = []
    entered, heard, over = threading.Event(), threading.Event(), threading.Event()

    def hang() -> bytes:
        entered.set()
        over.wait(60)
        return b""

    from fastsd.train.packed import list_idx

    class Slow:
        """What stands for a folder on a disk that does not answer."""

        def is_dir(self) -> bool:
            hang()
            return False

    def read() -> None:
        try:
            list_idx(Slow())  # type: ignore[arg-type]
        except Exception as error:
            said.append(type(error).__name__)

    thread = threading.Thread(target=read)
    thread.start()
    assert entered.wait(60)
    with StallWatch(0.05 / 60, lambda line: (said.append(line), heard.set())) as watch:  # type: ignore[func-returns-value]
        watch.moved("the first step of unet")
        assert heard.wait(60)
    over.set()
    thread.join()
    assert "fastsd/train/packed.py:" in said[0] and "(list_idx)" in said[0]
    assert "the disk of data.path may hang" in said[0]
    assert said[-1] == "FastsdError"


def test_nothing_is_said_while_it_moves_or_where_it_is_off() -> None:
    said: list[str] = []
    with StallWatch(60, said.append) as watch:
        watch.moved("step 1")
    with StallWatch(0, said.append) as watch:
        watch.moved("step 1")
    assert not said
