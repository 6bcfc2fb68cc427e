from __future__ import annotations

import os
import time

import pytest

from bench import server
from bench.server import Turn, TurnPair, processor_seconds, table, worker_of


def test_the_table_has_sums_of_the_turns_and_the_range_of_the_share() -> None:
    alone = [Turn(2.0, 1.6, 0.2, 8), Turn(1.0, 0.8, 0.2, 8), Turn(1.0, 0.8, 0.2, 8)]
    served = [Turn(2.0, 2.0, 0.2, 4, 0.1), Turn(2.0, 2.0, 0.3, 4, 0.2), Turn(1.0, 1.0, 0.4, 8, 0.3)]
    pairs = [TurnPair(8, mine, own) for mine, own in zip(served, alone, strict=True)]
    assert table({4: pairs, 1: pairs[:1]}).splitlines()[2:] == [
        "| 4 | 4.8 | 0.300 | 1.5 | 6.0 | 0.800 (0.75 to 1.00) | 208 | 25 | 133 |",
        "| 1 | 4.0 | 0.200 | 2.0 | 4.0 | 1.000 (1.00 to 1.00) | 250 | 12 | 200 |",
    ]


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="the system does not say what a process took")
def test_processor_seconds_are_those_of_the_process() -> None:
    before, own = processor_seconds(os.getpid()), time.process_time()
    while time.process_time() < own + 0.1:
        pass
    tick = 1 / os.sysconf("SC_CLK_TCK")
    # each reading is cut off to two whole ticks (user and system)
    assert abs(processor_seconds(os.getpid()) - before - (time.process_time() - own)) <= 4 * tick
    assert str(processor_seconds(2**30)) == "nan" and worker_of(2**30) == 0


@pytest.mark.heavy
def test_it_measures_a_server_and_the_pipeline(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "IMAGES", {1: 2, 4: 4, 16: 16})
    server.main(["--turns", "2", "--steps", "1"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [int(row[0]) for row in rows] == list(server.CLIENTS)
    assert all(float(cell.split()[0]) > 0 for row in rows for cell in row[1:6])
    assert [row[3] for row in rows][0] == "1.0"  # one client: every batch is of one image
