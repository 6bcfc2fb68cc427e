"""The model of a job over many GPUs: by hand, its bounds, and its measured parts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.scale import Inputs, Overheads, estimate, measure, table

COST = Overheads(encode=0.25, write=0.01, manifest=0.002, schedule=0.008, image=1_000_000)
GIVEN = Inputs(rate=4.0, batch=8, gpu_hour=3.6, between_failures=100.0, restart=358.0)


def test_one_gpu_by_hand() -> None:
    """8 images take 2 s and 2 s of encoding; a failure costs 358 + 2 s of 360,000."""
    found = estimate(1, GIVEN, COST)
    assert found.lost == pytest.approx(0.001) and found.rate == pytest.approx(2 * 0.999) and found.bound == "GPUs"
    assert found.failures_a_day == pytest.approx(0.24) and found.gb_a_day == pytest.approx(found.rate * 86.4)
    assert found.compute == pytest.approx(0.001 / found.rate)
    assert found.storage == pytest.approx(0.005 / 1000 + 0.023 / 1000)


def test_the_command_bounds_many_gpus() -> None:
    """It does a batch in 10 ms, 800 images a second; where it writes the images too, in 90 ms."""
    found = estimate(1000, GIVEN, COST)
    assert (found.rate, found.bound) == (pytest.approx(800), "command")
    assert found.compute == pytest.approx(1000 * 0.001 / 800)
    alone = estimate(1000, replace(GIVEN, store=False), COST)
    assert alone.rate == pytest.approx(8 / 0.09) and alone.storage == pytest.approx(0.023 / 1000)


def test_the_table_has_a_line_for_each() -> None:
    lines = table([estimate(gpus, GIVEN, COST) for gpus in (1, 1000)]).splitlines()
    assert len(lines) == 4 and lines[3].startswith("| 1,000 | 800.0 | command |")
    assert {line.count("|") for line in lines} == {8}


def test_the_parts_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.scale.find_spec", lambda _: None)
    found = measure(64, 2, rounds=2)
    assert min(found.encode, found.write, found.manifest) >= 0 and found.schedule != found.schedule
    assert 64 * 64 * 3 < found.image < 64 * 64 * 3 + 1000  # noise cannot be compressed
