"""The benchmark of two workers of Ray: its slope, and its table."""

from __future__ import annotations

import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench.workers import main, pace, run_job, table


def test_the_pace_is_that_of_the_middle() -> None:
    """Slow at the start, and at the end; between, two workers add eight lines each at nearly the same moment."""
    middle = [(10.0 + k // 2 + 0.01 * (k % 2), 24 + 8 * k) for k in range(20)]
    assert pace([(0.0, 8), (9.0, 16), *middle, (40.0, 184)], 24) == pytest.approx(16, rel=0.02)


def test_the_table_has_a_row_for_each_round_and_their_mean() -> None:
    assert table({1: [10.0, 20.0], 2: [19.0, 30.0]}).splitlines()[2:] == [
        "| 1 | 10.00 | 19.00 | 0.95 |",
        "| 2 | 20.00 | 30.00 | 0.75 |",
        "| mean | 15.00 | 24.50 | 0.82 |",
    ]


def test_a_job_that_fails_is_no_pace(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):  # there are no prompts
        run_job(tmp_path, 1, 1)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `ray`")
def test_it_measures_two_workers(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--rounds", "1", "--lines", "48", "--batch", "2"])
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["| 1", "| mean"]
