from __future__ import annotations

import os
import time

import pytest

from bench import server
from bench.server import ServedPace, processor_seconds, table, worker_of


def test_the_table_has_medians_and_the_share_at_the_same_batch() -> None:
    served = {
        1: [ServedPace(8, 0.1, 1, 0.05, 0.01), ServedPace(9, 0.2, 1, 0.06, 0.02), ServedPace(10, 0.3, 1, 0.07, 0.03)],
        16: [ServedPace(19, 0.5, 3.9, 0.04, 0.01)],
    }
    alone = {1: [(10.0, 0.08), (10.0, 0.08), (20.0, 0.02)], 4: [(20.0, 0.05)]}
    assert table(served, alone).splitlines()[2:] == [
        "| 1 | 9.0 | 0.200 | 1.0 | 10.0 | 0.90 | 60 | 20 | 80 |",
        "| 16 | 19.0 | 0.500 | 3.9 | 20.0 | 0.95 | 40 | 10 | 50 |",
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
def test_it_measures_a_server_and_the_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    server.main(["--images", "2", "--steps", "1", "--rounds", "1"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [int(row[0]) for row in rows] == list(server.CLIENTS)
    assert all(float(cell) > 0 for row in rows for cell in row[1:6])
    assert [row[3] for row in rows][0] == "1.0"  # one client: every batch is of one image
